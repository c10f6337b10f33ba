"""What each detector records for dynamic scale training, and that it trains on collages."""

from dataclasses import replace

import pytest
import torch

from drcnn import presets, sparse_presets
from drcnn.data import Batch, Stitcher
from drcnn.data.bitmasks import BitMasks
from drcnn.dynamics import ScaleTraining, ScaleTrainingConfig
from drcnn.models import CascadeHeadConfig, samplers
from drcnn.structures import ImageBatch, Targets

DST = ScaleTrainingConfig(feedback="both", small_area=400.0, medium_area=1200.0)
MASK = presets.light_mask_rcnn(num_classes=3)
MASK = replace(
    MASK,
    rpn=replace(MASK.rpn, pre_nms=200, post_nms=100),
    box_head=replace(MASK.box_head, channels=32, samples=64),
    mask_head=replace(MASK.mask_head, channels=16),
    scale=DST,
)
FASTER = replace(MASK, mask_head=None)
CASCADE = replace(FASTER, box_head=CascadeHeadConfig(replace(MASK.box_head, class_agnostic=True)))
DETECTORS = {
    "faster": FASTER,
    "dynamic": presets.dynamic(FASTER),
    "mask": MASK,
    "cascade": CASCADE,
    "retinanet": replace(presets.light_retinanet(num_classes=3), scale=DST),
    "fcos": replace(presets.light_fcos(num_classes=3), scale=DST),
    "sparse": presets.scale_training(sparse_presets.light_sparse_rcnn(num_classes=3, proposals=20), DST),
    "dynamic sparse": presets.scale_training(
        sparse_presets.dynamic_assignment(sparse_presets.light_sparse_rcnn(num_classes=3, proposals=20)), DST
    ),
}
ALL = pytest.mark.parametrize("config", DETECTORS.values(), ids=DETECTORS.keys())


def batch(seed: int = 0, objects: int = 4) -> Batch:
    """Two random images of 96 x 128 pixels with objects of all areas."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=generator)
    corner = (torch.rand(2, 8, 2, generator=generator) * 40).round()
    size = torch.tensor([16.0, 18.0, 30.0, 50.0] * 2).view(1, 8, 1)
    valid = (torch.arange(8) < objects).expand(2, 8)
    boxes = torch.where(valid.unsqueeze(-1), torch.cat([corner, corner + size], dim=-1), 0.0)
    labels = torch.randint(0, 3, (2, 8), generator=generator)
    bits = torch.full((2 * objects, 96, 16), 255, dtype=torch.uint8)
    slots = torch.arange(16).view(2, 8)[:, :objects].flatten()
    sizes = torch.tensor([[96, 128], [90, 100]])
    images = ImageBatch(images, sizes)
    return Batch(images, Targets(boxes, labels, valid), torch.arange(2), sizes, masks=BitMasks(bits, slots))


def step(config, data: Batch, spoil=None) -> tuple[torch.nn.Module, dict]:
    torch.manual_seed(0)
    model = config.build().train()
    if spoil is not None:
        spoil(model.scale)
    losses = model(data.images, data.targets)
    sum(losses.values()).backward()
    return model, losses


@ALL
def test_recorded_losses_are_those_of_training(config):
    data = batch().to("cpu")
    model, losses = step(config, data)
    regression, classification, boxes = model.scale.sums
    assert (regression > 0).all() and (classification > 0).all()
    assert boxes.tolist() == [4, 2, 2]
    wanted = sum(v for k, v in losses.items() if k.startswith(("loss_box", "loss_l1", "loss_giou")))
    assert regression.sum().item() == pytest.approx(wanted.item(), rel=1e-5)
    assert classification.sum().item() < sum(
        v.item() for k, v in losses.items() if k.startswith("loss_classification")
    )
    both = regression + classification
    share = (both[0] / both.sum()).item()
    model.scale.decide()
    assert model.scale.ratio.item() == pytest.approx(share)


@ALL
def test_recording_changes_neither_losses_nor_gradients(config, monkeypatch):
    data = batch().to("cpu")
    model, losses = step(config, data)
    monkeypatch.setattr(ScaleTraining, "record", lambda *_, **__: None)
    silent, expected = step(config, data)
    assert not silent.scale.sums[:2].any()
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    for one, other in zip(model.parameters(), silent.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


@ALL
def test_nothing_is_recorded_without_objects(config):
    model, _ = step(config, batch(objects=0).to("cpu"))
    model.scale.decide()
    assert model.scale.ratio.item() == 0 and model.scale.collage


@ALL
@pytest.mark.parametrize(("layout", "components"), [("spatial", 4), ("batch", 3)])
def test_detectors_train_on_collages(config, layout, components):
    stitch = Stitcher(replace(DST, layout=layout, components=components), config.pixel_mean, 32)
    data = stitch([batch(seed) for seed in range(components)], "cpu")
    model, losses = step(config, data)
    assert all(loss.isfinite() for loss in losses.values())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)
    counted = model.scale.sums[2]
    assert counted.sum() == 2 * 4 * components and counted[0] > 4 * components, "objects got smaller"


def test_images_of_the_layout_batch_share_the_samples_of_one(monkeypatch):
    drawn = []

    def spy(*arguments):
        drawn.append(arguments[2:4])
        return samplers.sample_slots(*arguments)

    for module in ("rpn", "roi_heads"):
        monkeypatch.setattr(f"drcnn.models.{module}.sample_slots", spy)
    stitch = Stitcher(replace(DST, layout="batch"), (0, 0, 0), 32)
    step(FASTER, stitch([batch(seed) for seed in range(4)], "cpu"))
    assert drawn == [(64, 32), (16, 4)]
    drawn.clear()
    step(FASTER, batch().to("cpu"))
    assert drawn == [(256, 128), (64, 16)]
