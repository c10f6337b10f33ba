"""Sparse and Dynamic Sparse R-CNN: one graph, images without objects, learning, detections, sizes."""

import copy
from dataclasses import replace

import pytest
import torch

from drcnn.dynamics import (
    DynamicProposalsConfig,
    HungarianConfig,
    LearnedProposalsConfig,
    OptimalTransportConfig,
)
from drcnn.errors import ConfigError
from drcnn.models import FPNConfig, ResNetConfig, SparseHeadConfig, SparseRCNNConfig
from drcnn.models.sparse import to_pixels
from drcnn.models.sparse_head import StageOutput
from drcnn.structures import ImageBatch, Targets

LIGHT = SparseRCNNConfig(
    num_classes=3,
    backbone=ResNetConfig("resnet18", norm="gn", frozen_stages=0),
    fpn=FPNConfig(channels=32, top="none"),
    proposals=LearnedProposalsConfig(20),
    head=SparseHeadConfig(stages=3, heads=4, dynamic_channels=16, ffn_channels=64),
)
DYNAMIC = replace(
    LIGHT,
    proposals=DynamicProposalsConfig(20, experts=2, anneal_iterations=10, grid=4, hidden=16),
    assignment=OptimalTransportConfig(),
)
BOTH = pytest.mark.parametrize("config", [LIGHT, DYNAMIC], ids=["sparse", "dynamic"])
STAGES = range(3)


def batch(objects: tuple[int, ...] = (1, 3), slots: int = 5) -> tuple[ImageBatch, Targets]:
    """Images of noise with a bright rectangle, of one colour by class, for each object."""
    generator = torch.Generator().manual_seed(7)
    count = len(objects)
    images = torch.randint(0, 60, (count, 3, 64, 96), generator=generator)
    corner = (torch.rand(count, slots, 2, generator=generator) * 30).round()
    size = (15 + torch.rand(count, slots, 2, generator=generator) * 20).round()
    valid = torch.arange(slots) < torch.tensor(objects).unsqueeze(1)
    boxes = torch.cat([corner, corner + size], dim=-1) * valid.unsqueeze(-1)
    labels = torch.randint(0, 3, (count, slots), generator=generator) * valid
    for i, number in enumerate(objects):
        for (x1, y1, x2, y2), label in zip(boxes[i, :number].int(), labels[i, :number], strict=True):
            images[i, label, y1:y2, x1:x2] = 220
    sizes = torch.tensor([[64, 96], [60, 80]] * count)[:count]
    return ImageBatch(images.to(torch.uint8), sizes), Targets(boxes, labels, valid)


def build(config: SparseRCNNConfig = LIGHT) -> torch.nn.Module:
    torch.manual_seed(0)
    return config.build().train()


@BOTH
def test_training_forward_and_backward_trace_as_one_graph(config):
    torch.compiler.reset()
    model, inputs = build(config), batch()
    expected = model(*inputs)
    weights = [model.head.stages[0].interaction.dynamic.weight, model.proposals.boxes]
    gradients = torch.autograd.grad(sum(expected.values()), weights)
    losses = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    assert losses.keys() == expected.keys()
    for name in losses:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-4, atol=1e-6)
    sum(losses.values()).backward()
    for weight, gradient in zip(weights, gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())
        assert gradient.abs().sum() > 0


@BOTH
@pytest.mark.parametrize("objects", [(0, 2), (0, 0)])
def test_images_without_objects_give_finite_losses(config, objects):
    model = build(config)
    losses = model(*batch(objects))
    assert set(losses) == {f"loss_{part}_{s}" for part in ("classification", "l1", "giou") for s in STAGES}
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for name, loss in losses.items():
        assert (loss > 0) == (any(objects) or "classification" in name), name


def test_small_first_deltas_leave_boxes_where_they_start():
    config = replace(
        LIGHT, proposals=LearnedProposalsConfig(9, start="grid"), head=replace(LIGHT.head, delta_std=1e-4)
    )
    model, (images, _) = build(config), batch()
    start = to_pixels(model.proposals.boxes.expand(len(images.sizes), -1, -1), images.sizes)
    last = model.stages(images)[-1].boxes
    torch.testing.assert_close(last, start, rtol=0, atol=1)
    far = build(replace(config, head=LIGHT.head)).stages(images)[-1].boxes
    assert (far - start).abs().max() > 10


def test_a_negative_spread_of_the_first_deltas_is_refused():
    with pytest.raises(ConfigError, match=r"head.delta_std must be at least 0 or None, got -1"):
        build(replace(LIGHT, head=replace(LIGHT.head, delta_std=-1.0)))


def test_padding_of_ground_truths_changes_nothing():
    images, targets = batch(slots=5)
    few = build()(images, targets)
    pads = ((0, 0, 0, 9), (0, 9), (0, 9))
    grown = (torch.nn.functional.pad(t, p) for t, p in zip(targets[:3], pads, strict=True))
    many = build()(images, Targets(*grown))
    none = Targets(targets.boxes[:, :0], targets.labels[:, :0], targets.valid[:, :0])
    invalid = targets._replace(valid=torch.zeros_like(targets.valid))
    empty, padded = build()(images, none), build()(images, invalid)
    for name in few:
        torch.testing.assert_close(few[name], many[name])
        torch.testing.assert_close(empty[name], padded[name])


def test_losses_of_a_batch_are_those_of_its_images():
    """Sums over the images, divided by their common number of positives."""
    images, targets = batch((1, 3))
    model = build().eval()

    def losses(rows: slice) -> dict[str, torch.Tensor]:
        chosen = ImageBatch(images.tensor[rows], images.sizes[rows])
        wanted = Targets(*(part[rows] for part in targets[:3]))
        return model.head.losses(model.stages(chosen), chosen, wanted, model.dynamics.assignment, model.scale)

    both, first, second = losses(slice(2)), losses(slice(1)), losses(slice(1, 2))
    for name, value in both.items():
        torch.testing.assert_close(value, (first[name] + 3 * second[name]) / 4, rtol=1e-4, atol=1e-5)


@BOTH
def test_training_lowers_the_losses_of_every_stage(config):
    model, inputs = build(config), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recorded = []
    for _ in range(25):
        losses = model(*inputs)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.dynamics.update()
        by_stage = [sum(loss for name, loss in losses.items() if name.endswith(f"_{s}")) for s in STAGES]
        recorded.append(torch.stack(by_stage).detach())
    first, last = torch.stack(recorded[:3]).mean(0), torch.stack(recorded[-3:]).mean(0)
    assert (last < 0.6 * first).all(), (first, last)


@BOTH
def test_what_is_logged(config):
    model = build(config)
    model(*batch((1, 3)))
    positives = [f"positives_per_gt_{s}" for s in STAGES]
    assert set(positives) <= model.dynamics.metrics().keys()
    assert not any(model.dynamics.metrics()[name] for name in positives)
    model.dynamics.update()
    found = model.dynamics.metrics()
    assert all(value.dim() == 0 for value in found.values())
    assert all(found[name] > 0 for name in positives)
    assert config is DYNAMIC or all(found[name] == 1 for name in positives)
    assert ("expert_temperature" in found) == (config is DYNAMIC)
    model.dynamics.update()  # nothing was assigned since
    assert not any(model.dynamics.metrics()[name] for name in positives)


@BOTH
def test_state_holds_the_proposals_once(config):
    names = [
        name for name in build(config).state_dict() if not name.startswith(("backbone.", "fpn.", "head."))
    ]
    assert {"proposals.boxes", "proposals.features"} <= set(names)
    assert all(name.startswith(("proposals.", "scale.")) for name in names)


@BOTH
def test_a_copy_moves_on_its_own(config):
    model = build(config)
    twin = copy.deepcopy(model)
    twin(*batch())
    twin.dynamics.update()
    assert twin.dynamics.metrics()["positives_per_gt_0"] > 0 == model.dynamics.metrics()["positives_per_gt_0"]
    if config is DYNAMIC:
        assert twin.proposals.iteration == 1 and model.proposals.iteration == 0


def test_each_stage_begins_at_detached_boxes():
    model = build()
    weights = [stage.deltas.weight for stage in model.head.stages]
    for s, output in enumerate(model.stages(batch()[0])):
        total = output.boxes.sum()
        gradients = torch.autograd.grad(total, weights, allow_unused=True, retain_graph=True)
        assert [g is not None for g in gradients] == [other == s for other in STAGES]
        (of_proposals,) = torch.autograd.grad(
            total, model.proposals.boxes, allow_unused=True, retain_graph=True
        )
        assert (of_proposals is not None) == (s == 0)


def head_output(boxes: list[list[float]], scores: list[list[float]]) -> StageOutput:
    boxes, scores = torch.tensor([boxes]), torch.tensor([scores])
    return StageOutput(scores.logit(), boxes, torch.zeros(1, boxes.shape[1], 1))


def test_detections_are_the_best_pairs_of_proposal_and_class():
    head = replace(LIGHT, head=replace(LIGHT.head, detections=3)).build().head
    images = ImageBatch(torch.zeros(1, 3, 32, 32), torch.tensor([[20, 30]]))
    output = head_output([[1, 2, 11, 12], [-5, 3, 40, 25]], [[0.1, 0.9, 0.6], [0.7, 0.2, 0.3]])
    found = head.detect(output, images)
    assert found.valid.all()
    torch.testing.assert_close(found.scores[0], torch.tensor([0.9, 0.7, 0.6]))
    assert found.labels[0].tolist() == [1, 0, 2]
    assert found.boxes[0].tolist() == [[1, 2, 11, 12], [0, 3, 30, 20], [1, 2, 11, 12]]


@pytest.mark.parametrize(("config", "kept"), [(LIGHT, 6), (DYNAMIC, 3)])
def test_nms_after_many_to_one_assignment_alone(config, kept):
    images = ImageBatch(torch.zeros(1, 3, 32, 32), torch.tensor([[32, 32]]))
    output = head_output([[0, 0, 20, 20], [0, 0, 20, 19]], [[0.9, 0.1, 0.1], [0.8, 0.1, 0.1]])
    found = config.build().head.detect(output, images)
    assert found.valid.sum() == kept and found.scores[0, 0].item() == pytest.approx(0.9)


def test_boxes_in_pixels():
    sizes = torch.tensor([[100, 200], [50, 40]])
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.1, -0.2]]).expand(2, -1, -1)
    expected = [[[0, 0, 200, 100], [40, 50, 60, 50]], [[0, 0, 40, 50], [8, 25, 12, 25]]]
    torch.testing.assert_close(to_pixels(boxes, sizes), torch.tensor(expected, dtype=torch.float32))


def test_padding_of_an_image_does_not_change_its_detections():
    model = build().eval()
    images, _ = batch()
    changed = images.tensor.clone()
    changed[1, :, 60:] = 255
    with torch.no_grad():
        before, after = model(images), model(ImageBatch(changed, images.sizes))
    torch.testing.assert_close(before.boxes, after.boxes, rtol=0, atol=0)


def test_start_of_training():
    """As in the paper: boxes of the whole image, scores at the prior."""
    model = build().eval()
    with torch.no_grad():
        output = model.stages(batch()[0])[0]
    assert output.logits.sigmoid().mean().item() == pytest.approx(0.01, rel=1.5)
    config = replace(LIGHT, head=replace(LIGHT.head, prior=0.2))
    bias = config.build().head.stages[0].classifier.bias
    torch.testing.assert_close(bias.sigmoid(), torch.full((3,), 0.2))


def test_number_of_weights():
    """MMDetection's, of 300 proposals and 80 classes on a ResNet-50, without its frozen norms."""
    with torch.device("meta"):
        model = SparseRCNNConfig().build()
    assert sum(p.numel() for p in model.parameters()) == 106_289_768


def test_parts_that_do_not_go_together():
    with pytest.raises(ConfigError, match=r"head\.heads must divide the 32 channels.*got 5"):
        replace(LIGHT, head=replace(LIGHT.head, heads=5)).build()
    with pytest.raises(ConfigError, match=r"head\.stages must be at least 1, got 0"):
        replace(LIGHT, head=replace(LIGHT.head, stages=0)).build()
    with pytest.raises(ConfigError, match=r"P2 to P5.*fpn\.top none, got 2 and pool"):
        replace(LIGHT, fpn=FPNConfig()).build()


def test_costs_of_other_weights_change_the_assignment():
    logits = torch.tensor([[[4.0, -4.0], [-4.0, 4.0]]])
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]]])
    gt = Targets(boxes[:, 1:], torch.tensor([[0]]), torch.tensor([[True]]))
    sizes = torch.tensor([[100, 100]])
    by_class = HungarianConfig(l1_weight=0.0, giou_weight=0.0).build(1)
    by_box = HungarianConfig(class_weight=0.0).build(1)
    assert by_class(logits, boxes, gt, sizes, 0).tolist() == [[0, -1]]
    assert by_box(logits, boxes, gt, sizes, 0).tolist() == [[-1, 0]]


def test_step_under_bfloat16_autocast_stays_close_to_float32():
    model, (images, targets) = build(), batch()
    # Proposals that are nearly equal swap their ground truths at the least rounding: here they keep them.
    fixed = torch.full((2, 20), -1)
    fixed[:, :3] = torch.where(targets.valid[:, :3], torch.arange(3), -1)
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = model.stages(images)
            losses.append(model.head.losses(outputs, images, targets, lambda *_: fixed, model.scale))
    for name, expected in losses[0].items():
        assert losses[1][name].dtype == torch.float32
        # The error grows from stage to stage: 1 % in the first, 5 % in the third.
        torch.testing.assert_close(losses[1][name], expected, rtol=0.02 * 2 ** int(name[-1]), atol=0)
    assert losses[1] != losses[0]  # so something was rounded


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@BOTH
def test_training_step_never_waits_for_the_gpu(config):
    model = build(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, targets = (part.to("cuda") for part in batch())
    before = torch.cuda.get_sync_debug_mode()
    for step in range(4):
        # The first step may allocate, load kernels and tune; all others must run without a wait.
        torch.cuda.set_sync_debug_mode("error" if step else before)
        try:
            losses = model(images, targets)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            model.dynamics.update()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert all(loss.isfinite() for loss in losses.values())


def test_training_without_targets_says_what_to_do():
    with pytest.raises(ValueError, match=r"call \.eval\(\)"):
        build()(batch()[0])
