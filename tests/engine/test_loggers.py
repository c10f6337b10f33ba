"""TensorBoard for real, where it is installed; W&B against a stand-in, as it wants an account."""

import sys
import types

import pytest

from drcnn.engine import loggers
from drcnn.engine.loggers import open_loggers, scalars
from drcnn.errors import ConfigError

STEPS = [
    {"step": s, "loss": 1 / s, "scale_ratio": [0.1 * s, 0.2 * s], "scale_histogram": [0] * 20}
    for s in (2, 4, 6)
]


def test_numbers_are_named_by_their_place():
    assert scalars({"step": 3, "loss": 1.5, "scale_ratio": [1.0]}) == {"train/loss": 1.5}
    assert scalars({"step": 3, "split": "val", "AP": 0.2, "AP50": None}) == {"val/AP": 0.2}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_extra_is_named(monkeypatch, tmp_path, name):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"install it with: pip install 'drcnn\[{name}\]'"):
        open_loggers([name], tmp_path, {}, 0)


def test_tensorboard_shows_a_resumed_run_once(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'drcnn[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (first,) = open_loggers(["tensorboard"], tmp_path, {}, 0)
    for record in STEPS:
        first.write(record)
    first.write({"step": 6, "split": "val", "AP": 0.25})
    first.close()
    (second,) = open_loggers(["tensorboard"], tmp_path, {}, 4)  # step 6 came after the checkpoint
    second.write(STEPS[2] | {"loss": 7.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert shown == [(2, 0.5), (4, 0.25), (6, 7.0)]
    traced = [(e.step, round(e.value, 6)) for e in events.Scalars("train/scale_ratio")]
    assert traced == [(1, 0.2), (2, 0.4), (3, 0.4), (4, 0.8), (5, 0.6), (6, 1.2)]
    assert "train/scale_histogram" not in events.Tags()["scalars"]


class FakeRun:
    def __init__(self):
        self.logged, self.summary, self.finished = [], {}, False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module that remembers how it was started."""
    module = types.ModuleType("wandb")
    module.started, module.runs, module.fails = [], [], False

    class Error(Exception):
        pass

    def init(**settings):
        if module.fails:
            raise Error("api_key not configured (no-tty)\nmore")
        module.started.append(settings)
        module.runs.append(FakeRun())
        return module.runs[-1]

    module.errors, module.init = types.SimpleNamespace(Error=Error), init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delitem(sys.modules, "drcnn.engine.wandb_logger", raising=False)
    monkeypatch.setattr(loggers, "find_spec", lambda name: types.SimpleNamespace(origin="wandb.py"))
    yield module
    sys.modules.pop("drcnn.engine.wandb_logger", None)


def test_wandb_continues_its_run(wandb, tmp_path):
    for step in (0, 4):
        (logger,) = open_loggers(["wandb"], tmp_path, {"seed": 3}, step)
        logger.write(STEPS[2])
        logger.write({"step": 2, "split": "test", "AP": 0.5})  # of the best weights, at the end
        logger.close()
    first, second = wandb.started
    assert first["id"] == second["id"] and len(first["id"]) == 12
    assert first["resume"] == "allow" and first["dir"] == str(tmp_path) and first["config"] == {"seed": 3}
    assert wandb.runs[0].logged == [(6, {"train/loss": 1 / 6})]
    assert wandb.runs[0].summary == {"test/AP": 0.5} and wandb.runs[0].finished


def test_wandb_that_does_not_start_is_one_line(wandb, tmp_path):
    wandb.fails = True
    with pytest.raises(ConfigError, match=r"W&B does not start: api_key not configured \(no-tty\); log in"):
        open_loggers(["wandb"], tmp_path, {}, 0)


def test_a_folder_of_that_name_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    if getattr(loggers.find_spec("wandb"), "origin", None) is not None:
        pytest.skip("W&B is installed")
    with pytest.raises(ConfigError, match="is not installed"):
        open_loggers(["wandb"], tmp_path, {}, 0)
