"""Results in the original image's pixels, from every kind of input, and pictures of them."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import drcnn
from drcnn import presets
from drcnn.config import Config, to_dict
from drcnn.data import eval_views
from drcnn.engine.checkpoint import save_checkpoint
from drcnn.engine.drawing import class_color, draw_boxes
from drcnn.engine.predictor import Predictor, draw_predictions
from drcnn.errors import ConfigError, DataError, DrcnnError, WeightsError
from drcnn.structures import Detections


class BrightSpot(nn.Module):
    """Finds the bounding box of the white pixels: score 0.9; and the whole image: score 0.2."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.batches = []

    def forward(self, images):
        assert not self.training
        self.batches.append(len(images.tensor))
        boxes = torch.zeros(len(images.tensor), 3, 4)
        for i, (image, (height, width)) in enumerate(zip(images.tensor, images.sizes.tolist(), strict=True)):
            y, x = (image[0] > 127).nonzero().T
            boxes[i, 0] = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
            boxes[i, 1] = torch.tensor([0, 0, width, height])
        count = len(boxes)
        return Detections(
            boxes,
            torch.tensor([[0.9, 0.2, 0.0]]).repeat(count, 1),
            torch.tensor([[1, 0, 0]]).repeat(count, 1),
            torch.tensor([[True, True, False]]).repeat(count, 1),
        )


@pytest.fixture
def predictor(tiny_data):
    return Predictor.from_model(BrightSpot(), tiny_data, ["whole", "spot"], [7, 90])


def spot(height=200, width=130, box=(40, 60, 80, 120)):
    image = np.zeros((height, width, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return image


def test_boxes_are_in_pixels_of_the_original_image(predictor):
    result = predictor(spot())
    # The network sees 64 / 130 of the size, so a pixel of it is two of the original.
    assert torch.allclose(result.boxes[0], torch.tensor([40.0, 60, 80, 120]), atol=2.1)
    assert torch.allclose(result.boxes[1], torch.tensor([0.0, 0, 130, 200]))
    assert result.scores.tolist() == pytest.approx([0.9, 0.2])
    assert result.labels.tolist() == [1, 0]
    assert result.names == ["spot", "whole"]
    assert result.image.shape == (200, 130, 3)
    assert len(result) == 2


def test_all_kinds_of_input_give_the_same(predictor, tmp_path):
    array = spot()
    path = tmp_path / "spot.png"
    Image.fromarray(array).save(path)
    read_only = array.copy()
    read_only.flags.writeable = False
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = predictor(array)
    for source in (path, str(path), Image.fromarray(array), tensor, read_only, array[:, ::-1][:, ::-1]):
        result = predictor(source)
        assert torch.equal(result.boxes, expected.boxes)
        assert torch.equal(torch.from_numpy(result.image), torch.from_numpy(array))


def test_a_list_is_batched_and_keeps_its_order(predictor):
    images = [spot(), spot(100, 240, (10, 20, 60, 80)), spot(64, 64, (0, 0, 32, 32))]
    results = predictor(images, batch_size=2)
    assert predictor.model.batches == [2, 1]
    for image, result in zip(images, results, strict=True):
        assert torch.allclose(result.boxes, predictor(image).boxes)
        assert result.image.shape == image.shape
    assert predictor([]) == []


def test_score_threshold(predictor):
    assert predictor(spot(), score_threshold=0.5).names == ["spot"]
    assert len(predictor(spot(), score_threshold=0.95)) == 0


def test_classes(predictor):
    assert predictor(spot(), classes=["whole"]).names == ["whole"]
    assert len(predictor(spot(), classes=["whole"], score_threshold=0.5)) == 0
    with pytest.raises(ConfigError, match="did you mean 'spot'"):
        predictor(spot(), classes=["sport"])


def test_batches_of_none_are_refused(predictor):
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        predictor([], batch_size=0)
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        next(predictor.stream([], batch_size=0))


def test_a_stream_is_taken_batch_by_batch(predictor):
    taken = []

    def frames():
        for number in range(5):
            taken.append(number)
            yield spot(box=(10 * number, 60, 80, 120))

    results = predictor.stream(frames(), score_threshold=0.5, batch_size=2)
    first = next(results)
    assert taken == [0, 1] and first.names == ["spot"]
    lefts = [first.boxes[0, 0].item(), *(result.boxes[0, 0].item() for result in results)]
    assert lefts == pytest.approx([0, 10, 20, 30, 40], abs=2.1)
    assert predictor.model.batches == [2, 2, 1]


def test_a_detector_that_is_no_module(tiny_data):
    def find(images):
        assert images.tensor.dtype == torch.uint8
        count = len(images.tensor)
        boxes = torch.tensor([0.0, 0, 8, 8]).expand(count, 1, 4)
        ones = torch.ones(count, 1)
        return Detections(boxes, ones, ones.long() * 0, ones.bool())

    assert Predictor(find, tiny_data, ["thing"])(spot()).names == ["thing"]


def test_to_coco(predictor):
    first, second = predictor(spot()).to_coco(image_id=5)
    assert first["image_id"] == 5 and first["category_id"] == 90
    assert first["bbox"] == pytest.approx([40, 60, 40, 60], abs=4.2)
    assert second["category_id"] == 7 and second["bbox"] == pytest.approx([0, 0, 130, 200])
    assert first["score"] == pytest.approx(0.9)


def test_the_model_keeps_its_mode(predictor):
    predictor.model.train()
    predictor(spot())
    assert predictor.model.training


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        torch.zeros(3, 4, 4),
        np.zeros((0, 4, 3), np.uint8),
        7,
        "no/such/file.jpg",
    ],
)
def test_other_images_are_refused_in_one_line(predictor, image):
    with pytest.raises(DataError) as caught:
        predictor(image)
    assert "\n" not in str(caught.value)


def test_a_photograph_is_turned_upright(predictor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    Image.fromarray(spot()).save(tmp_path / "photo.png", exif=exif)
    assert predictor(tmp_path / "photo.png").image.shape == (130, 200, 3)


@pytest.mark.parametrize("size", [(40, 30), (480, 640), (3000, 2000)])
def test_drawing_shows_box_and_text_at_any_size(size):
    image = np.full((*size, 3), 128, np.uint8)
    height, width = size
    box = np.array([[width * 0.25, height * 0.4, width * 0.75, height * 0.8]])
    picture = np.asarray(draw_boxes(image, box, [3], ["cat 0.87"]))
    assert max(picture.shape[:2]) >= 480 and picture.shape[0] % height == 0
    assert (image == 128).all()
    color = (picture == class_color(3)).all(-1)
    rows, columns = color.nonzero()
    factor = picture.shape[0] // height
    # The box, and the text's ground above it.
    assert abs(rows.max() - box[0, 3] * factor) <= 2
    assert abs(columns.min() - box[0, 0] * factor) <= 2
    ground = rows.min()
    assert box[0, 1] * factor - ground >= 12
    text = (np.abs(picture.astype(int) - 128).max(-1) > 100) & ~color
    assert text.sum() > 100, "no letters"


def test_small_boxes_of_a_crowd_have_no_text():
    image, corners = np.zeros((500, 500, 3), np.uint8), np.arange(100)
    boxes = np.stack([corners % 10 * 50, corners // 10 * 50], axis=1)[:, [0, 1, 0, 1]] + [5, 5, 25, 25]
    few, many = (np.asarray(draw_boxes(image, boxes[:n], [0] * n, ["a cat 0.87"] * n)) for n in (10, 100))
    inside = np.s_[8:22, 8:22]
    assert few[inside].any() and not many[inside].any()
    assert many[:, 5].any(axis=-1).sum() >= 10 * 20, "the boxes are drawn"


def test_drawing_survives_odd_boxes():
    boxes = np.array([[-50, -50, -10, -10], [5, 5, 5, 5], [90, 90, 500, 500], [np.nan] * 4, [0, 0, 99, 99]])
    picture = draw_boxes(np.zeros((100, 100, 3), np.uint8), boxes, range(5), ["a" * 200] * 5)
    assert picture.size == (500, 500)


def test_colors_of_classes_differ():
    colors = np.array([class_color(k) for k in range(24)])
    gap = np.abs(colors[:, None] - colors).sum(-1) + 1000 * np.eye(24)
    assert gap.min() > 10


def test_draw_hides_what_is_not_asked_for(predictor):
    everything = np.asarray(predictor(spot(), score_threshold=0.1).draw())
    default = np.asarray(predictor(spot()).draw())
    asked = np.asarray(predictor(spot()).draw(score_threshold=0.1))
    assert (asked == everything).all()
    whole = (default == class_color(0)).all(-1).sum()
    assert whole == 0 and (everything == class_color(0)).all(-1).sum() > 0


def test_draw_predictions_writes_pictures(tiny_data, tmp_path):
    from drcnn.data import load_split

    dataset = load_split(tiny_data, "val")
    torch.manual_seed(0)
    model = presets.light_faster_rcnn(len(dataset.categories)).build()
    files = draw_predictions(model, dataset, tiny_data, tmp_path / "new" / "pictures", pictures=3)
    assert len(set(files)) == 3
    assert all(max(Image.open(file).size) >= 480 for file in files)


@pytest.fixture
def run_folder(tiny_data, tmp_path):
    torch.manual_seed(0)
    config = Config(presets.light_faster_rcnn(4), tiny_data)
    model = config.model.build()
    state = {
        "format": 1,
        "drcnn_version": drcnn.__version__,
        "step": 3,
        "model": model.state_dict(),
        "config": to_dict(config),
        "categories": ["a", "b", "c", "d"],
        "category_ids": [2, 4, 6, 8],
    }
    save_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt", state)
    return tmp_path / "run", model, state


def test_load_gives_the_trained_model(run_folder, tiny_data):
    folder, model, _ = run_folder
    detector = drcnn.load(folder, device="cpu")
    expected = Predictor(model, tiny_data, ["a", "b", "c", "d"], [2, 4, 6, 8])(spot())
    result = detector(spot())
    assert len(result) > 0
    assert torch.equal(result.boxes, expected.boxes) and torch.equal(result.scores, expected.scores)
    assert {record["category_id"] for record in result.to_coco(1)} <= {2, 4, 6, 8}
    assert detector.categories == ("a", "b", "c", "d")
    again = drcnn.load(folder / "checkpoints" / "last.pt", device="cpu")(spot())
    assert torch.equal(again.boxes, result.boxes)


def test_load_says_how_images_are_tested(run_folder):
    folder, _, _ = run_folder
    plain = drcnn.load(folder, device="cpu")
    assert len(eval_views(plain.data_config)) == 1
    detector = drcnn.load(
        folder,
        device="cpu",
        tta="flip",
        soft_nms="linear",
        overrides=["--data.test-short-side", "32"],
    )
    assert [(v.short_side, v.hflip) for v in eval_views(detector.data_config)] == [(32, False), (32, True)]
    assert detector.model.config.box_head.soft_nms == "linear"
    with pytest.raises(ConfigError, match=r"did you mean --data\.test-short-side"):
        drcnn.load(folder, device="cpu", overrides=["--data.test-short-sid", "32"])


def test_load_names_what_does_not_fit(run_folder):
    folder, _, state = run_folder
    file = folder / "checkpoints" / "last.pt"
    state["model"].pop("rpn.conv.weight")
    save_checkpoint(file, state)
    with pytest.raises(WeightsError, match=r"missing: rpn\.conv\.weight"):
        drcnn.load(folder, device="cpu")
    file.write_bytes(b"nothing")
    with pytest.raises(DrcnnError, match=str(file)):
        drcnn.load(folder, device="cpu")
    with pytest.raises(DrcnnError, match="does not exist"):
        drcnn.load(folder / "nowhere")


def test_import_is_light():
    code = "import sys, drcnn; print(drcnn.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [drcnn.__version__, "False"]
    for name in drcnn.__all__:
        assert name in dir(drcnn) and getattr(drcnn, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'loaf'"):
        drcnn.loaf  # noqa: B018
