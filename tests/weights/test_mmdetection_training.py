"""Training of Dynamic R-CNN from a converted checkpoint agrees with what MMDetection 3.3.0 recorded."""

from dataclasses import replace

import pytest
import torch

from drcnn.dynamics import Assignment, DynamicTrainingConfig, ScaleTraining, regression_error
from drcnn.dynamics.training import batch_statistics
from drcnn.models.roi_heads import Samples
from drcnn.ops import assign_targets, match_boxes
from drcnn.structures import ImageBatch, Targets
from drcnn.weights import Weights, load_weights, recognise

EVERYTHING = 1005
"""Proposals of an image, ground truths among them: nothing is random when all are sampled."""
CASES = [f"thr{t}_beta{b}" for t in ("0.4", "0.5", "0.6") for b in ("0.05", "1.0")]


@pytest.fixture(scope="module")
def case(golden):
    """The model, its features of both images, proposals and targets."""
    checkpoint = golden.checkpoint("dynamic_rcnn")
    found = recognise(Weights(checkpoint["state_dict"], {"meta": checkpoint["meta"]}))
    assert found.config.training == DynamicTrainingConfig.mmdet() and found.config.rpn.nms == 0.85
    head = replace(found.config.box_head, samples=EVERYTHING, positive_fraction=1.0)
    model = replace(found.config, box_head=head).build().eval()
    assert load_weights(model, checkpoint["state_dict"]).complete
    with torch.no_grad():
        features = model.fpn(model.backbone(model.normalize(golden.batch(2))))[:-1]
    inputs = golden.inputs
    proposals, boxes, labels = (
        torch.stack([torch.from_numpy(make(i)) for i in range(2)])
        for make in (inputs.proposals, inputs.gt_boxes, inputs.gt_labels)
    )
    return model, features, proposals, Targets(boxes, labels, torch.ones_like(labels, dtype=torch.bool))


def policy(case_name: str):
    """A policy at the threshold and beta that a case's name says."""
    threshold, beta = (float(part[3:] if part[0] == "t" else part[4:]) for part in case_name.split("_")[:2])
    made = DynamicTrainingConfig.mmdet().build().train()
    made.iou_threshold.fill_(threshold)
    made.beta.fill_(beta)
    return made


def losses(case, name: str, valid: list[bool]):
    model, features, proposals, targets = case
    targets = targets._replace(valid=torch.tensor(valid).unsqueeze(1).expand(2, 5))
    dynamics = policy(name)
    present = torch.ones(proposals.shape[:2], dtype=torch.bool)
    model.zero_grad()
    images = ImageBatch(torch.empty(0), torch.empty(0))
    found, _ = model.box_head.losses(features, proposals, present, images, targets, dynamics, ScaleTraining())
    return found, dynamics.sums


def check(found, sums, recorded) -> None:
    assert found["loss_classification"].item() == pytest.approx(recorded["losses"]["loss_cls"], rel=1e-5)
    assert found["loss_box"].item() == pytest.approx(recorded["losses"]["loss_bbox"], rel=1e-5)
    iou, ious, beta, betas = sums.tolist()
    assert iou / ious == pytest.approx(recorded["iou"][0], abs=1e-6)
    assert ([beta / betas] if betas else []) == pytest.approx(recorded["beta"], abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_losses_statistics_and_gradients(case, golden, name):
    recorded = golden.losses("dynamic_rcnn")["roi_fixed"][name]
    found, sums = losses(case, name, [True, True])
    check(found, sums, recorded)
    sum(found.values()).backward()
    head = case[0].box_head
    for theirs, ours in {
        "fc_cls": head.classifier,
        "fc_reg": head.deltas,
        "shared_fcs.0": head.fc1,
        "shared_fcs.1": head.fc2,
    }.items():
        for kind in ("weight", "bias"):
            norm = recorded["grad_norm"][f"roi_head.bbox_head.{theirs}.{kind}"]
            assert getattr(ours, kind).grad.double().norm().item() == pytest.approx(norm, rel=1e-4), (
                theirs,
                kind,
            )


@pytest.mark.parametrize(("kind", "valid"), [("img1_no_gt", [True, False]), ("no_gt_at_all", [False, False])])
def test_images_without_ground_truths(case, golden, kind, valid):
    name = f"thr0.6_beta0.05_{kind}"
    found, sums = losses(case, name, valid)
    check(found, sums, golden.losses("dynamic_rcnn")["roi_fixed"][name])


@torch.no_grad()
def test_what_the_default_sampler_drew(case, golden):
    """Losses and statistics of the 512 proposals of an image that MMDetection's sampler chose."""
    model, features, proposals, targets = case
    values = golden.losses("dynamic_rcnn")["roi_sampled_thr0.5_beta1.0"]
    recorded = golden.recorded("dynamic_rcnn")
    boxes = torch.cat([targets.boxes, proposals], dim=1)
    match = match_boxes(boxes, targets.boxes, targets.valid)
    weights = model.box_head.config.delta_weights
    labels, deltas = assign_targets(
        match.max_iou, match.gt_index, boxes, targets.boxes, targets.labels, 0.5, weights, background=80
    )
    index = torch.stack(
        [
            torch.cat(
                [torch.from_numpy(recorded[f"sampled{i}.{kind}_inds"]).long() for kind in ("pos", "neg")]
            )
            for i in range(2)
        ]
    )
    rows = index.unsqueeze(-1).expand(-1, -1, 4)
    everything = torch.ones_like(index, dtype=torch.bool)
    samples = Samples(
        boxes.gather(1, rows),
        labels.gather(1, index),
        deltas.gather(1, rows),
        gt_index=index,
        area=index,
        is_gt=~everything,
        valid=everything,
        max_positive=model.box_head.config.samples // 4,
    )
    found, _ = model.box_head.sampled_losses(features, samples, policy("thr0.5_beta1.0"), ScaleTraining())
    assert found["loss_classification"].item() == pytest.approx(values["losses"]["loss_cls"], rel=1e-5)
    assert found["loss_box"].item() == pytest.approx(values["losses"]["loss_bbox"], rel=1e-5)
    all_valid = torch.ones_like(labels, dtype=torch.bool)
    assignment = Assignment(
        boxes,
        targets.boxes,
        targets.valid,
        match.max_iou,
        regression_error(deltas),
        all_valid,
        torch.arange(EVERYTHING).lt(5).expand_as(labels),
        labels < 80,
        torch.zeros_like(all_valid).scatter(1, index, True),
    )
    iou, _, error, _ = batch_statistics(assignment, DynamicTrainingConfig.mmdet())
    assert iou.mean().item() == pytest.approx(values["iou"][0], abs=1e-6)
    assert error.item() == pytest.approx(values["beta"][0], abs=1e-6)
