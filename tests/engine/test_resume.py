"""A run that is killed again and again ends as one that never was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from drcnn.engine.checkpoint import load_checkpoint

KILLS = 20
MEASURED = ("time_per_step", "data_time", "memory_mb")


def random_moments() -> list[dict]:
    """Twenty moments in the order in which a run of 60 iterations comes to them."""
    generator = np.random.default_rng(20)
    moments = [{"step": 0}]  # before there is a checkpoint
    for step in np.sort(generator.integers(1, 54, KILLS - 7)).tolist():
        moments.append({"step": step, "wait": generator.uniform(0, 3)})
    for step, name in ((5, "last.pt"), (16, "best.pt"), (28, "last.pt"), (41, "last.pt")):
        moments.append({"step": step, "writing": name})
    moments.sort(key=lambda moment: moment["step"])
    # The last iteration is done: after the evaluation of its weights, and before that of the best.
    return [*moments, {"step": 60, "said": "step 60  val"}, {"step": 60, "said": "weights of step"}]


@pytest.fixture(scope="module")
def runs(light_run, tmp_path_factory):
    """An unbroken and a killed run, and what stood in the latter's folder of checkpoints after each kill."""
    folder = tmp_path_factory.mktemp("resume")
    unbroken, killed = folder / "unbroken", folder / "killed"
    plan = {"arguments": [light_run], "unbroken": str(unbroken), "killed": str(killed)}
    (folder / "plan.json").write_text(json.dumps(plan | {"moments": random_moments()}))
    program = [sys.executable, str(Path(__file__).with_name("killing.py")), str(folder / "plan.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    return unbroken, killed, json.loads(done.stdout)


def assert_same(one: object, other: object, name: str) -> None:
    """Compares nested values; tensors bit for bit."""
    assert type(one) is type(other), name
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape, name
        assert torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_same(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), name
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{name}[{place}]")
    else:
        assert one == other or (one != one and other != other), name  # or both are NaN


def records(run: Path) -> list[dict]:
    """All that was recorded and follows from the seed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in lines]


def test_the_kills_hit_what_they_should(runs):
    unbroken, _, found = runs
    assert len(found) == KILLS
    assert not any("last.pt" in names for names in found[:1]), "before the first checkpoint"
    assert any(name.endswith(".tmp") for names in found for name in names), "while one was written"
    told = records(unbroken)
    assert [r["step"] for r in told if "split" not in r] == list(range(3, 61, 3))
    evaluated = [(r["step"], r["split"]) for r in told if "split" in r]
    assert evaluated[:3] == [(20, "val"), (40, "val"), (60, "val")] and evaluated[3][1] == "test"
    collages = [value for record in told if "split" not in record for value in record["scale_collage"]]
    assert len(collages) == 60 and 0 < sum(collages) < 60, "both kinds of iterations occur"
    for name in ("iou_threshold", "beta"):
        assert len({record[name] for record in told if "split" not in record}) > 3, "it moves"


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_twenty_kills_change_no_bit_of_the_state(runs, name):
    """Weights, dynamics, optimizer, averages, scale training, the place in the data, the open log window."""
    one, other = (load_checkpoint(run / "checkpoints" / name) for run in runs[:2])
    assert_same(one, other, name)


def test_twenty_kills_leave_no_record_out_and_none_twice(runs):
    unbroken, killed, _ = runs
    assert records(unbroken) == records(killed)


@pytest.mark.parametrize("split", ["val", "test"])
def test_twenty_kills_change_no_metric(runs, split):
    one, other = ((run / f"metrics_{split}.json").read_bytes() for run in runs[:2])
    assert one == other


def test_nothing_half_written_stays(runs):
    _, killed, _ = runs
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == ["best.pt", "last.pt"]
