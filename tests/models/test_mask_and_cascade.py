"""The mask head and the cascade: what they compute, and that they train without waiting for the device."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from drcnn import presets
from drcnn.dynamics import DynamicTrainingConfig, FixedTrainingConfig, ScaleTrainingConfig
from drcnn.errors import ConfigError
from drcnn.models import BoxHeadConfig, CascadeHeadConfig, FasterRCNNConfig, mask_head
from drcnn.models.boxes import decode_deltas
from drcnn.models.mask_head import mask_targets
from drcnn.structures import ImageBatch, Targets

MASK = presets.light_mask_rcnn(num_classes=3)
MASK = replace(
    MASK,
    rpn=replace(MASK.rpn, pre_nms=200, post_nms=100, test_pre_nms=100, test_post_nms=50),
    box_head=replace(MASK.box_head, channels=32, samples=64, score_threshold=0.0, detections=150),
    mask_head=replace(MASK.mask_head, channels=16),
    scale=ScaleTrainingConfig(feedback="both"),
)
DYNAMIC_MASK = replace(presets.dynamic(MASK), training=DynamicTrainingConfig(iou_top_k=5, error_top_k=2))
CASCADE_MASK = replace(MASK, box_head=CascadeHeadConfig(replace(MASK.box_head, class_agnostic=True)))
CASCADE = replace(CASCADE_MASK, mask_head=None)
ALL = pytest.mark.parametrize(
    "config", [MASK, DYNAMIC_MASK, CASCADE, CASCADE_MASK], ids=["mask", "dynamic", "cascade", "cascade-mask"]
)


def batch(objects: tuple[int, int] = (1, 3), slots: int = 8) -> tuple[ImageBatch, Targets]:
    """Two random images with so many objects each, the ellipses in their boxes."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=generator)
    corner = torch.rand(2, slots, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + 15 + torch.rand(2, slots, 2, generator=generator) * 35], dim=-1)
    labels = torch.randint(0, 3, (2, slots), generator=generator)
    valid = torch.arange(slots) < torch.tensor(objects).unsqueeze(1)
    boxes, labels = torch.where(valid.unsqueeze(-1), boxes, 0.0), torch.where(valid, labels, 0)
    x1, y1, x2, y2 = boxes[..., None, None].unbind(2)
    x, y = torch.arange(128) + 0.5, torch.arange(96)[:, None] + 0.5
    distance = ((x - (x1 + x2) / 2) / (x2 - x1)) ** 2 + ((y - (y1 + y2) / 2) / (y2 - y1)) ** 2
    masks = (distance <= 0.25) & valid[..., None, None]
    return ImageBatch(images, torch.tensor([[96, 128], [90, 100]])), Targets(boxes, labels, valid, masks)


def build(config: FasterRCNNConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return config.build().train()


@pytest.mark.parametrize("config", [DYNAMIC_MASK, CASCADE_MASK], ids=["dynamic", "cascade"])
def test_training_traces_as_one_graph(config):
    torch.compiler.reset()
    model = build(config)
    inputs = batch()
    torch.manual_seed(3)
    expected = model(*inputs)
    torch.manual_seed(3)
    losses = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    assert losses.keys() == expected.keys()
    for name in losses:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-4, atol=1e-6)
    sum(losses.values()).backward()
    assert model.mask_head.logits.weight.grad.abs().sum() > 0


@ALL
def test_gradients_reach_every_weight(config):
    model = build(config)
    losses = model(*batch())
    heads = {f"loss_{kind}_{s}" for kind in ("classification", "box") for s in range(3)}
    if isinstance(config.box_head, BoxHeadConfig):
        heads = {"loss_classification", "loss_box"}
    if config.mask_head is not None:
        heads |= {"loss_mask"}
    assert losses.keys() == heads | {"loss_rpn_objectness", "loss_rpn_box"}
    assert all(loss.dim() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    unmoved = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    assert not unmoved


@ALL
@pytest.mark.parametrize(("objects", "slots"), [((0, 2), 8), ((0, 0), 8), ((0, 0), 0)])
def test_images_without_objects(config, objects, slots):
    model = build(config)
    losses = model(*batch(objects, slots))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    if not any(objects):
        assert losses.get("loss_mask", torch.zeros(())).item() == 0
        assert not any(loss.item() for name, loss in losses.items() if "box" in name)


def test_dynamic_mask_rcnn_records_and_moves():
    config = replace(DYNAMIC_MASK, training=replace(DYNAMIC_MASK.training, window=2, min_iou_threshold=0.0))
    model = build(config)
    assert presets.dynamic(MASK).mask_head == MASK.mask_head
    for _ in range(2):
        model(*batch())
        assert model.dynamics.sums[1].item() == 2
        mean = model.dynamics.sums[0].item() / 2
        model.dynamics.update()
    assert 0 < mean < 1
    assert 0 < model.dynamics.iou_threshold.item() != pytest.approx(0.4)


def test_mask_targets_equal_those_of_one_box_at_a_time(monkeypatch):
    _, targets = batch((3, 6))
    generator = torch.Generator().manual_seed(5)
    index = torch.randint(0, 3, (2, 10), generator=generator)
    boxes = targets.boxes.gather(1, index[..., None].expand(-1, -1, 4))
    boxes = boxes + torch.randn(boxes.shape, generator=generator) * 4
    wanted = torch.rand(2, 10, generator=generator) < 0.7
    found = mask_targets(targets.masks, boxes, index, wanted, 14)
    assert found.unique().tolist() == [0, 1]
    for b in range(2):
        for r in range(10):
            mask = targets.masks[b, index[b, r]].float()[None, None]
            expected = roi_align(mask, [boxes[b, r][None]], 14, aligned=True)[0, 0] >= 0.5
            assert torch.equal(found[b, r].bool(), expected & wanted[b, r])
    monkeypatch.setattr(mask_head, "MAX_PIXELS", 5 * 96 * 128)  # 16 masks in four chunks, one not full
    assert torch.equal(mask_targets(targets.masks, boxes, index, wanted, 14), found)


def test_mask_loss_is_that_of_positives_and_their_own_class():
    model = build(MASK)
    images, targets = batch()
    features = model.fpn(model.backbone(model.normalize(images)))[:-1]
    proposals, valid, _ = model.rpn(features + [features[-1][..., ::2, ::2]], images)
    policies = model.dynamics, model.scale
    _, samples = model.box_head.losses(features, proposals, valid, images, targets, *policies)
    assert samples.labels.shape == (2, 16)
    with torch.no_grad():
        model.mask_head.logits.weight.normal_()
    positive = samples.labels < 3
    assert 0 < positive.sum() < positive.numel()
    losses = []
    for b, r in positive.nonzero().tolist():
        box, label = samples.boxes[b : b + 1, r : r + 1], samples.labels[b, r].view(1, 1)
        logits = model.mask_head([f[b : b + 1] for f in features], box, label)[0, 0]
        mask = targets.masks[b, samples.gt_index[b, r]].float()[None, None]
        wanted = (roi_align(mask, [box[0]], 28, aligned=True)[0, 0] >= 0.5).float()
        losses.append(F.binary_cross_entropy_with_logits(logits, wanted))
    found = model.mask_head.losses(features, samples, targets.masks)["loss_mask"]
    torch.testing.assert_close(found, torch.stack(losses).mean())


@torch.no_grad()
@pytest.mark.parametrize("config", [MASK, CASCADE_MASK], ids=["mask", "cascade"])
def test_detections_have_masks_of_their_class(config):
    model = build(config).eval()
    model.mask_head.logits.bias.copy_(torch.tensor([-2.0, 0.0, 2.0]))
    images, _ = batch()
    found = model(images)
    assert found.masks.shape == (2, 150, 28, 28) and found.masks.dtype == torch.float32
    assert found.valid.any() and len(found.labels[found.valid].unique()) > 1
    own = found.masks.mean((2, 3))[found.valid]
    expected = torch.tensor([-2.0, 0.0, 2.0]).sigmoid()[found.labels[found.valid]]
    torch.testing.assert_close(own, expected, rtol=0, atol=0.1)
    torch.testing.assert_close(model.predict_masks(images, found), found.masks)
    assert build(CASCADE).eval()(images).masks is None


def test_a_missing_mask_says_what_to_do():
    images, targets = batch()
    with pytest.raises(ValueError, match="Targets with masks"):
        build(MASK)(images, targets._replace(masks=None))
    model = build(CASCADE).eval()
    with pytest.raises(ValueError, match=r"set model\.mask_head"), torch.no_grad():
        model.predict_masks(images, model(images))


def test_each_stage_trains_on_the_boxes_that_the_one_before_refined(monkeypatch):
    model = build(CASCADE)
    with torch.no_grad():
        model.box_head.stages[0].deltas.bias.copy_(torch.tensor([5.0, 0.0, 2.0, 0.0]))
    seen = []
    for stage in model.box_head.stages:
        monkeypatch.setattr(stage, "sample", spy(stage.sample, seen))
    images, targets = batch()
    model(images, targets)
    assert [float(policy.iou_threshold) for *_, policy, _ in seen] == pytest.approx([0.5, 0.6, 0.7])
    for (*_, samples), (proposals, valid, _, _) in pairwise(seen):
        assert proposals.shape == samples.boxes.shape and not proposals.requires_grad
        assert samples.is_gt.any() and not (valid & samples.is_gt).any()
        assert torch.equal(valid, samples.valid & ~samples.is_gt)
        height, width = images.sizes[:, None].unbind(-1)
        assert ((proposals[..., 2] <= width) & (proposals[..., 3] <= height) & (proposals >= 0).all(-1)).all()
    first, second = seen[0][3].boxes, seen[1][0]
    shift = decode_deltas(first, torch.tensor([5.0, 0.0, 2.0, 0.0]).expand_as(first), (10.0, 10.0, 5.0, 5.0))
    inside = (shift[..., 2] < images.sizes[:, 1:]) & (shift[..., 0] > 0)
    assert inside.any()
    torch.testing.assert_close(second[inside][:, [0, 2]], shift[inside][:, [0, 2]], rtol=0.05, atol=1.0)


def spy(sample, seen: list):
    def recorded(proposals: Tensor, valid: Tensor, images: ImageBatch, targets: Targets, policy, draw):
        samples = sample(proposals, valid, images, targets, policy, draw)
        seen.append((proposals, valid, policy, samples))
        return samples

    return recorded


def test_weights_of_the_stages_and_gradient_into_the_pyramid():
    gradients, losses = [], []
    images, targets = batch()
    for changes in ({}, {"feature_gradient": 1 / 3}, {"loss_weights": (1.0, 2.0, 0.25)}):
        model = build(replace(CASCADE, box_head=replace(CASCADE.box_head, **changes)))
        features = [f.detach().requires_grad_() for f in model.fpn(model.backbone(model.normalize(images)))]
        proposals = targets.boxes.repeat(1, 4, 1) + 2
        valid = targets.valid.repeat(1, 4)
        torch.manual_seed(0)
        policies = model.dynamics, model.scale
        found, _ = model.box_head.losses(features[:-1], proposals, valid, images, targets, *policies)
        weights = [features[0], model.box_head.stages[1].fc1.weight]
        gradients.append(torch.autograd.grad(sum(found.values()), weights))
        losses.append(found)
    torch.testing.assert_close(gradients[1][0], gradients[0][0] / 3)
    torch.testing.assert_close(gradients[1][1], gradients[0][1])
    torch.testing.assert_close(losses[2]["loss_box_1"], 4 * losses[0]["loss_box_1"])
    assert torch.equal(losses[2]["loss_box_2"], losses[0]["loss_box_2"])


@torch.no_grad()
def test_scores_are_means_over_the_stages():
    images, _ = batch()
    boxes = torch.tensor([[[5.0, 5.0, 40.0, 60.0], [30.0, 20.0, 90.0, 80.0]]]).repeat(2, 1, 1)
    for average in ("scores", "logits"):
        model = build(replace(CASCADE, box_head=replace(CASCADE.box_head, average=average))).eval()
        features = model.fpn(model.backbone(model.normalize(images)))[:-1]
        for stage in model.box_head.stages:
            stage.classifier.weight.normal_()
        scores, refined = model.box_head(features, boxes, images)
        logits, current = [], boxes
        for stage in model.box_head.stages:
            found, deltas = stage(features, current)
            logits.append(found)
            current = decode_deltas(current, deltas.squeeze(2), stage.config.delta_weights)
        if average == "scores":
            expected = sum(value.softmax(-1) for value in logits) / 3
        else:
            expected = (sum(logits) / 3).softmax(-1)
        torch.testing.assert_close(scores, expected)
        torch.testing.assert_close(refined, current)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (presets.dynamic(CASCADE), "got DynamicTrainingConfig"),
        (replace(CASCADE, training=FixedTrainingConfig(0.4)), "iou_threshold=0.4"),
        (FasterRCNNConfig(box_head=CascadeHeadConfig(iou_thresholds=(0.5,))), "got 1, 3 and 3"),
        (FasterRCNNConfig(box_head=CascadeHeadConfig(BoxHeadConfig())), "class_agnostic"),
        (
            FasterRCNNConfig(
                box_head=CascadeHeadConfig(
                    BoxHeadConfig(class_agnostic=True, delta_weights=(1.0, 1.0, 1.0, 1.0))
                )
            ),
            "must be the first",
        ),
    ],
)
def test_parts_that_do_not_go_together(config, message):
    with pytest.raises(ConfigError, match=message) as error:
        config.build()
    assert "\n" not in str(error.value)


def test_a_short_training_lowers_the_losses():
    model = build(DYNAMIC_MASK)
    inputs = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    history = []
    for _ in range(40):
        losses = model(*inputs)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        model.dynamics.update()
        history.append({name: loss.item() for name, loss in losses.items()})
    assert history[0]["loss_mask"] == pytest.approx(math.log(2), rel=0.05)
    assert sum(h["loss_mask"] for h in history[-5:]) / 5 < 0.5
    assert sum(history[-1].values()) < 0.7 * sum(history[0].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@ALL
def test_training_step_never_waits_for_the_gpu(config):
    model = build(config).cuda()
    images, targets = (part.to("cuda") for part in batch())
    before = torch.cuda.get_sync_debug_mode()
    for step in range(3):
        # The first step may allocate, load kernels and tune; all others must run without a wait.
        torch.cuda.set_sync_debug_mode("error" if step else before)
        try:
            losses = model(images, targets)
            sum(losses.values()).backward()
            model.dynamics.update()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert all(loss.isfinite() for loss in losses.values())
