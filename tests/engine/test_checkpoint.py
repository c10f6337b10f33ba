import hashlib
import json
import os
import zipfile
from dataclasses import replace

import pytest
import torch

from drcnn import presets
from drcnn.config import Config, to_dict
from drcnn.engine.checkpoint import (
    changed_settings,
    config_differences,
    find_checkpoint,
    load_checkpoint,
    matching_best,
    newest_intact,
    save_checkpoint,
    save_run,
)
from drcnn.engine.optim import OptimConfig
from drcnn.engine.trainer import TrainConfig
from drcnn.errors import ConfigError, TrainingError, WeightsError
from drcnn.weights.files import read_weights


def make_state(step=3, **changes):
    state = {
        "format": 1,
        "step": step,
        "model": {"weight": torch.arange(1000.0)},
        "config": {"optim": {"lr": 0.1}, "model": {"num_classes": 3}, "data": {"workers": 2}},
        "categories": ["a", "b"],
        "category_ids": [1, 7],
    }
    return state | changes


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoints" / "last.pt"
    save_checkpoint(path, make_state())
    state = load_checkpoint(path)
    assert state["step"] == 3 and state["category_ids"] == [1, 7]
    assert torch.equal(state["model"]["weight"], torch.arange(1000.0))
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("moment", ["save", "fsync", "replace"])
def test_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "last.pt"
    save_checkpoint(path, make_state(step=1))

    def crash(*args, **kwargs):
        if moment == "save":
            args[1].write(b"half of a checkpoint")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((torch, "save") if moment == "save" else (os, moment)), crash)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, make_state(step=2))
    assert load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, make_state(step=1))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        TrainingError, match=r"last\.pt: No space left on device; the one written before is unt"
    ):
        save_checkpoint(path, make_state(step=2))
    assert load_checkpoint(path)["step"] == 1


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_torn_checkpoint_is_one_line(tmp_path, share):
    path = tmp_path / "last.pt"
    save_checkpoint(path, make_state())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(WeightsError, match=r"last\.pt is torn") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_anywhere_is_found(tmp_path):
    """At every byte; torch itself notices none of those in a tensor."""
    path, flipped = tmp_path / "last.pt", tmp_path / "flipped.pt"
    save_checkpoint(path, make_state(model={"weight": torch.arange(100.0)}))
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(WeightsError, match=r"flipped\.pt is torn or damaged") as error:
            load_checkpoint(flipped)
        assert "\n" not in str(error.value)
    with pytest.raises(WeightsError, match="is torn or damaged"):
        read_weights(flipped)


def test_a_file_that_ends_anywhere_is_found(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, make_state(model={"weight": torch.arange(100.0)}))
    whole = path.read_bytes()
    content = whole.rindex(b"drcnn sha256 ")
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        if length == content:
            assert load_checkpoint(path)["step"] == 3, "all is there but the checksum"
        else:
            with pytest.raises(WeightsError, match=r"last\.pt is torn"):
                load_checkpoint(path)


def test_checkpoints_without_a_checksum_load(tmp_path):
    torch.save(make_state(), tmp_path / "earlier.pt")
    assert load_checkpoint(tmp_path / "earlier.pt")["step"] == 3


def test_others_read_a_checkpoint_with_its_checksum(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, make_state())
    assert torch.load(path, weights_only=True, mmap=True)["step"] == 3
    assert zipfile.ZipFile(path).testzip() is None
    assert read_weights(path).tensors.keys() == {"weight"}
    assert hashlib.sha256(path.read_bytes()[:-78]).hexdigest().encode() == path.read_bytes()[-65:-1]


WHOLE = {"optimizer": {}, "scaler": {}, "window": {}, "best": None}


def test_newest_intact(tmp_path):
    folder = tmp_path / "checkpoints"
    for name, step in (("last", 9), ("step_00000009", 9), ("step_00000006", 6), ("best", 7)):
        save_checkpoint(folder / f"{name}.pt", make_state(step, **WHOLE))
    save_checkpoint(folder / "step_by_step.pt", make_state(99, **WHOLE))
    assert newest_intact(tmp_path)[::2] == (folder / "last.pt", [])
    for torn, expected in (
        ("last", "step_00000009"),
        ("step_00000009", "best"),
        ("best", "step_00000006"),
    ):
        path = folder / f"{torn}.pt"
        path.write_bytes(path.read_bytes()[:-200])
        found = newest_intact(tmp_path)
        assert found.path == folder / f"{expected}.pt"
        assert found.state["step"] == {"step_00000009": 9, "best": 7, "step_00000006": 6}[expected]
        assert any(str(path) in line and "is torn" in line for line in found.notes)
    (folder / "step_00000006.pt").unlink()
    with pytest.raises(WeightsError, match="cannot be continued") as error:
        newest_intact(tmp_path)
    assert all(f"{name}.pt is torn" in str(error.value) for name in ("last", "step_00000009", "best"))
    assert "\n" not in str(error.value)


def test_weights_alone_cannot_continue_a_run(tmp_path):
    save_checkpoint(tmp_path / "checkpoints" / "last.pt", make_state())
    with pytest.raises(WeightsError, match=r"last\.pt cannot continue a run: it has no optimizer, scaler"):
        newest_intact(tmp_path)


def test_the_newest_checkpoints_are_kept(tmp_path):
    def names():
        return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())

    for step in (5, 10, 15):
        save_run(tmp_path, ["last.pt", "best.pt"], make_state(step))
    assert names() == ["best.pt", "last.pt"]
    for step in (5, 10, 15):
        save_run(tmp_path, ["last.pt"], make_state(step), keep_last=2)
    assert names() == ["best.pt", "last.pt", "step_00000010.pt", "step_00000015.pt"]
    assert load_checkpoint(tmp_path / "checkpoints" / "step_00000015.pt")["step"] == 15
    save_run(tmp_path, ["last.pt"], make_state(12), keep_last=3)  # it went back to 10 and on from there
    assert names() == ["best.pt", "last.pt", "step_00000010.pt", "step_00000012.pt"]


def test_the_record_of_the_best_is_that_of_the_file(tmp_path):
    path = tmp_path / "checkpoints" / "best.pt"
    best, later = {"step": 4, "AP": 0.4}, {"step": 8, "AP": 0.5}
    assert matching_best(tmp_path, make_state(6, best=None)) == (None, [])
    assert matching_best(tmp_path, make_state(4, best=best)) == (best, []), "it is written from the state"
    save_checkpoint(path, make_state(4, best=best))
    assert matching_best(tmp_path, make_state(6, best=best)) == (best, [])
    save_checkpoint(path, make_state(8, best=later))
    found, (note,) = matching_best(tmp_path, make_state(6, best=best))
    assert found == later and "is of step 8, not 4" in note
    path.unlink()
    found, (note,) = matching_best(tmp_path, make_state(6, best=best))
    assert found is None and "the weights of step 4, the best so far, are lost" in note


def test_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Dangerous:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "made-by-a-checkpoint"),))

    path = tmp_path / "last.pt"
    torch.save(make_state(best=Dangerous()), path)
    with pytest.raises(WeightsError, match="holds more than plain tensors"):
        load_checkpoint(path)
    assert not (tmp_path / "made-by-a-checkpoint").exists()


def test_other_files_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"other\.pt is not a checkpoint of drcnn: it has no format"):
        load_checkpoint(tmp_path / "other.pt")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    with pytest.raises(WeightsError, match="is not a checkpoint of drcnn"):
        load_checkpoint(tmp_path / "tensor.pt")
    torch.save(make_state(format=2), tmp_path / "newer.pt")
    with pytest.raises(WeightsError, match="has format 2, this drcnn reads 1"):
        load_checkpoint(tmp_path / "newer.pt")
    with pytest.raises(WeightsError, match="does not exist"):
        load_checkpoint(tmp_path / "absent.pt")


def test_find_checkpoint_prefers_the_best(tmp_path):
    with pytest.raises(WeightsError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    save_checkpoint(tmp_path / "checkpoints" / "last.pt", make_state())
    assert find_checkpoint(tmp_path).name == "last.pt"
    save_checkpoint(tmp_path / "checkpoints" / "best.pt", make_state())
    assert find_checkpoint(tmp_path).name == "best.pt"
    assert find_checkpoint(tmp_path / "checkpoints" / "last.pt").name == "last.pt"
    with pytest.raises(WeightsError, match="does not exist"):
        find_checkpoint(tmp_path / "absent")


def test_differences_of_configs():
    old = {"optim": {"lr": 0.1, "gone": 1}, "same": [1, 2]}
    new = {"optim": {"lr": 0.2}, "same": [1, 2]}
    assert config_differences(old, new) == {"optim.lr": (0.1, 0.2), "optim.gone": (1, None)}


def test_resume_refuses_another_model_and_tells_of_other_changes(tiny_data):
    config = Config(presets.light_faster_rcnn(3), tiny_data)
    state = make_state(config=to_dict(config))
    names = state["categories"]

    def changes(was=state, iterations=10, classes=names, **now):
        return changed_settings(was, to_dict(replace(config, **now)), classes, iterations)

    assert changes() == []
    assert changes(optim=OptimConfig(lr=0.2)) == ["optim.lr 0.02 -> 0.2"]
    assert changes(data=replace(tiny_data, workers=4)) == []
    # Another device or number of threads sums in another order.
    assert changes(train=TrainConfig(device="cuda")) == ["train.device auto -> cuda"]
    assert changes(train=TrainConfig(threads=4)) == ["train.threads None -> 4"]
    with pytest.raises(ConfigError, match=r"model\.num_classes 3, and now it is 4"):
        changes(model=replace(config.model, num_classes=4))
    with pytest.raises(ConfigError, match=r"optim\.optimizer sgd, and now it is adamw"):
        changes(optim=OptimConfig(optimizer="adamw"))
    with pytest.raises(ConfigError, match="classes a, b"):
        changes(classes=["b", "a"])
    with pytest.raises(ConfigError, match="is at iteration 3, after the last of 2"):
        changes(iterations=2)


def test_a_field_that_an_earlier_drcnn_did_not_have_is_no_change(tiny_data):
    plain = to_dict(Config(presets.light_faster_rcnn(3), tiny_data))
    earlier = json.loads(json.dumps(plain))
    del earlier["optim"]["optimizer"], earlier["optim"]["betas"], earlier["model"]["rpn"]["nms"]
    state = make_state(config=earlier)
    assert changed_settings(state, plain, state["categories"], 10) == []
    with pytest.raises(ConfigError, match=r"optim\.optimizer sgd"):
        plain["optim"]["optimizer"] = "adamw"
        changed_settings(state, plain, state["categories"], 10)
