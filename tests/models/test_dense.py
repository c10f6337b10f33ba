"""RetinaNet and FCOS: assignment by hand, one graph, images without objects, learning, ranks."""

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from drcnn import presets
from drcnn.dynamics import ScaleTrainingConfig
from drcnn.models import FCOSHeadConfig, FPNConfig, RetinaNetHeadConfig
from drcnn.models.dense import strongest
from drcnn.models.fcos import boxes_around, centerness_of
from drcnn.ops import focal_loss
from drcnn.structures import ImageBatch, Targets

RETINANET, FCOS = (
    presets.scale_training(detector(num_classes=3), ScaleTrainingConfig(feedback="both"))
    for detector in (presets.light_retinanet, presets.light_fcos)
)
BOTH = pytest.mark.parametrize("config", [RETINANET, FCOS], ids=["retinanet", "fcos"])


def batch(objects: tuple[int, ...] = (1, 3), slots: int = 5) -> tuple[ImageBatch, Targets]:
    """Images of noise with a bright rectangle, of one colour by class, for each object."""
    generator = torch.Generator().manual_seed(7)
    count = len(objects)
    images = torch.randint(0, 60, (count, 3, 96, 128), generator=generator)
    corner = (torch.rand(count, slots, 2, generator=generator) * 40).round()
    size = (20 + torch.rand(count, slots, 2, generator=generator) * 30).round()
    valid = torch.arange(slots) < torch.tensor(objects).unsqueeze(1)
    boxes = torch.cat([corner, corner + size], dim=-1) * valid.unsqueeze(-1)
    labels = torch.randint(0, 3, (count, slots), generator=generator) * valid
    for i, number in enumerate(objects):
        for (x1, y1, x2, y2), label in zip(boxes[i, :number].int(), labels[i, :number], strict=True):
            images[i, label, y1:y2, x1:x2] = 220
    sizes = torch.tensor([[96, 128]] * count)
    return ImageBatch(images.to(torch.uint8), sizes), Targets(boxes, labels, valid)


def build(config) -> torch.nn.Module:
    torch.manual_seed(0)
    return config.build().train()


@BOTH
def test_training_forward_and_backward_trace_as_one_graph(config):
    torch.compiler.reset()
    model = build(config)
    inputs = batch()
    expected = model(*inputs)
    weight = model.head.classifier.weight
    gradient = torch.autograd.grad(sum(expected.values()), weight)[0]
    losses = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    assert losses.keys() == expected.keys()
    for name in losses:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-4, atol=1e-6)
    sum(losses.values()).backward()
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-6)
    assert gradient.abs().sum() > 0


@BOTH
@pytest.mark.parametrize("objects", [(0, 2), (0, 0)])
def test_images_without_objects_give_finite_losses(config, objects):
    model = build(config)
    losses = model(*batch(objects))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    boxes = [loss.item() for name, loss in losses.items() if name != "loss_classification"]
    assert all((value > 0) == any(objects) for value in boxes)
    assert losses["loss_classification"] > 0


@BOTH
def test_no_slots_for_ground_truths(config):
    images, _ = batch((0, 0))
    none = Targets(
        torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.bool)
    )
    losses = build(config)(images, none)
    padded = build(config)(*batch((0, 0)))
    for name in losses:
        torch.testing.assert_close(losses[name], padded[name])


@BOTH
def test_padding_of_ground_truths_changes_nothing(config):
    images, targets = batch(slots=5)
    few = build(config)(images, targets)
    pads = ((0, 0, 0, 9), (0, 9), (0, 9))
    many = build(config)(
        images, Targets(*(torch.nn.functional.pad(t, p) for t, p in zip(targets[:3], pads, strict=True)))
    )
    for name in few:
        torch.testing.assert_close(few[name], many[name])


@BOTH
def test_losses_fall(config):
    model = build(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    inputs = batch((2, 3))
    totals = []
    for _ in range(20):
        losses = model(*inputs)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        model.dynamics.update()
        totals.append(sum(losses.values()).item())
    assert sum(totals[-5:]) < 0.9 * sum(totals[:5])
    assert model.dynamics.metrics() == {}


@BOTH
def test_detections_are_padded_and_clipped(config):
    model = build(config).eval()
    model.head.config = replace(model.head.config, score_threshold=0.0)
    images, _ = batch()
    images = images._replace(sizes=torch.tensor([[96, 128], [90, 100]]))
    with torch.no_grad():
        found = model(images)
    assert found.boxes.shape == (2, 100, 4) and found.labels.shape == (2, 100)
    assert found.valid.any(dim=1).all()
    assert (found.scores[:, :-1] >= found.scores[:, 1:]).all()
    assert not found.scores[~found.valid].any() and not found.boxes[~found.valid].any()
    right = found.boxes[1]
    assert right[:, 2].max() <= 100 and right[:, 3].max() <= 90
    with pytest.raises(ValueError, match=r"call \.eval\(\)"):
        model.train()(images)


def test_focal_loss_by_hand():
    logits, labels = torch.tensor([[[0.0, 2.0], [1.0, -1.0]]]), torch.tensor([[1, 2]])
    p = logits[0].sigmoid()
    first = -0.75 * p[0, 0] ** 2 * (1 - p[0, 0]).log() - 0.25 * (1 - p[0, 1]) ** 2 * p[0, 1].log()
    second = sum(-0.75 * q**2 * (1 - q).log() for q in p[1])
    both = torch.tensor([[True, True]])
    torch.testing.assert_close(focal_loss(logits, labels, both, 0.25, 2.0), first + second)
    one = torch.tensor([[True, False]])
    torch.testing.assert_close(focal_loss(logits, labels, one, 0.25, 2.0), first)


def test_strongest_pairs():
    scores = torch.tensor([[[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]])
    best, labels, positions = strongest(scores, 3)
    torch.testing.assert_close(best, torch.tensor([[0.9, 0.8, 0.7]]))
    assert labels.tolist() == [[1, 0, 1]] and positions.tolist() == [[0, 1, 2]]
    assert strongest(scores, 100)[0].shape == (1, 6)


def retinanet_labels(ious: tuple[float, ...]) -> tuple[list[int], list[bool]]:
    """Labels of anchors that overlap one ground truth of class 1 so much."""
    head = RETINANET.build().head
    anchors = torch.tensor([[[0.0, 0.0, 100.0, 100.0 * iou] for iou in ious]])
    targets = Targets(torch.tensor([[[0.0, 0, 100, 100]]]), torch.tensor([[1]]), torch.tensor([[True]]))
    labels, _, counted, _ = head.assign(anchors, targets)
    return labels[0].tolist(), counted[0].tolist()


def test_retinanet_labels_by_hand():
    assert retinanet_labels((0.9, 0.51, 0.45, 0.39)) == ([1, 1, 3, 3], [True, True, False, True])
    assert retinanet_labels((0.2, 0.1)) == ([1, 3], [True, True]), "the best anchor, whatever its IoU"


def fcos_labels(points: list[list[float]], boxes: list[list[float]], **settings) -> list[int]:
    """Labels of points on the first level, of stride 8, where the label of a box is its place."""
    head = FCOSHeadConfig(**settings).build(32, (8, 16, 32, 64, 128), num_classes=9)
    labels = torch.arange(len(boxes))[None]
    targets = Targets(torch.tensor([boxes]), labels, torch.ones_like(labels, dtype=torch.bool))
    return head.assign([torch.tensor(points)], targets)[0][0].tolist()


def test_fcos_labels_by_hand():
    box = [0.0, 0.0, 60.0, 60.0]
    points = [[30.0, 30.0], [41.0, 30.0], [43.0, 30.0], [1.0, 1.0], [70.0, 30.0]]
    assert fcos_labels(points, [box]) == [0, 0, 9, 9, 9], "within 1.5 strides of the centre"
    assert fcos_labels(points, [box], center_radius=0) == [0, 0, 0, 0, 9], "anywhere in the box"
    assert fcos_labels(points, [[0.0, 0.0, 200.0, 60.0]], center_radius=0) == [9] * 5, "too far from a side"
    inner = [20.0, 20.0, 40.0, 40.0]
    assert fcos_labels(points[:2], [box, inner], center_radius=0) == [1, 0], "the smallest of two"


def test_fcos_levels_share_objects_by_size():
    head = FCOSHeadConfig(center_radius=0).build(32, (8, 16, 32, 64, 128), num_classes=9)
    boxes = torch.tensor([[[0.0, 0, s, s] for s in (100.0, 200.0, 400.0, 800.0, 1600.0)]])
    targets = Targets(boxes, torch.arange(5)[None], torch.ones(1, 5, dtype=torch.bool))
    levels = [torch.tensor([[s / 2, s / 2]]) for s in (100.0, 200.0, 400.0, 800.0, 1600.0)]
    labels, matched = head.assign(levels, targets)
    assert labels.tolist() == [[0, 1, 2, 3, 4]]
    assert torch.equal(matched, boxes)


def test_centerness_and_boxes_by_hand():
    points = torch.tensor([[5.0, 10.0], [2.0, 10.0]])
    boxes = torch.tensor([[0.0, 0.0, 10.0, 20.0]]).expand(2, 4)
    torch.testing.assert_close(centerness_of(points, boxes), torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(boxes_around(points[1:], torch.tensor([[2.0, 10, 8, 10]])), boxes[:1])


@pytest.mark.parametrize(("top", "inputs"), [("convs_on_c5", 64), ("convs_on_p5", 32)])
def test_pyramid_from_p3_to_p7(top, inputs):
    pyramid = FPNConfig(channels=32, first_level=3, top=top).build((8, 16, 32, 64), (4, 8, 16, 32))
    assert pyramid.strides == (8, 16, 32, 64, 128)
    assert pyramid.extra_blocks.p6.in_channels == inputs
    features = [torch.randn(1, c, 96 // s, 160 // s) for c, s in ((8, 4), (16, 8), (32, 16), (64, 32))]
    levels = pyramid(features)
    assert [tuple(f.shape[-2:]) for f in levels] == [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]
    p7 = torch.nn.functional.relu(levels[3])
    torch.testing.assert_close(pyramid.extra_blocks.p7(p7), levels[4])
    plain = FPNConfig(channels=32, first_level=3, top=top, top_relu=False).build(
        (8, 16, 32, 64), (4, 8, 16, 32)
    )
    levels = plain(features)
    torch.testing.assert_close(plain.extra_blocks.p7(levels[3]), levels[4])


@pytest.mark.parametrize(
    ("head", "word"), [(RetinaNetHeadConfig(), "anchors.sizes"), (FCOSHeadConfig(), "size_limits")]
)
def test_a_wrong_number_of_levels_is_named(head, word):
    with pytest.raises(ValueError, match=word):
        head.build(32, (8, 16, 32), num_classes=3)


def gradient(config, images: slice) -> torch.Tensor:
    inputs, targets = batch((1, 3))
    model = build(config)
    part = ImageBatch(*(t[images] for t in inputs[:2])), Targets(*(t[images] for t in targets[:3]))
    sum(model(*part).values()).backward()
    return model.head.classifier.weight.grad


def _rank(port: str, folder: str, rank: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=2)
    found = [gradient(config, slice(int(rank), int(rank) + 1)) for config in (RETINANET, FCOS)]
    for value in found:
        dist.all_reduce(value)
    torch.save([value / 2 for value in found], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_averaged_gradients_of_ranks_are_those_of_one_rank(tmp_path):
    """The ranks hold different numbers of positives, so each by itself would weigh its own differently."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # New processes, not forks: autograd's threads of the tests before would not survive a fork.
    command = [sys.executable, __file__, str(port), str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    for i, config in enumerate((RETINANET, FCOS)):
        expected = gradient(config, slice(None))
        for rank in range(2):
            found = torch.load(tmp_path / f"{rank}.pt")[i]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@BOTH
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
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert all(loss.isfinite() for loss in losses.values())


if __name__ == "__main__":
    _rank(*sys.argv[1:])
