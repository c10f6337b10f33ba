"""Instance masks: read, checked, packed, drawn at any size, flipped and padded with their images."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as oracle
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from drcnn.data import Segmentation, augment, eval_loader, load_split, read_coco, train_loader
from drcnn.data.bitmasks import pack_masks, pad_masks
from drcnn.data.segmentation import PackedSegmentations, run_lengths
from drcnn.data.synthetic.maker import run_lengths as encode
from drcnn.errors import DataError

HEIGHT, WIDTH = 40, 60
BOX = [5, 5, 30, 20]
TRIANGLE = [[10.3, 5.2, 40.7, 12.1, 22.5, 33.9]]
TWO_PARTS = [[2, 2, 12.5, 2, 12.5, 9, 2, 9], [30, 20, 58.4, 20, 58.4, 38.2, 30, 38.2]]


def ring(height=HEIGHT, width=WIDTH):
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(y - height / 2, x - width / 2)
    return (distance < 15) & (distance > 7)


def compressed(mask):
    return oracle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


RLE = {"size": [HEIGHT, WIDTH], "counts": compressed(ring())}
RUNS = {"size": [HEIGHT, WIDTH], "counts": encode(ring())}


def read(folder, *segmentations, skip=(), masks=True, **options):
    """Reads one image whose annotations 1, 2, ... have these segmentations."""
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "a.png")
    annotations = [
        {"id": n, "image_id": 7, "category_id": 1, "bbox": BOX, "segmentation": s, **options}
        for n, s in enumerate(segmentations, start=1)
    ]
    for record in annotations:
        if record["segmentation"] is None:
            del record["segmentation"]
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": annotations,
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return read_coco(path, folder, skip=skip, masks=masks)


def drawn_by_pycocotools(polygons, height, width):
    # Coordinates are held in single precision, which the oracle must be given too.
    rounded = [np.array(p, np.float32).astype(float) for p in polygons]
    return oracle.decode(oracle.merge(oracle.frPyObjects([p.tolist() for p in rounded], height, width))) > 0


def test_every_form_of_a_mask_is_read(tmp_path):
    dataset = read(tmp_path, TRIANGLE, RLE, TWO_PARTS, RUNS)
    triangle, rle, parts, runs = (s.draw((HEIGHT, WIDTH)) for s in dataset.segmentations(0))
    assert all(mask.dtype == bool for mask in (triangle, rle, parts, runs))
    assert (triangle == drawn_by_pycocotools(TRIANGLE, HEIGHT, WIDTH)).all() and triangle.any()
    assert (parts == drawn_by_pycocotools(TWO_PARTS, HEIGHT, WIDTH)).all()
    assert (rle == ring()).all() and (runs == ring()).all()


def test_masks_follow_the_order_of_their_boxes(tmp_path, tiny_coco):
    path = tiny_coco / "annotations/instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"].reverse()
    shuffled = tmp_path / "shuffled.json"
    shuffled.write_text(json.dumps(content))
    dataset = read_coco(shuffled, tiny_coco / "images/train", masks=True)
    for i in range(len(dataset)):
        size = int(dataset.heights[i]), int(dataset.widths[i])
        boxes, found = dataset.boxes(i), dataset.segmentations(i)
        assert len(boxes) == len(found) > 0
        for box, segmentation in zip(boxes, found, strict=True):
            rows, columns = segmentation.draw(size).nonzero()
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_masks_are_read_only_when_they_are_asked_for(tmp_path):
    assert read(tmp_path, [[1, 2, 3]], None, masks=False).packed_segmentations is None


def test_packed_masks_are_flat_arrays():
    polygons = [np.array([[1, 2], [3, 4], [5, 6]], np.float32), np.array([[7, 8]] * 4, np.float32)]
    masks = [
        Segmentation((4, 4), polygons),
        Segmentation((4, 4), [], b"abc"),
        Segmentation((4, 4), [polygons[1]]),
    ]
    packed = PackedSegmentations.pack(masks)
    for array in vars(packed).values():
        assert isinstance(array, np.ndarray) and array.dtype != object
    for row, mask in enumerate(masks):
        again = packed.get(row, (4, 4))
        assert again.counts == mask.counts and len(again.polygons) == len(mask.polygons)
        assert all((a == b).all() for a, b in zip(again.polygons, mask.polygons, strict=True))
    assert len(PackedSegmentations.pack([]).points) == 0


@pytest.mark.parametrize("size", [(80, 120), (23, 97), (40, 60), (7, 9)])
def test_polygons_are_scaled_and_then_drawn(size):
    polygons = [np.array(p, np.float32).reshape(-1, 2) for p in TWO_PARTS]
    scale = np.array([size[1] / WIDTH, size[0] / HEIGHT])
    objects = [(p * scale).ravel().tolist() for p in polygons]
    expected = oracle.decode(oracle.merge(oracle.frPyObjects(objects, *size)))
    assert (Segmentation((HEIGHT, WIDTH), polygons).draw(size) == expected).all()


@pytest.mark.parametrize("seed", range(20))
def test_polygons_beyond_the_border_are_cut_as_by_pycocotools(seed):
    generator = np.random.default_rng(seed)
    polygon = generator.uniform((-15, -15), (WIDTH + 15, HEIGHT + 15), (7, 2)).astype(np.float32)
    mask = Segmentation((HEIGHT, WIDTH), [polygon]).draw((HEIGHT, WIDTH))
    assert (mask == drawn_by_pycocotools([polygon.ravel()], HEIGHT, WIDTH)).all()


@pytest.mark.parametrize("size", [(80, 120), (24, 64), (20, 32), (3, 200)])
def test_run_lengths_are_resized_to_the_nearest_pixel(size):
    mask = Segmentation((HEIGHT, WIDTH), [], RLE["counts"].encode()).draw(size)
    expected = F.resize(torch.from_numpy(ring())[None].byte(), list(size), InterpolationMode.NEAREST_EXACT)
    assert (mask == expected[0].numpy()).all()


def test_a_polygon_and_its_run_lengths_are_nearly_the_same_at_any_size():
    polygons = [np.array(p, np.float32).reshape(-1, 2) for p in TRIANGLE]
    first = Segmentation((HEIGHT, WIDTH), polygons)
    second = Segmentation((HEIGHT, WIDTH), [], compressed(first.draw((HEIGHT, WIDTH))).encode())
    a, b = first.draw((120, 180)), second.draw((120, 180))
    assert (a & b).sum() / (a | b).sum() > 0.93


@pytest.mark.parametrize("seed", range(10))
def test_compressed_run_lengths_are_decoded(seed):
    generator = np.random.default_rng(seed)
    shape = generator.integers(1, 300, 2)
    mask = generator.random(shape) < generator.random() ** 3
    mask = np.repeat(mask, generator.integers(1, 200), axis=0)
    assert run_lengths(compressed(mask).encode()).tolist() == encode(mask)


def with_counts(counts, size=(HEIGHT, WIDTH)):
    return {"size": list(size), "counts": counts}


BAD = {
    "missing": (None, "no segmentation"),
    "empty list": ([], "no segmentation"),
    "a text": ("mask", "the segmentation 'mask'"),
    "odd coordinates": ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 coordinates"),
    "two points": ([[1, 2, 30, 40]], "a polygon of 2 points"),
    "one good polygon, one bad": ([*TRIANGLE, [1, 2]], "a polygon of 1 points"),
    "an empty polygon": ([[]], "a polygon of 0 points"),
    "a polygon of pairs": ([[[1, 2], [3, 4], [5, 6]]], "not a list of numbers"),
    "flat numbers": ([1, 2, 3, 4, 5, 6], "not a list of numbers"),
    "a text as coordinate": ([[1, 2, "3", 4, 5, 6]], "not a list of numbers"),
    "nan": ([[1, 2, float("nan"), 4, 5, 6]], "not finite or far outside"),
    "far away": ([[1, 2, 1e9, 4, 5, 6]], "not finite or far outside"),
    "a line": ([[5, 5, 20, 5, 12, 5]], "an empty mask"),
    "beside the image": ([[-9, 5, -2, 5, -2, 9]], "an empty mask"),
    "another size": (with_counts(RLE["counts"], (WIDTH, HEIGHT)), r"a mask of size \[60, 40\]"),
    "no size": ({"counts": RLE["counts"]}, "a mask of size None"),
    "no counts": ({"size": [HEIGHT, WIDTH]}, "without valid run lengths"),
    "runs too short": (with_counts([100, 100]), "do not fill its mask: 200 of 2400"),
    "runs too long": (with_counts([100, 2400]), "do not fill"),
    "negative runs": (with_counts([-100, 2500]), "negative run lengths"),
    "huge runs": (with_counts([2**70]), "beyond the size"),
    "fractions": (with_counts([100.0, 2300]), "without valid run lengths"),
    "no runs": (with_counts([]), "do not fill"),
    "empty runs": (with_counts([HEIGHT * WIDTH]), "an empty mask"),
    "torn text": (with_counts(RLE["counts"][:-1]), "run lengths"),
    "empty text": (with_counts(""), "not in COCO's compressed form"),
    "no run-length text": (with_counts("~~ü"), "not in COCO's compressed form"),
    "an endless number": (with_counts("o" * 40 + "1"), "beyond the size of any mask"),
    "an empty compressed mask": (with_counts(compressed(np.zeros((HEIGHT, WIDTH)))), "an empty mask"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_masks_are_named_in_one_line_or_left_out(name, tmp_path):
    segmentation, message = BAD[name]
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, RLE, segmentation, TRIANGLE)
    text = str(error.value)
    assert "\n" not in text and "instances.json: annotation 2 (image 7)" in text
    assert "--data.skip bad-mask" in text
    dataset = read(tmp_path, RLE, segmentation, TRIANGLE, skip=["bad-mask"])
    assert dataset.annotation_ids.tolist() == [1, 3]
    assert [len(s.polygons) for s in dataset.segmentations(0)] == [0, 1]
    assert len(dataset.report) == 1 and "skipped 1 annotations without a usable mask" in dataset.report[0]


@pytest.mark.parametrize("hflip", [0.0, 1.0])
@pytest.mark.parametrize("vflip", [0.0, 1.0])
def test_masks_follow_the_pixels(tiny_data, hflip, vflip):
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[ring()] = 255
    config = dataclasses.replace(tiny_data, short_sides=(80,), max_size=200, hflip=hflip, vflip=vflip)
    polygons = [np.array(p, np.float32).reshape(-1, 2) for p in TRIANGLE]
    masks = [
        Segmentation((HEIGHT, WIDTH), [], RLE["counts"].encode()),
        Segmentation((HEIGHT, WIDTH), polygons),
    ]
    boxes = np.array([BOX, BOX], np.float32)
    picture, _, drawn, _ = augment(image, boxes, config, np.random.default_rng(0), masks)
    assert drawn.shape == (2, 80, 120) and drawn.dtype == bool
    bright = picture[0].numpy() > 127
    assert (bright & drawn[0]).sum() / (bright | drawn[0]).sum() > 0.97
    expected = oracle.decode(
        oracle.merge(oracle.frPyObjects([(p * 2).ravel().tolist() for p in polygons], 80, 120))
    )
    expected = np.flipud(expected) if vflip else expected
    assert (drawn[1] == (np.fliplr(expected) if hflip else expected)).all()


def test_bits_come_back_in_their_slots():
    generator = np.random.default_rng(0)
    masks = [generator.random(shape) < 0.4 for shape in ((2, 5, 11), (0, 7, 8), (3, 6, 13))]
    packed = pad_masks([pack_masks(m) for m in masks], 4, 9, 14)
    assert packed.bits.shape == (5, 9, 2) and packed.slots.tolist() == [0, 1, 8, 9, 10]
    expected = torch.zeros(3, 4, 9, 14, dtype=torch.bool)
    for i, m in enumerate(masks):
        expected[i, : m.shape[0], : m.shape[1], : m.shape[2]] = torch.from_numpy(m)
    assert torch.equal(packed.unpack(3, 4, 14), expected)
    nothing = pad_masks([pack_masks(np.zeros((0, 5, 5), bool))], 8, 9, 14).unpack(1, 8, 14)
    assert nothing.shape == (1, 8, 9, 14) and not nothing.any()


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_carry_masks(tiny_data, workers):
    config = dataclasses.replace(tiny_data, masks=True, hflip=0.5, vflip=0.5, workers=workers)
    dataset = load_split(config, "train")
    for batch in train_loader(dataset, config, seed=0, start_step=0, num_steps=3):
        assert batch.targets.masks is None
        moved = batch.to("cpu")
        masks, valid = moved.targets.masks, moved.targets.valid
        assert masks.shape == (*valid.shape, *batch.images.tensor.shape[-2:]) and masks.dtype == torch.bool
        assert moved.masks is None and not masks[~valid].any()
        for mask, box in zip(masks[valid], moved.targets.boxes[valid], strict=True):
            y, x = mask.nonzero().T
            around = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
            assert (around - box).abs().max() <= 3  # nearest pixels lose thin tips
    plain = next(iter(train_loader(dataset, config, seed=0, start_step=0, num_steps=1)))
    assert plain.to("meta").targets.masks.is_meta
    assert next(iter(eval_loader(dataset, config, batch_size=2))).masks is None


def test_crowd_regions_are_no_target_masks(tmp_path, tiny_data):
    dataset = read(tmp_path, RUNS, TRIANGLE, TWO_PARTS)
    dataset = dataclasses.replace(dataset, packed_crowd=np.array([True, False, False]))
    config = dataclasses.replace(tiny_data, batch_size=1, short_sides=(40,), hflip=0.0, masks=True)
    batch = next(iter(train_loader(dataset, config, seed=0, start_step=0, num_steps=1))).to("cpu")
    assert batch.targets.valid.sum() == 2
    expected = drawn_by_pycocotools(TRIANGLE, HEIGHT, WIDTH)
    assert (batch.targets.masks[0, 0, :HEIGHT, :WIDTH].numpy() == expected).all()


def test_real_polygons_and_crowds_agree_with_pycocotools(shared_data):
    coco = pytest.importorskip("pycocotools.coco")
    root = shared_data / "coco_mini"
    path = root / "annotations/instances_val.json"
    api = coco.COCO(path)
    dataset = read_coco(path, root / "images", masks=True)
    assert dataset.packed_crowd.sum() == 7
    differing = pixels = 0
    for i in range(len(dataset)):
        size = int(dataset.heights[i]), int(dataset.widths[i])
        for segmentation, annotation in zip(
            dataset.segmentations(i), api.loadAnns(api.getAnnIds(int(dataset.image_ids[i]))), strict=True
        ):
            mask = api.annToMask(annotation).astype(bool)
            differing += (segmentation.draw(size) != mask).sum()
            pixels += mask.sum()
    # Coordinates in single precision: vertices of a fifth of a pixel may round the other way.
    assert differing < 3e-4 * pixels


def test_a_dense_data_set_loads_whole(shared_data):
    root = shared_data / "dsb2018"
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    for split, images, objects in (("train", 533, 23137), ("val", 68, 3277), ("test", 63, 2572)):
        dataset = read_coco(root / f"annotations/instances_{split}.json", root / "images", masks=True)
        assert len(dataset) == images and len(dataset.annotation_ids) == objects
        for i in range(0, len(dataset), 25):
            size = int(dataset.heights[i]), int(dataset.widths[i])
            for box, segmentation in zip(dataset.boxes(i), dataset.segmentations(i), strict=True):
                rows, columns = segmentation.draw(size).nonzero()
                assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
