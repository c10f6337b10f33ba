"""Assignment by optimal transport; that by Hungarian matching is tested with Sparse R-CNN."""

import inspect
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from drcnn.dynamics import OptimalTransportConfig
from drcnn.errors import ConfigError
from drcnn.ops import ota_assign
from drcnn.structures import Targets

STAGES = 6
SIZES = torch.tensor([[100, 200], [100, 200]])


def targets(objects: tuple[int, ...] = (2, 1)) -> Targets:
    """Ground truths of equal size next to each other, padded to three."""
    box = torch.tensor([20.0, 20, 60, 60])
    boxes = torch.stack([box + torch.tensor([60.0, 0, 60, 0]) * g for g in range(3)]).expand(2, 3, 4)
    valid = torch.arange(3) < torch.tensor(objects).unsqueeze(1)
    labels = torch.arange(3).expand(2, 3)
    return Targets(torch.where(valid.unsqueeze(-1), boxes, 0.0), torch.where(valid, labels, 0), valid)


def predictions(count: int = 30, step: float = 1.5) -> tuple[Tensor, Tensor]:
    """Logits and boxes: a third of the predictions for each ground truth, each ``step`` further off it."""
    own = torch.arange(count) % 3
    offset = torch.tensor([60.0, 0, 60, 0]) * own.unsqueeze(1) + step * (torch.arange(count) // 3).unsqueeze(
        1
    )
    logits = torch.nn.functional.one_hot(own, 3).float() * 4 - 4
    return logits.expand(2, -1, -1), (torch.tensor([20.0, 20, 60, 60]) + offset).expand(2, -1, -1)


def run(config: OptimalTransportConfig, stages: int = STAGES) -> tuple[torch.nn.Module, list[Tensor]]:
    """Assigns the same predictions in every stage of one iteration."""
    assignment = config.build(stages)
    logits, boxes = predictions()
    return assignment, [assignment(logits, boxes, targets(), SIZES, stage) for stage in range(stages)]


def test_last_stage_is_plain_optimal_transport():
    assignment, found = run(OptimalTransportConfig())
    t = targets()
    logits, boxes = predictions()
    expected = ota_assign(logits, boxes, t.boxes, t.labels, t.valid, SIZES)
    assert torch.equal(found[-1], expected.gt_index)
    assert assignment.many_to_one
    # Each ground truth takes predictions near it, and the one that is padding takes none.
    for g in range(2):
        assert (found[-1][0] == g).nonzero().flatten().fmod(3).eq(g).all()
    assert (found[-1] < targets().valid.sum(dim=1, keepdim=True)).all()


def test_defaults_are_those_of_the_operator():
    config = asdict(OptimalTransportConfig())
    assert config.pop("unit_increasing") is True
    parameters = inspect.signature(ota_assign).parameters
    assert config == {name: parameters[name].default for name in config}


@pytest.mark.parametrize("stages", [1, 6])
def test_units_increase_by_half_from_stage_to_stage(stages):
    assignment = OptimalTransportConfig().build(stages)
    assert [assignment.unit_offset(s) for s in range(stages)] == [
        0.5 * (stages - 1 - s) for s in range(stages)
    ]
    constant = OptimalTransportConfig(unit_increasing=False).build(stages)
    assert {constant.unit_offset(s) for s in range(stages)} == {0.0}


def test_later_stages_match_more_loosely():
    increasing, found = run(OptimalTransportConfig())
    counts = [(index >= 0).sum().item() for index in found]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    _, found = run(OptimalTransportConfig(unit_increasing=False))
    assert len({(index >= 0).sum().item() for index in found}) == 1
    increasing.update()
    logged = increasing.metrics()
    assert [logged[f"positives_per_gt_{s}"].item() for s in range(STAGES)] == pytest.approx(
        [c / 3 for c in counts]
    )


@pytest.mark.parametrize(("k", "max_share", "expected"), [(2, 0.8, 6), (3, 0.8, 9), (29, 0.2, 12)])
def test_a_fixed_k_gives_each_ground_truth_so_many(k, max_share, expected):
    # Of 30 predictions an image, a share of 0.2 leaves 6 to the ground truths of each.
    _, found = run(OptimalTransportConfig(fixed_k=k, max_share=max_share, unit_increasing=False), stages=2)
    assert [(index >= 0).sum().item() for index in found] == [expected, expected]


def test_dynamic_k_follows_the_overlaps():
    t = targets((1, 1))
    found = []
    for step in (0.5, 1.5, 10.0):
        logits, boxes = predictions(step=step)
        assignment = OptimalTransportConfig().build(1)
        found.append((assignment(logits, boxes, t, SIZES, 0)[0] >= 0).sum().item())
    # Boxes of side 40 that are d off by x and y have IoU (40 - d)^2 / (3200 - (40 - d)^2); the eight largest
    # add up to 6.8, 5.1 and 1.6.
    assert found == [6, 5, 1]


def test_statistics_are_means_over_the_micro_batches_of_an_iteration():
    assignment = OptimalTransportConfig(fixed_k=2, unit_increasing=False).build(2)
    logits, boxes = predictions()
    for objects in ((2, 1), (3, 3)):
        for stage in range(2):
            assignment(logits, boxes, targets(objects), SIZES, stage)
    assert assignment.metrics()["positives_per_gt_0"].item() == 0  # the iteration has not ended
    assignment.update()
    logged = assignment.metrics()
    assert set(logged) == {f"{name}_{s}" for name in ("positives_per_gt", "conflict_share") for s in (0, 1)}
    assert all(value.dim() == 0 for value in logged.values())
    assert logged["positives_per_gt_1"].item() == 2
    assignment.update()
    assert assignment.metrics()["positives_per_gt_1"].item() == 0


def test_conflicts_are_counted_where_ground_truths_contend():
    t = targets((2, 2))
    contended = t._replace(boxes=t.boxes[:, :1].expand(2, 3, 4), labels=torch.zeros_like(t.labels))
    shares = []
    for case in (t, contended):
        assignment = OptimalTransportConfig(fixed_k=4, unit_increasing=False).build(1)
        assignment(*predictions(), case, SIZES, 0)
        assignment.update()
        shares.append(assignment.metrics()["conflict_share_0"].item())
    # Of equal ground truths each has an equal share in 8 of the 30 predictions.
    assert shares[0] < shares[1] <= 1 and shares[1] >= 4 / 30


def test_images_without_ground_truths_are_background():
    assignment = OptimalTransportConfig().build(1)
    assert (assignment(*predictions(), targets((0, 0)), SIZES, 0) == -1).all()
    assignment.update()
    assert assignment.metrics()["positives_per_gt_0"].item() == 0


def test_no_gradient_is_recorded_and_the_step_traces_as_one_graph():
    torch.compiler.reset()
    assignment = OptimalTransportConfig().build(2)
    logits, boxes = predictions()

    def step(logits: Tensor, boxes: Tensor) -> Tensor:
        found = assignment(logits, boxes, targets(), SIZES, 1)
        assignment.update()
        return found

    expected = step(logits.requires_grad_(), boxes.requires_grad_())
    logged = {name: value.item() for name, value in assignment.metrics().items()}
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(logits, boxes), expected)
    assert {name: value.item() for name, value in assignment.metrics().items()} == logged


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_q": 0}, "assignment.top_q must be at least 1, got 0"),
        ({"fixed_k": -1}, "assignment.fixed_k must be at least 0, got -1"),
        ({"iterations": 0}, "assignment.iterations must be at least 1, got 0"),
        ({"max_share": 1.0}, "assignment.max_share must be above 0 and below 1, got 1.0"),
        ({"epsilon": 0.0}, "assignment.epsilon must be above 0, got 0.0"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        replace(OptimalTransportConfig(), **fields).build(6)
