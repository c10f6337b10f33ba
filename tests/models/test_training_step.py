"""The training step: fixed shapes, one graph, no wait for the device, reproducible."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import drcnn
from drcnn import presets
from drcnn.dynamics import DynamicTrainingConfig, FixedTrainingConfig, ScaleTrainingConfig
from drcnn.ops import backend_status, use_backend
from drcnn.structures import ImageBatch, Targets

FASTER = presets.light_faster_rcnn(num_classes=3)
FASTER = replace(
    FASTER,
    rpn=replace(FASTER.rpn, pre_nms=200, post_nms=100, test_pre_nms=100, test_post_nms=50),
    box_head=replace(FASTER.box_head, channels=32, samples=64),
    scale=ScaleTrainingConfig(feedback="both"),
)
DYNAMIC = replace(presets.dynamic(FASTER), training=DynamicTrainingConfig(iou_top_k=5, error_top_k=2))


def batch(objects: tuple[int, ...] = (1, 3), slots: int = 8) -> tuple[ImageBatch, Targets]:
    """Random images with so many objects each, padded to ``slots``."""
    generator = torch.Generator().manual_seed(7)
    count = len(objects)
    images = torch.randint(0, 256, (count, 3, 96, 128), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[96, 128], [90, 100]] * count)[:count]
    corner = torch.rand(count, slots, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + 15 + torch.rand(count, slots, 2, generator=generator) * 35], dim=-1)
    valid = torch.arange(slots) < torch.tensor(objects).unsqueeze(1)
    labels = torch.randint(0, 3, (count, slots), generator=generator)
    zero = torch.zeros(())
    return ImageBatch(images, sizes), Targets(
        torch.where(valid.unsqueeze(-1), boxes, zero), torch.where(valid, labels, 0), valid
    )


def build(config, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return config.build().train()


INSIDE = replace(FASTER, rpn=replace(FASTER.rpn, allowed_border=0.0))


@pytest.mark.parametrize("config", [FASTER, DYNAMIC, INSIDE], ids=["faster", "dynamic", "inside"])
def test_training_forward_and_backward_trace_as_one_graph(config):
    torch.compiler.reset()
    model = build(config)
    inputs = batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    expected = model(*inputs)
    gradient = torch.autograd.grad(sum(expected.values()), model.box_head.fc1.weight)[0]
    torch.manual_seed(3)
    losses = compiled(*inputs)
    assert losses.keys() == expected.keys()
    for name in losses:  # this backend keeps the operators and the order of the random draws
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-4, atol=1e-6)
    sum(losses.values()).backward()
    torch.testing.assert_close(model.box_head.fc1.weight.grad, gradient, rtol=1e-3, atol=1e-6)
    assert gradient.abs().sum() > 0


def test_compiled_step_records_the_statistics():
    torch.compiler.reset()
    model = build(DYNAMIC)
    torch.compile(model, fullgraph=True, backend="aot_eager")(*batch())
    assert model.dynamics.sums[1].item() == 2
    assert model.dynamics.sums[0].item() > 0
    assert model.scale.sums[2].sum().item() == 4 and (model.scale.sums[:2].sum(dim=1) > 0).all()


FORBIDDEN = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "argwhere", "synchronize"}


@pytest.mark.parametrize("folder", ["models", "dynamics"])
def test_no_call_that_waits_for_the_device(folder):
    files = sorted((Path(drcnn.__file__).parent / folder).glob("*.py"))
    assert len(files) > 1
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(node, "attr", None) or getattr(node, "id", None)
            if isinstance(node, ast.Attribute | ast.Name) and name in FORBIDDEN:
                found.append(f"{file.name}:{node.lineno} {name}")
    assert not found


def test_the_search_for_waiting_calls_finds_them():
    tree = ast.parse("x = y.item()\nz = torch.nonzero(x)")
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert names & FORBIDDEN == {"item", "nonzero"}


def test_fixed_training_equals_frozen_dynamic_training_bit_for_bit():
    fixed = replace(FASTER, training=FixedTrainingConfig(0.5, 1.0))
    frozen = DynamicTrainingConfig(
        dynamic_labels=False, dynamic_loss=False, iou_threshold=0.5, beta=1.0, window=2
    )
    models = [build(config) for config in (fixed, replace(FASTER, training=frozen))]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in models]
    for step in range(5):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)
            losses.append(model(*batch()))
            optimizer.zero_grad()
            sum(losses[-1].values()).backward()
            optimizer.step()
            model.dynamics.update()
        for name in losses[0]:
            assert torch.equal(losses[0][name], losses[1][name])


def test_step_under_bfloat16_autocast_stays_close_to_float32():
    # Every anchor and proposal trains, so that rounding changes no draw.
    rpn = replace(DYNAMIC.rpn, pre_nms=4000, post_nms=4000, nms=1.0, samples=4000)
    config = replace(DYNAMIC, rpn=rpn, box_head=replace(DYNAMIC.box_head, samples=4000))
    losses, sums, gradients = [], [], []
    for enabled in (False, True):
        model = build(config)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses.append(model(*batch()))
        sum(losses[-1].values()).backward()
        sums.append(model.dynamics.sums)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in losses[0].items():  # within 3 %: a box at the IoU threshold may change its label
        torch.testing.assert_close(losses[1][name], expected, rtol=0.03, atol=0)
    assert losses[1] != losses[0]  # so something was rounded
    torch.testing.assert_close(sums[1], sums[0], rtol=0.02, atol=0)
    for name, expected in gradients[0].items():
        actual = gradients[1][name]
        assert actual.dtype == torch.float32 and actual.isfinite().all(), name
        # The error grows on the way down to the image: 26 % at the first convolution.
        assert (actual - expected).norm() < 0.4 * expected.norm(), name
    everything = [torch.cat([g.flatten() for g in of_all.values()]) for of_all in gradients]
    assert (everything[1] - everything[0]).norm() < 0.05 * everything[0].norm()


def test_thresholds_change_the_labels():
    losses = []
    for threshold in (0.1, 0.95):
        model = build(replace(FASTER, training=FixedTrainingConfig(threshold)))
        torch.manual_seed(0)
        losses.append(model(*batch())["loss_box"].item())
    assert losses[0] != losses[1]


@pytest.mark.parametrize("objects", [(0, 2), (0, 0)])
def test_images_without_objects_give_finite_losses_of_every_head(objects):
    model = build(DYNAMIC)
    losses = model(*batch(objects))
    assert set(losses) == {"loss_rpn_objectness", "loss_rpn_box", "loss_classification", "loss_box"}
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if not any(objects):
        assert losses["loss_box"].item() == losses["loss_rpn_box"].item() == 0
        model.dynamics.update()
        assert model.dynamics.iou_records.isnan().all()


def test_statistics_do_not_depend_on_the_padding_of_ground_truths():
    sums = []
    for slots in (8, 32):
        model = build(DYNAMIC)
        images, targets = batch(slots=8)
        pads = ((0, 0, 0, slots - 8), (0, slots - 8), (0, slots - 8))
        grown = [torch.nn.functional.pad(t, pad) for t, pad in zip(targets[:3], pads, strict=True)]
        model(images, Targets(*grown))
        sums.append(model.dynamics.sums)
    torch.testing.assert_close(sums[0], sums[1])


def test_evaluation_records_nothing_and_pads_detections():
    model = build(DYNAMIC).eval()
    with torch.no_grad():
        detections = model(batch()[0])
    assert detections.boxes.shape == (2, 100, 4) and detections.labels.shape == (2, 100)
    assert not detections.scores[~detections.valid].any()
    scores = torch.where(detections.valid, detections.scores, 0.0)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert not model.dynamics.sums.any() and not model.dynamics.iteration.any()
    assert not model.scale.sums.any()
    right = detections.boxes[1][detections.valid[1]]
    assert right[:, 2].max() <= 100 and right[:, 3].max() <= 90


def test_padding_of_an_image_does_not_change_its_detections():
    model = build(FASTER).eval()
    images, _ = batch()
    with torch.no_grad():
        alone = model(ImageBatch(images.tensor[:1], images.sizes[:1]))
        changed = images.tensor.clone()
        changed[1, :, 90:] = 255
        changed[1, :, :, 100:] = 255
        before, after = model(images), model(ImageBatch(changed, images.sizes))
    torch.testing.assert_close(before.boxes, after.boxes, rtol=0, atol=0)
    torch.testing.assert_close(alone.scores[0], before.scores[0], rtol=1e-4, atol=1e-5)


def test_training_without_targets_says_what_to_do():
    with pytest.raises(ValueError, match=r"call \.eval\(\)"):
        build(FASTER)(batch()[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("config", [FASTER, DYNAMIC], ids=["faster", "dynamic"])
def test_training_step_never_waits_for_the_gpu(config):
    model = build(config).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
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
            model.scale.decide()
            model.dynamics.update()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_first_steps_agree_on_every_backend(backend):
    used = {"assign_targets", "match_boxes", "nms", "roi_align", "smooth_l1", "topk_statistics"}
    choices = [choice for choice in backend_status() if choice.device_type == "cpu" and choice.op in used]
    assert len(choices) == len(used)
    for choice in choices:
        if backend in choice.unavailable:
            pytest.skip(f"{choice.op}: {choice.unavailable[backend]}")
    steps = 5 if backend == "native" else 2  # the interpreter needs half a minute for one

    def losses(name):
        model = build(DYNAMIC)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        totals = []
        with use_backend(name):
            for step in range(steps):
                torch.manual_seed(step)
                total = sum(model(*batch()).values())
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                model.dynamics.update()
                totals.append(total.detach())
        return torch.stack(totals)

    torch.testing.assert_close(losses(backend), losses("reference"), rtol=0, atol=1e-4)
