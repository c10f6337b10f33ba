"""Proposals of Sparse R-CNN: learned ones, and mixtures of experts."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from drcnn.dynamics import DynamicProposalsConfig, LearnedProposalsConfig
from drcnn.dynamics.proposals import normalized_entropy
from drcnn.errors import ConfigError

SMALL = DynamicProposalsConfig(count=7, experts=3, anneal_iterations=10, grid=6, hidden=16)


def pyramid(images: int = 2, channels: int = 8, size: tuple[int, int] = (24, 40)) -> list[Tensor]:
    """Random levels P2 to P5 whose sides halve, rounded up."""
    levels = []
    for _ in range(4):
        levels.append(torch.randn(images, channels, *size))
        size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    return levels


def test_learned_proposals_start_as_whole_images_with_normal_features():
    torch.manual_seed(0)
    proposals = LearnedProposalsConfig(count=400).build(32)
    assert {n: p.shape for n, p in proposals.named_parameters()} == {"boxes": (400, 4), "features": (400, 32)}
    boxes, objects = proposals(pyramid(3))
    assert boxes.shape == (3, 400, 4) and objects.shape == (3, 400, 32)
    assert (boxes == torch.tensor([0.5, 0.5, 1, 1])).all()
    assert objects.mean().item() == pytest.approx(0, abs=0.03)
    assert objects.std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(objects[0], objects[2])
    proposals.update()
    assert proposals.metrics() == {}


@pytest.mark.parametrize("count", [1, 2, 7, 100, 300])
def test_a_grid_of_proposals_covers_the_image(count):
    boxes = LearnedProposalsConfig(count, start="grid").build(4).boxes.detach()
    assert boxes.shape == (count, 4)
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)
    assert corners.min() >= -1e-6 and corners.max() <= 1 + 1e-6
    overlap = box_iou(corners, corners) - torch.eye(count)
    assert overlap.max() <= 1e-5  # cells do not overlap, and only the end of the last row is left out
    assert (boxes[:, 2] * boxes[:, 3]).sum().item() > (0.5 if count < 4 else 0.75)


def test_experts_share_their_first_boxes():
    boxes = replace(SMALL, start="grid").build(4).boxes
    assert torch.equal(boxes[0], boxes[2])
    assert torch.equal(boxes[0], LearnedProposalsConfig(7, start="grid").build(4).boxes)


def test_proposals_need_a_count():
    with pytest.raises(ConfigError, match=r"proposals.count must be at least 1, got 0"):
        LearnedProposalsConfig(count=0).build(8)


@pytest.mark.parametrize("staircase", [True, False])
def test_one_expert_gives_learned_proposals_bit_for_bit(staircase):
    torch.manual_seed(0)
    learned = LearnedProposalsConfig(count=7).build(8)
    torch.manual_seed(0)
    single = replace(SMALL, experts=1, staircase=staircase).build(8)
    levels = pyramid()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = single(levels)
    for got, expected in zip(found, learned(levels), strict=True):
        assert torch.equal(got, expected) and got.dtype == expected.dtype
    assert single.metrics()["expert_entropy"].item() == 0


def test_each_proposal_is_the_weighted_sum_of_its_own_experts():
    torch.manual_seed(0)
    proposals = replace(SMALL, start_temperature=1.0).build(8)
    torch.nn.init.uniform_(proposals.boxes)
    levels = pyramid()
    boxes, objects = proposals(levels)
    logits = proposals.generator(levels)
    for image in range(2):
        for n in range(7):
            weights = logits[image, :, n].exp() / logits[image, :, n].exp().sum()
            torch.testing.assert_close(boxes[image, n], weights @ proposals.boxes[:, n])
            torch.testing.assert_close(objects[image, n], weights @ proposals.features[:, n])


def test_weights_sum_to_one_for_each_proposal_and_differ_between_images_and_proposals():
    torch.manual_seed(0)
    proposals = SMALL.build(8)
    weights = proposals.weights(pyramid())
    assert weights.shape == (2, 3, 7)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2, 7))
    assert not torch.allclose(weights[0], weights[1], rtol=1e-3)
    assert weights.std(dim=2).min() > 1e-3


@pytest.mark.parametrize("standardize", [True, False])
def test_the_staircase_is_three_depth_wise_steps(standardize):
    torch.manual_seed(0)
    generator = replace(SMALL, standardize=standardize).build(8).generator
    p2, p3, p4, p5 = levels = pyramid(size=(24, 40))
    x = p2
    for step, level in zip(generator.steps, (p3, p4, p5), strict=True):
        # Channel by channel, which is what depth-wise means.
        planes = [
            F.conv2d(x[:, c : c + 1], step.weight[c : c + 1], step.bias[c : c + 1], stride=2, padding=1)
            for c in range(x.shape[1])
        ]
        x = torch.cat([*planes, level], dim=1)
    assert x.shape == (2, 32, 3, 5)
    # The order of the paper: resize every channel, then sum.
    x = F.interpolate(x, size=(6, 6), mode="bilinear").sum(dim=1).reshape(2, 36)
    if standardize:
        x = (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, correction=0, keepdim=True)
    expected = generator.fc2(generator.fc1(x).relu()).reshape(2, 3, 7)
    torch.testing.assert_close(generator(levels), expected, rtol=1e-4, atol=1e-5)


def test_large_features_leave_room_for_several_experts():
    """What all images share, such as a mean far from 0, must not decide on the experts."""
    torch.manual_seed(0)
    levels = [100 * level + 50 for level in pyramid()]
    warm = replace(SMALL, start_temperature=1.0)
    entropy = normalized_entropy(warm.build(8).weights(levels)).mean()
    assert entropy > 0.8
    assert normalized_entropy(replace(warm, standardize=False).build(8).weights(levels)).mean() < 0.3


def test_the_staircase_depends_on_every_level_and_without_it_on_p5_alone():
    for staircase, wanted in ((True, [True] * 4), (False, [False, False, False, True])):
        torch.manual_seed(0)
        generator = replace(SMALL, staircase=staircase).build(8).generator
        levels = [level.requires_grad_() for level in pyramid()]
        gradients = torch.autograd.grad(generator(levels).square().sum(), levels, allow_unused=True)
        assert [g is not None and bool(g.abs().sum() > 0) for g in gradients] == wanted


def test_levels_that_are_a_pixel_off_are_resized():
    levels = [torch.randn(1, 8, *size) for size in ((25, 39), (12, 19), (6, 9), (3, 4))]
    boxes, objects = SMALL.build(8)(levels)
    assert boxes.shape == (1, 7, 4) and objects.isfinite().all()


def test_another_number_of_levels_is_refused():
    with pytest.raises(ValueError, match="takes the 4 levels P2 to P5, got 5"):
        SMALL.build(8)([*pyramid(), torch.zeros(2, 8, 1, 1)])


@pytest.mark.parametrize(("staircase", "convolutions"), [(True, 60 * 256), (False, 0)])
def test_parameters_of_the_generator_are_the_documented_number(staircase, convolutions):
    proposals = DynamicProposalsConfig(staircase=staircase).build(256)
    count = sum(p.numel() for p in proposals.generator.parameters())
    assert count == convolutions + (30**2 + 1) * 1500 + (1500 + 1) * 4 * 300
    assert count == (3_168_060 if staircase else 3_152_700)
    assert proposals.boxes.shape == (4, 300, 4) and proposals.features.shape == (4, 300, 256)


def test_temperature_falls_linearly_to_exactly_one_and_stays():
    proposals = replace(SMALL, start_temperature=30.0, anneal_iterations=10).build(8)
    found = [proposals.temperature.item()]
    for _ in range(12):
        proposals.update()
        found.append(proposals.temperature.item())
    assert found[:11] == pytest.approx([30 - 2.9 * i for i in range(11)], rel=1e-6)
    assert found[10:] == [1.0, 1.0, 1.0]
    assert proposals.metrics()["expert_temperature"].item() == 1.0
    never = replace(SMALL, anneal_iterations=0).build(8)
    assert never.temperature.item() == 1.0


def test_temperature_resumes_from_a_checkpoint():
    first, second = SMALL.build(8), SMALL.build(8)
    for _ in range(4):
        first.update()
    second.load_state_dict(first.state_dict())
    first.update()
    second.update()
    assert torch.equal(first.temperature, second.temperature) and second.iteration.item() == 5
    assert "entropy" not in first.state_dict()


def test_entropy_is_high_when_hot_and_low_when_cold():
    torch.manual_seed(0)
    levels = [10 * level for level in pyramid()]
    found = []
    for temperature in (1e6, 30.0, 1.0, 1e-4):
        proposals = SMALL.build(8)
        proposals.temperature.fill_(temperature)
        proposals(levels)
        found.append(proposals.metrics()["expert_entropy"].item())
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(1, abs=1e-6) and found[-1] == pytest.approx(0, abs=0.05)


def test_evaluation_changes_no_state():
    proposals = SMALL.build(8).eval()
    before = {name: value.clone() for name, value in proposals.named_buffers()}
    with torch.inference_mode():
        proposals(pyramid())
    assert all(torch.equal(value, before[name]) for name, value in proposals.named_buffers())


def test_every_expert_and_the_generator_train_from_the_first_step():
    torch.manual_seed(0)
    proposals = SMALL.build(8)
    boxes, objects = proposals(pyramid())
    ((boxes - 0.3).square().sum() + (objects - 1).square().sum()).backward()
    for name, parameter in proposals.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    per_expert = proposals.boxes.grad.flatten(1)
    assert not torch.allclose(per_expert[0], per_expert[1], rtol=1e-4)


def test_dynamic_proposals_trace_as_one_graph():
    torch.compiler.reset()
    torch.manual_seed(0)
    proposals, levels = SMALL.build(8), pyramid()
    compiled = torch.compile(proposals, fullgraph=True, backend="aot_eager")
    expected = proposals(levels)
    gradients = torch.autograd.grad(expected[1].square().sum(), list(proposals.generator.parameters()))
    for got, wanted in zip(compiled(levels), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    compiled(levels)[1].square().sum().backward()
    for parameter, gradient in zip(proposals.generator.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    torch.compile(proposals.update, fullgraph=True, backend="aot_eager")()
    assert proposals.iteration.item() == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 0}, "proposals.experts must be at least 1, got 0"),
        ({"anneal_iterations": -1}, "proposals.anneal_iterations must be at least 0, got -1"),
        ({"start_temperature": 0.5}, "proposals.start_temperature must be finite and at least 1, got 0.5"),
        ({"start_temperature": float("nan")}, "must be finite and at least 1, got nan"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **fields).build(8)
