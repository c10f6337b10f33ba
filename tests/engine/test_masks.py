"""Masks in whole images: pasting, run lengths, evaluation, predictions and pictures."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from pycocotools import mask as oracle
from torch import nn
from torch.nn import functional as F

from drcnn.data import eval_loader, load_split
from drcnn.engine import masks as masks_module
from drcnn.engine.drawing import class_color, draw_boxes
from drcnn.engine.evaluator import evaluate, evaluate_results
from drcnn.engine.masks import encode_masks, masks_to_rle, paste_masks
from drcnn.engine.metrics import Metrics
from drcnn.engine.predictor import Predictor
from drcnn.errors import DataError
from drcnn.structures import Detections

BOXES = torch.tensor(
    [
        [3.2, 4.7, 30.1, 25.3],
        [0.0, 0.0, 40.0, 32.0],
        [-6.5, 10.0, 12.3, 50.0],
        [20.1, 5.5, 20.9, 6.2],  # less than a pixel
        [7.0, 7.0, 7.0, 20.0],  # no width
        [100.0, 100.0, 120.0, 130.0],  # beside the image
    ]
)


def by_formula(cells, box, size):
    """Bilinear interpolation between the centres of the cells, a pixel at a time."""
    (x1, y1, x2, y2), side = box.tolist(), len(cells)
    result = np.zeros(size)
    for row in range(size[0]):
        for column in range(size[1]):
            u = (column + 0.5 - x1) / max(x2 - x1, 1e-6) * side - 0.5
            v = (row + 0.5 - y1) / max(y2 - y1, 1e-6) * side - 0.5
            left, top = math.floor(u), math.floor(v)
            for i, wy in ((top, 1 - (v - top)), (top + 1, v - top)):
                for j, wx in ((left, 1 - (u - left)), (left + 1, u - left)):
                    if 0 <= i < side and 0 <= j < side:
                        result[row, column] += wy * wx * cells[i, j].item()
    return result


@pytest.mark.parametrize("threshold", [0.5, 0.2])
@pytest.mark.parametrize("budget", [1, 3 * 32 * 40, 2**25])
def test_pasting_equals_the_formula(monkeypatch, budget, threshold):
    monkeypatch.setattr(masks_module, "MAX_PIXELS", budget)
    cells = torch.rand(len(BOXES), 7, 7)
    pasted = paste_masks(cells, BOXES, (32, 40), threshold)
    assert pasted.shape == (len(BOXES), 32, 40) and pasted.dtype == torch.bool
    for mask, one, box in zip(pasted, cells, BOXES, strict=True):
        expected = by_formula(one, box, (32, 40))
        clear = np.abs(expected - threshold) > 1e-5
        assert clear.mean() > 0.99
        assert (mask.numpy() == (expected >= threshold))[clear].all()
    assert pasted[0].any() and not pasted[4:].any()


def test_pasting_equals_grid_sample():
    cells, size = torch.rand(4, 28, 28), (64, 90)
    boxes = torch.tensor([[5.5, 3.25, 70.0, 50.0], [0, 0, 90, 64], [-10, -20, 45, 33.3], [40, 30, 47, 39.0]])
    y, x = (torch.arange(n) + 0.5 for n in size)
    u = (x - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    v = (y - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    grid = torch.stack([u[:, None].expand(-1, size[0], -1), v[:, :, None].expand(-1, -1, size[1])], dim=-1)
    sampled = F.grid_sample(cells[:, None], grid, align_corners=False)[:, 0]
    clear = (sampled - 0.5).abs() > 1e-5
    assert torch.equal(paste_masks(cells, boxes, size)[clear], (sampled >= 0.5)[clear])


@pytest.mark.gpu
def test_pasting_on_a_gpu_equals_that_on_a_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    cells, boxes = torch.rand(50, 28, 28), torch.rand(50, 4) * 100
    boxes[:, 2:] += boxes[:, :2]
    expected = paste_masks(cells, boxes, (180, 200))
    assert (paste_masks(cells.cuda(), boxes.cuda(), (180, 200)).cpu() != expected).float().mean() < 1e-5
    on_gpu = masks_to_rle(cells.cuda(), boxes.cuda(), (180, 200))
    assert [r["size"] for r in on_gpu] == [[180, 200]] * 50


def test_no_masks():
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (5, 6)).shape == (0, 5, 6)
    assert masks_to_rle(torch.zeros(0, 28, 28), torch.zeros(0, 4), (5, 6)) == []


def test_run_lengths_are_those_of_pycocotools(monkeypatch):
    monkeypatch.setattr(masks_module, "MAX_PIXELS", 2 * 32 * 40)
    cells = torch.rand(len(BOXES), 28, 28)
    records = masks_to_rle(cells, BOXES, (32, 40))
    pasted = paste_masks(cells, BOXES, (32, 40))
    assert encode_masks(pasted) == records and json.loads(json.dumps(records)) == records
    for record, mask in zip(records, pasted.numpy(), strict=True):
        expected = oracle.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert record == {"size": [32, 40], "counts": expected["counts"].decode()}
        assert (oracle.decode(record) == mask).all()


class Knows(nn.Module):
    """A detector that has seen the answers: it recognises an image by the sum of its pixels."""

    def __init__(self, dataset, data_config, side=56):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answers = {}
        for batch in eval_loader(dataset, data_config, batch_size=1):
            index, key = int(batch.indices[0]), int(batch.images.tensor.long().sum())
            size = int(dataset.heights[index]), int(dataset.widths[index])
            cells = torch.zeros(1, batch.targets.boxes.shape[1], side, side)
            for i, (s, box) in enumerate(
                zip(dataset.segmentations(index), dataset.boxes(index), strict=True)
            ):
                x1, y1, x2, y2 = box.astype(int)
                part = torch.from_numpy(s.draw(size)[y1:y2, x1:x2])[None, None].float()
                cells[0, i] = F.interpolate(part, (side, side), mode="bilinear")[0, 0]
            self.answers[key] = batch.targets, cells

    def forward(self, images):
        targets, cells = self.answers[int(images.tensor.long().sum())]
        scores = torch.where(targets.valid, 0.9, 0.0)
        return Detections(targets.boxes, scores, targets.labels, targets.valid, cells)


@pytest.fixture
def mask_data(tiny_data):
    return dataclasses.replace(tiny_data, masks=True)


def test_a_detector_that_knows_the_masks_scores_nearly_one(mask_data):
    dataset = load_split(mask_data, "val")
    metrics, results = evaluate(Knows(dataset, mask_data), dataset, mask_data, device="cpu")
    assert metrics.summary["AP"] == pytest.approx(1.0)
    assert metrics.segm.iou_type == "segm" and metrics.segm.num_detections == len(results)
    assert metrics.segm.summary["AP"] > 0.97 and metrics.segm.summary["AP75"] == pytest.approx(1.0)
    assert json.loads(json.dumps(results)) == results and "segmentation" in results[0]
    again = evaluate_results(dataset.annotation_file, results, iou_type="segm")
    assert again.summary == metrics.segm.summary
    # With all masks filled to their boxes only the squares are right.
    filled = Knows(dataset, mask_data)
    filled.answers = {k: (t, torch.ones_like(c)) for k, (t, c) in filled.answers.items()}
    wrong, _ = evaluate(filled, dataset, mask_data, device="cpu")
    assert wrong.summary["AP"] == pytest.approx(1.0) and wrong.segm.summary["AP75"] < 0.7


def test_masks_are_scored_only_where_both_sides_have_them(mask_data, tiny_data):
    dataset = load_split(mask_data, "val")
    model = Knows(dataset, mask_data)
    assert evaluate(model, load_split(tiny_data, "val"), tiny_data, device="cpu")[0].segm is None
    model.answers = {k: (t, None) for k, (t, _) in model.answers.items()}
    metrics, results = evaluate(model, dataset, mask_data, device="cpu")
    assert metrics.segm is None and "segmentation" not in results[0]


def test_numbers_of_boxes_and_masks_travel_together():
    numbers = {k: 0.1 for k in ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90")}
    numbers |= {k: 0.1 for k in ("APs", "APm", "APl", "ARs", "ARm", "ARl", "AR1", "AR10", "AR100")}
    boxes = Metrics(numbers, {"cat": 0.1}, "bbox", 3, 4)
    both = dataclasses.replace(boxes, segm=Metrics({**numbers, "AP": 0.7}, {"cat": 0.7}, "segm", 3, 4))
    assert boxes.selection_ap == 0.1 and both.selection_ap == 0.7
    assert "segm" not in boxes.to_dict()
    assert {k: v for k, v in both.to_dict().items() if k != "segm"} == boxes.to_dict()
    for metrics in (boxes, both):
        assert Metrics.from_dict(json.loads(metrics.to_json())) == metrics
    assert boxes.flat() == numbers and both.flat() == numbers | {
        f"segm_{k}": v for k, v in both.segm.summary.items()
    }
    assert "segm" not in boxes.headline() and "segm AP 0.700" in both.headline()


def test_annotations_without_masks_cannot_score_masks(tiny_coco):
    content = json.loads((tiny_coco / "annotations/instances_val.json").read_text())
    del content["annotations"][2]["segmentation"]
    with pytest.raises(DataError, match=r"annotation 3 .*segmentation") as error:
        evaluate_results(content, [], iou_type="segm")
    assert "\n" not in str(error.value)
    assert evaluate_results(content, []).summary["AP"] == 0


def test_predictions_hold_masks_of_the_original_image(mask_data):
    dataset = load_split(mask_data, "val")
    predictor = Predictor.from_model(Knows(dataset, mask_data), mask_data, dataset.categories)
    for index in range(len(dataset)):
        image = dataset.load(index)
        result = predictor(image)
        assert result.masks.shape == (len(result), *image.shape[:2]) and result.masks.dtype == torch.bool
        for mask, segmentation in zip(result.masks.numpy(), dataset.segmentations(index), strict=True):
            truth = segmentation.draw(image.shape[:2])
            assert (mask & truth).sum() / (mask | truth).sum() > 0.9
        for record, mask in zip(result.to_coco(5), result.masks.numpy(), strict=True):
            assert (oracle.decode(record["segmentation"]) == mask).all()
    none = predictor(image, score_threshold=0.95)
    assert none.masks.shape == (0, *image.shape[:2]) and none.to_coco(5) == []
    assert none.draw().size == result.draw().size


def test_masks_are_drawn_translucently():
    image = np.full((500, 600, 3), 128, np.uint8)
    mask = np.zeros((500, 600), bool)
    mask[100:200, 300:400] = True
    plain = np.asarray(draw_boxes(image, np.array([[250, 80, 450, 300]]), [3], ["cat"])).astype(int)
    tinted = np.asarray(draw_boxes(image, np.array([[250, 80, 450, 300]]), [3], ["cat"], mask[None])).astype(
        int
    )
    assert (image == 128).all()
    assert (tinted[~mask] == plain[~mask]).all()
    inside = tinted[105:195, 305:395].reshape(-1, 3)
    assert (inside == inside[0]).all()
    low, high = np.minimum(128, class_color(3)), np.maximum(128, class_color(3))
    assert (low < inside[0]).all() and (inside[0] < high).all()
