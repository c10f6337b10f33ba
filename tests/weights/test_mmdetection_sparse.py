"""Sparse R-CNN: a converted checkpoint agrees, stage by stage, with what MMDetection 3.3.0 recorded."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from drcnn.dynamics import HungarianConfig, LearnedProposalsConfig, ScaleTraining
from drcnn.dynamics.assignment import matching_cost
from drcnn.models import SparseHeadConfig, SparseRCNNConfig
from drcnn.models.sparse import to_pixels
from drcnn.models.sparse_head import StageOutput
from drcnn.structures import Targets
from drcnn.weights import Weights, load_weights, recognise
from drcnn.weights.mmdetection import convert

STAGES = range(6)
LOSSES = {"classification": "cls", "l1": "bbox", "giou": "iou"}
"""Losses by our names and by theirs."""


@pytest.fixture(scope="module")
def model(golden):
    """Our model with the weights that the outputs were recorded with."""
    checkpoint = golden.checkpoint("sparse_rcnn")
    found = recognise(Weights(checkpoint["state_dict"], {"meta": checkpoint["meta"]}))
    assert found.system == "MMDetection" and not found.reshaped and not found.notes
    assert found.config == SparseRCNNConfig(proposals=LearnedProposalsConfig(100))
    model = found.config.build()
    report = load_weights(model, checkpoint["state_dict"])
    assert report.complete and not report.settings
    return model


@pytest.fixture(scope="module")
def recorded(golden):
    return golden.recorded("sparse_rcnn")


def targets_of(golden) -> Targets:
    boxes, labels = (
        torch.stack([torch.from_numpy(make(i)) for i in range(2)])
        for make in (golden.inputs.gt_boxes, golden.inputs.gt_labels)
    )
    return Targets(boxes, labels, torch.ones_like(labels, dtype=torch.bool))


def predictions(golden) -> StageOutput:
    """Given class logits and boxes of both images, as if a stage had predicted them."""
    boxes, logits = (
        torch.stack([torch.from_numpy(golden.inputs.sparse_preds(i)[part]) for i in range(2)])
        for part in (0, 1)
    )
    return StageOutput(logits.requires_grad_(), boxes.requires_grad_(), torch.zeros(2, 100, 1))


def assert_same(found: Tensor, recorded, name: str) -> None:
    """The recorded shape, mean, deviation, extremes, and values at 64 places."""
    assert list(found.shape) == list(recorded[f"{name}.shape"]), name
    flat, stats = found.double().flatten(), recorded[f"{name}.stats"]
    index = np.linspace(0, len(flat) - 1, 64).astype(np.int64)
    near = {"rtol": 0, "atol": 2e-5 * np.abs(stats[2:]).max(), "err_msg": name}
    np.testing.assert_allclose(flat[index], recorded[f"{name}.sample"], **near)
    np.testing.assert_allclose([flat.mean(), flat.std(correction=0), flat.min(), flat.max()], stats, **near)


@torch.no_grad()
def test_every_stage(model, golden, recorded):
    outputs = model.eval().stages(golden.batch(1))
    assert len(outputs) == len(STAGES)
    for s, output in enumerate(outputs):
        assert_same(output.logits, recorded, f"stage{s}.cls_score")
        assert_same(output.objects, recorded, f"stage{s}.object_feats")
        # Of the boxes, the first is recorded.
        np.testing.assert_allclose(output.boxes[0, 0], recorded[f"stage{s}.boxes"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(outputs[-1].logits[0], recorded["last.cls_score"], rtol=0, atol=1e-4)


@torch.no_grad()
def test_boxes_of_the_first_and_the_last_stage(model, golden, recorded):
    batch = golden.batch(1)
    boxes, features = model.proposals([batch.tensor])
    assert features.shape == (1, 100, 256)
    np.testing.assert_allclose(to_pixels(boxes, batch.sizes)[0], recorded["rpn.boxes"], rtol=0, atol=1e-4)
    # Theirs of the last stage are those of the detections, not clipped to the image.
    theirs = torch.from_numpy(recorded["det0.boxes"])
    ours = model.eval().stages(batch)[-1].boxes[0]
    assert theirs.min() < 0 and (torch.cdist(theirs, ours, p=torch.inf).amin(dim=1) < 5e-3).all()


def test_losses_and_gradients(model, golden):
    values = golden.losses("sparse_rcnn")
    model.train().zero_grad()
    losses = model(golden.batch(2), targets_of(golden))
    assert len(losses) == 3 * len(STAGES)
    for s in STAGES:
        for ours, theirs in LOSSES.items():
            expected = values["loss_full"][f"s{s}.loss_{theirs}"]
            assert losses[f"loss_{ours}_{s}"].item() == pytest.approx(expected, rel=1e-5), (s, ours)
    sum(losses.values()).backward()
    theirs = golden.state_dict("sparse_rcnn")
    ours = {id(tensor): name for name, tensor in convert(Weights(theirs, {})).tensors.items()}
    weights, compared = dict(model.named_parameters()), 0
    for name, norm in values["loss_full_grad_norm"].items():
        weight = weights.get(ours[id(theirs[name])])
        if weight is not None:  # frozen batch norm has no parameters
            # Two runs of theirs differ by 1.1e-3.
            assert weight.grad.norm().item() == pytest.approx(norm, rel=2e-3, abs=1e-6), name
            compared += 1
    assert compared == sum(weight.requires_grad for weight in weights.values())


def test_costs_and_assignment(golden):
    given, targets = predictions(golden), targets_of(golden)
    sizes = golden.batch(2).sizes
    config, ops = HungarianConfig(), np.load(golden.folder / "ops.npz")
    costs = {
        "cost_cls": replace(config, l1_weight=0, giou_weight=0),
        "cost_l1": replace(config, class_weight=0, giou_weight=0),
        "cost_giou": replace(config, class_weight=0, l1_weight=0),
        "cost": config,
    }
    for name, part in costs.items():
        cost = matching_cost(given.logits, given.boxes, targets, sizes, part).detach()
        for i in range(2):
            np.testing.assert_allclose(cost[i], ops[f"sparse{i}.{name}"], rtol=0, atol=1e-5, err_msg=name)
    gt_index = config.build(1)(given.logits, given.boxes, targets, sizes, 0)
    for i in range(2):
        np.testing.assert_array_equal(gt_index[i] + 1, ops[f"sparse{i}.gt_inds"])


def test_losses_of_given_predictions(golden):
    given, batch = predictions(golden), golden.batch(2)
    head = SparseHeadConfig(stages=1).build(16, (4, 8, 16, 32), num_classes=80)
    losses = head.losses([given], batch, targets_of(golden), HungarianConfig().build(1), ScaleTraining())
    values, ops = (
        json.loads((golden.folder / "ops.json").read_text()),
        np.load(golden.folder / "ops.npz"),
    )
    recorded = {"classification": "focal", "l1": "l1", "giou": "giou"}
    for ours, theirs in recorded.items():
        assert losses[f"loss_{ours}_0"].item() == pytest.approx(values[f"sparse.loss_{theirs}"], rel=1e-5)
    for name in ("l1", "giou"):
        (gradient,) = torch.autograd.grad(losses[f"loss_{name}_0"], given.boxes, retain_graph=True)
        positive = gradient.any(dim=-1)
        np.testing.assert_allclose(gradient[positive], ops[f"sparse.{name}_grad"], rtol=1e-4, atol=1e-8)
    (gradient,) = torch.autograd.grad(losses["loss_classification_0"], given.logits)
    assert_same(gradient.flatten(0, 1), ops, "sparse.focal_grad")
