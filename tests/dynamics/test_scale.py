"""Dynamic scale training: the share of small objects, the decision that follows, and its state."""

import math
import socket
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from drcnn.dynamics import ScaleTraining, ScaleTrainingConfig, box_area, matched_area
from drcnn.dynamics.hashing import random_bit
from drcnn.errors import ConfigError
from drcnn.structures import Targets

AREAS = torch.tensor(
    [[100.0, 1023.0, 1024.0], [9215.0, 9216.0, 1e6]]
)  # small, small, medium; medium, large x 2
NONE, ALL = torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
REGRESSION = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 5.0]])
CLASSIFICATION = torch.tensor([[6.0, 2.0, 1.0], [0.5, 0.25, 0.25]])


def record(policy: ScaleTraining, positive=ALL, regression=REGRESSION, classification=CLASSIFICATION) -> None:
    policy.record(
        AREAS,
        positive,
        regression=lambda chosen: torch.where(chosen, regression, 0.0).sum(),
        classification=lambda chosen: torch.where(chosen, classification, 0.0).sum(),
    )


def targets(*sides: float) -> Targets:
    """One image with square objects, and a slot of padding."""
    boxes = torch.tensor([[[10.0, 10.0, 10 + s, 10 + s] for s in (*sides, 5.0)]])
    valid = torch.arange(len(sides) + 1).unsqueeze(0) < len(sides)
    return Targets(boxes, torch.zeros_like(valid, dtype=torch.int64), valid)


def test_share_of_the_regression_loss_by_hand():
    policy = ScaleTraining()
    record(policy)
    policy.decide()
    assert policy.ratio.item() == 3 / 20
    assert policy.shares.tolist() == [3 / 20, 7 / 20, 10 / 20]
    assert not policy.collage


@pytest.mark.parametrize(
    ("positive", "ratio"),
    [
        pytest.param(NONE, 0.0, id="no positives"),
        pytest.param(AREAS >= 1024, 0.0, id="no small ones"),
        pytest.param(AREAS < 1024, 1.0, id="only small ones"),
    ],
)
def test_the_ends_of_the_share(positive, ratio):
    policy = ScaleTraining()
    record(
        policy, positive, torch.where(positive, REGRESSION, math.nan)
    )  # what is not positive has no meaning
    policy.decide()
    assert policy.ratio.item() == ratio
    assert policy.collage.item() is (ratio <= 0.1)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_a_loss_that_is_not_finite_is_no_feedback(poison, place):
    policy = ScaleTraining()
    loss = REGRESSION.clone()
    loss[place] = poison
    record(policy, regression=loss)
    policy.decide()
    assert policy.ratio.item() == 0 and policy.shares.tolist() == [0, 0, 0]
    record(policy)
    policy.decide()
    assert policy.ratio.item() == 3 / 20, "and is forgotten"


@pytest.mark.parametrize(
    ("feedback", "ratio"),
    [("regression", 3 / 20), ("classification", 8 / 10), ("both", 11 / 30), ("input", 1 / 3)],
)
def test_feedback(feedback, ratio):
    policy = ScaleTraining(ScaleTrainingConfig(feedback=feedback))
    policy.observe(targets(20, 50, 200))
    record(policy)
    policy.decide()
    assert policy.ratio.item() == pytest.approx(ratio, rel=1e-6)
    assert policy.shares[0].item() == 3 / 20, "what is logged is the regression loss"


def test_the_loss_of_classes_is_computed_only_if_it_is_asked_for():
    def fail(chosen):
        raise AssertionError

    for feedback in ("regression", "input"):
        policy = ScaleTraining(ScaleTrainingConfig(feedback=feedback))
        policy.record(AREAS, ALL, regression=lambda chosen: chosen.sum(), classification=fail)


def test_input_without_objects():
    policy = ScaleTraining(ScaleTrainingConfig(feedback="input"))
    policy.observe(targets())
    policy.decide()
    assert policy.ratio.item() == 0 and policy.collage


def test_micro_batches_and_heads_add_up():
    whole, parts = ScaleTraining(), ScaleTraining()
    record(whole)
    for positive in (AREAS < 500, (AREAS >= 500) & (AREAS < 9300), AREAS >= 9300):
        record(parts, positive)
    whole.decide()
    parts.decide()
    assert parts.ratio.item() == whole.ratio.item()
    assert parts.iterations.item() == 1


def test_threshold_and_areas_are_settings():
    policy = ScaleTraining(ScaleTrainingConfig(threshold=0.15, small_area=1024, medium_area=9500))
    record(policy)
    policy.decide()
    assert policy.collage, "a share equal to tau asks for collages"
    assert policy.shares.tolist() == [3 / 20, 12 / 20, 5 / 20]


def decisions(policy: ScaleTraining, iterations: int, positive=NONE) -> list[bool]:
    """What is decided for each iteration, from the first on."""
    found = []
    for _ in range(iterations):
        found.append(policy.collage.item())
        record(policy, positive)
        policy.decide()
        assert policy.was_collage.item() is found[-1]
    assert policy.iterations.item() == iterations and policy.collages.item() == sum(found)
    return found


def test_controls():
    assert decisions(ScaleTraining(), 3) == [False, True, True], "the first iteration is regular"
    assert decisions(ScaleTraining(), 3, ALL) == [False, False, False]
    assert decisions(ScaleTraining(ScaleTrainingConfig("always")), 3) == [True, True, True]
    assert decisions(ScaleTraining(ScaleTrainingConfig("never")), 3) == [False, False, False]


def test_random_decisions_are_fair_and_resume():
    config = ScaleTrainingConfig("random")
    found = decisions(ScaleTraining(config), 400)
    assert not found[0] and 160 < sum(found) < 240
    changes = sum(a != b for a, b in pairwise(found))
    assert 160 < changes < 240, "one decision tells nothing about the next"
    assert decisions(ScaleTraining(replace(config, seed=1)), 400) != found
    first, second = ScaleTraining(config), ScaleTraining(config)
    decisions(first, 30)
    second.load_state_dict(first.state_dict())
    again = []
    for _ in range(30):
        again.append(second.collage.item())
        second.decide()
    assert again == found[30:60]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    random_bit(0, torch.tensor(7))
    assert torch.equal(torch.get_rng_state(), before), "no generator is drawn from"


def test_state_continues_in_the_middle_of_an_iteration():
    whole, first, second = ScaleTraining(), ScaleTraining(), ScaleTraining()
    for policy in (whole, first):
        record(policy, AREAS < 1024)
        policy.decide()
        record(policy, AREAS > 1024)
    second.load_state_dict(first.state_dict())
    for policy in (whole, second):
        record(policy, AREAS < 1024)
        policy.decide()
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_a_state_from_before_scale_training_begins_anew():
    model = torch.nn.ModuleDict({"scale": ScaleTraining(), "layer": torch.nn.Linear(2, 2)})
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("scale")}
    assert not model.load_state_dict(state).missing_keys
    torn = model.state_dict()
    del torn["scale.ratio"]
    with pytest.raises(RuntimeError, match=r"scale\.ratio"):
        model.load_state_dict(torn)


def test_areas_of_matched_ground_truths():
    own = targets(10, 20)
    assert box_area(own.boxes).tolist() == [[100, 400, 25]]
    index = torch.tensor([[1, 0, -1, 1]])
    assert matched_area(own, index)[0, [0, 1, 3]].tolist() == [400, 100, 400]
    empty = Targets(*(part[:, :0] for part in own[:3]))
    assert matched_area(empty, torch.zeros(1, 4, dtype=torch.int64)).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"components": 5}, "components must be 1, 4, 9"),
        ({"components": 0, "layout": "batch"}, "components must be"),
        ({"small_area": 10.0, "medium_area": 5.0}, "small_area must be between"),
        ({"threshold": math.nan}, "threshold must be at least 0"),
        ({"min_box_area": -1.0}, "min_box_area must be at least 0"),
    ],
)
def test_settings_that_cannot_be_used(fields, message):
    with pytest.raises(ConfigError, match=message):
        ScaleTrainingConfig(**fields)
    assert ScaleTrainingConfig(components=5, layout="batch").most_batches == 5
    assert ScaleTrainingConfig("never").most_batches == 1


def _rank(rank: int, port: int, folder) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(histories(slice(rank, rank + 1)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def histories(images: slice) -> dict[str, torch.Tensor]:
    """Ratios and decisions of some iterations, of which each rank sees one image, by control."""
    found = {}
    for control in ("feedback", "random"):
        policy = ScaleTraining(ScaleTrainingConfig(control, threshold=0.2))
        rows = []
        for step in range(12):
            loss = torch.rand(2, 3, generator=torch.Generator().manual_seed(step))[images]
            area = AREAS[images] if step != 3 else AREAS[images] * 1e4
            policy.record(
                area,
                torch.full_like(area, step != 5, dtype=torch.bool),
                regression=lambda chosen, loss=loss: torch.where(chosen, loss, 0.0).sum(),
                classification=lambda chosen: chosen.sum(),
            )
            policy.decide()
            rows.append(torch.stack([policy.ratio, policy.collage]))
        found[control] = torch.stack(rows)
    return found


def test_ranks_decide_alike_and_as_one_rank_with_all_images(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_rank, (port, tmp_path), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = histories(slice(None))
    for control, rows in expected.items():
        assert 0 < rows[:, 1].sum() < 12
        assert torch.equal(ranks[0][control], ranks[1][control])
        torch.testing.assert_close(ranks[0][control], rows)
