"""The ``mmdet`` preset and the matching agree with recorded outputs of MMDetection 3.3.0."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from drcnn.dynamics import Assignment, DynamicTraining, DynamicTrainingConfig
from drcnn.dynamics.training import batch_statistics
from drcnn.ops import assign_targets, match_boxes

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@pytest.fixture(scope="module")
def golden(shared_data):
    folder = shared_data.parent / "golden"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    spec = importlib.util.spec_from_file_location("det_inputs", folder / "det_inputs.py")
    inputs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(inputs)
    return folder, inputs


def assignment(inputs, threshold: float) -> Assignment:
    gt_boxes = torch.stack([torch.from_numpy(inputs.gt_boxes(i)) for i in range(2)])
    gt_labels = torch.stack([torch.from_numpy(inputs.gt_labels(i)) for i in range(2)])
    proposals = torch.stack([torch.from_numpy(inputs.proposals(i)) for i in range(2)])
    boxes = torch.cat([gt_boxes, proposals], dim=1)
    gt_valid = torch.ones(2, 5, dtype=torch.bool)
    match = match_boxes(boxes, gt_boxes, gt_valid)
    labels, deltas = assign_targets(
        match.max_iou, match.gt_index, boxes, gt_boxes, gt_labels, threshold, WEIGHTS, 80
    )
    everything = torch.ones_like(labels, dtype=torch.bool)
    is_gt = torch.arange(boxes.shape[1]).lt(5).expand_as(labels)
    error = deltas[..., :2].abs().mean(-1)
    return Assignment(
        boxes, gt_boxes, gt_valid, match.max_iou, error, everything, is_gt, labels < 80, everything
    )


@pytest.mark.parametrize("threshold", [0.4, 0.5, 0.6])
def test_statistics(golden, threshold):
    folder, inputs = golden
    recorded = json.loads((folder / "ops.json").read_text())
    batch = assignment(inputs, threshold)
    iou, valid, error, _ = batch_statistics(batch, DynamicTrainingConfig.mmdet())
    assert valid.all()
    assert iou.mean().item() == pytest.approx(recorded["batch.iou_top75_mean_with_gts"], abs=1e-6)
    assert error.item() == pytest.approx(recorded[f"batch.beta_kth20_thr{threshold}_with_gts"], abs=1e-6)
    assert batch.positive.sum().item() == recorded[f"batch.num_pos_thr{threshold}_with_gts"]
    plain = replace(DynamicTrainingConfig.mmdet(), count_ground_truths=False)
    iou, _, error, _ = batch_statistics(batch, plain)
    expected = [recorded[f"match{i}.iou_top75_without_gts"] for i in range(2)]
    assert iou.tolist() == pytest.approx(expected, abs=1e-6)
    assert error.item() == pytest.approx(recorded[f"batch.beta_kth20_thr{threshold}_without_gts"], abs=1e-6)


def test_matches_and_targets(golden):
    folder, inputs = golden
    recorded = np.load(folder / "ops.npz")
    for i in range(2):
        boxes = torch.from_numpy(inputs.proposals(i))[None]
        gt_boxes = torch.from_numpy(inputs.gt_boxes(i))[None]
        gt_labels = torch.from_numpy(inputs.gt_labels(i))[None]
        match = match_boxes(boxes, gt_boxes)
        np.testing.assert_allclose(match.max_iou[0], recorded[f"match{i}.max_iou"], atol=1e-6)
        np.testing.assert_array_equal(match.gt_index[0], recorded[f"match{i}.gt_index"])
        for threshold in (40, 50, 60):
            labels, deltas = assign_targets(
                match.max_iou, match.gt_index, boxes, gt_boxes, gt_labels, threshold / 100, WEIGHTS, 80
            )
            positive = recorded[f"match{i}.t{threshold}.gt_inds"] > 0
            np.testing.assert_array_equal(labels[0] < 80, positive)
            np.testing.assert_array_equal(
                labels[0][positive], recorded[f"match{i}.t{threshold}.labels"][positive]
            )
        np.testing.assert_allclose(deltas[0], recorded[f"match{i}.targets"], atol=2e-4, rtol=1e-4)


def test_sequence_of_thresholds(golden):
    folder, inputs = golden
    recorded = json.loads((folder / "dynamic_rcnn.json").read_text())["update_sequence"]
    policy = DynamicTraining(replace(DynamicTrainingConfig.mmdet(), iou_threshold=0.4))
    for window, expected in zip(inputs.history_windows(), recorded, strict=True):
        ious, betas = window["iou"], window["beta"]
        for step in range(100):
            beta = betas[step] if step < len(betas) else None
            policy.sums.copy_(torch.tensor([ious[step], 1, beta or 0, beta is not None]))
            policy.update()
        assert [policy.iou_threshold.item(), policy.beta.item()] == pytest.approx(expected, abs=1e-6)
