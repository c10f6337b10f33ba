"""A run that is stopped, or cannot write, at any moment: it can be continued as if nothing had been."""

import ctypes
import json
import os
import resource
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from drcnn.engine import finish, trainer, writing
from drcnn.engine.checkpoint import load_checkpoint
from drcnn.train import main

FLAGS = ["--optim.iterations", "4", "--data.workers", "0", "--train.log-every", "1"]
FLAGS += ["--train.checkpoint-every", "3", "--train.eval-every", "2"]
MEASURED = ("time_per_step", "data_time", "memory_mb")


class Killed(BaseException):
    """What stands for a kill: nothing after it happens."""


def train(light_run, run, *flags):
    return main([light_run, *FLAGS, *flags, "--out", str(run)])


def resume(light_run, run, *flags):
    begun = (run / "checkpoints" / "last.pt").exists()
    return train(light_run, run, *flags, *(["--resume"] * begun))


def outcome(run):
    """All that a run leaves and that follows from the seed, as plain types and bytes."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {"records": [{k: v for k, v in r.items() if k not in MEASURED} for r in lines]}
    for name in ("last.pt", "best.pt"):
        state = load_checkpoint(run / "checkpoints" / name)
        weights = {k: v.numpy().tobytes() for k, v in state["model"].items()}
        found[name] = weights | {k: state[k] for k in ("step", "position", "evaluated")}
        found[name]["best"] = state["best"] and {k: state["best"][k] for k in ("step", "AP")}
    for split in ("val", "test"):
        found[split] = (run / f"metrics_{split}.json").read_bytes()
    return found


@pytest.fixture(scope="module")
def unbroken(light_run, tmp_path_factory):
    run = tmp_path_factory.mktemp("stopping") / "run"
    assert train(light_run, run) == 0
    return run


def stop_after(step, light_run, run, *flags):
    """Begins a run that SIGTERM stops after an iteration."""
    update = trainer.Trainer.update

    def stopped(self, *arguments):
        if self.step == step - 1:
            signal.raise_signal(signal.SIGTERM)
        update(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "update", stopped)
        assert train(light_run, run, *flags) == 143


@contextmanager
def counted_writes(monkeypatch, last=None):
    """Counts the lasting writes of a run; a kill comes before that with the number ``last``, or in a line."""
    seen = []
    replace, write = os.replace, writing.LineFile.write

    def count(what):
        seen.append(what)
        if len(seen) - 1 == last:
            raise Killed

    def counted_replace(source, target):
        count(Path(target).name)
        replace(source, target)

    def counted_write(self, text):
        if self._path.name == "metrics.jsonl":
            if len(seen) == last:
                write(self, text[: len(text) // 2])
            count("line")
        write(self, text)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted_replace)
        patch.setattr(writing.LineFile, "write", counted_write)
        yield seen


def test_a_kill_between_any_two_writes_changes_nothing(light_run, unbroken, tmp_path, monkeypatch):
    """Also between the last checkpoint and the files that the end of a run writes."""
    with counted_writes(monkeypatch) as writes:
        assert train(light_run, tmp_path / "counted") == 0
    end = ["line", "metrics_val.json", "metrics_test.json"]
    assert writes[:3] == ["config.json", "metrics.jsonl", "line"] and writes[-3:] == end, writes
    assert "best.pt" in writes
    expected = outcome(unbroken)
    for number in range(2, len(writes)):
        run = tmp_path / str(number)
        with counted_writes(monkeypatch, number), pytest.raises(Killed):
            train(light_run, run)
        assert resume(light_run, run) == 0
        assert outcome(run) == expected, f"killed before write {number}: {writes[number]}"


def test_records_are_on_disk_before_the_checkpoint_that_comes_after_them(light_run, tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace

    def traced_fsync(handle):
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def traced_replace(source, target):
        order.append(f"-> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    assert train(light_run, tmp_path / "run", "--optim.iterations", "1") == 0
    saved = order[order.index("metrics.jsonl") :]
    assert saved[:4] == ["metrics.jsonl", ".last.pt.tmp", "-> last.pt", "checkpoints"]


@pytest.mark.parametrize(("number", "which"), [(signal.SIGINT, 0), (signal.SIGTERM, 1), (signal.SIGUSR1, 2)])
def test_stop_in_an_evaluation(light_run, unbroken, tmp_path, monkeypatch, capsys, number, which):
    """Between two iterations, at the last one, and on the test split with the best weights loaded."""
    run, evaluate, calls = tmp_path / "run", trainer.evaluate, []

    def stopped(*arguments, **options):
        calls.append(None)
        if len(calls) == which + 1:
            signal.raise_signal(number)
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", stopped)
        assert train(light_run, run) == 128 + number
    step = [2, 4, 4][which]
    assert f"stopped by {number.name} after iteration {step} with its state saved" in capsys.readouterr().err
    last = load_checkpoint(run / "checkpoints" / "last.pt")
    assert (last["step"], last["evaluated"]) == [(2, 0), (4, 2), (4, 4)][which]
    assert resume(light_run, run) == 0
    assert outcome(run) == outcome(unbroken)


def test_only_a_second_ctrl_c_ends_a_run_at_once(light_run, tmp_path, monkeypatch):
    update = trainer.Trainer.update

    def asked_twice(self, *arguments):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(number)
        update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "update", asked_twice)
        assert train(light_run, tmp_path / "run") == 143
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with trainer.StopRequest() as stop, pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
            assert stop.signal == signal.SIGINT
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, usual)


def test_a_completed_run_that_is_resumed_stays_as_it_is(light_run, unbroken, tmp_path):
    run = tmp_path / "run"
    assert train(light_run, run) == 0
    assert resume(light_run, run) == 0
    assert outcome(run) == outcome(unbroken)


@pytest.mark.parametrize("damage", ["torn", "empty", "bit", "text", "absent"])
def test_the_newest_whole_checkpoint_continues(light_run, unbroken, tmp_path, capsys, damage):
    run = tmp_path / "run"
    stop_after(3, light_run, run, "--train.keep-last", "2")
    folder = run / "checkpoints"
    assert sorted(p.name for p in folder.glob("step_*")) == ["step_00000002.pt", "step_00000003.pt"]
    for name in ("last.pt", "step_00000003.pt"):
        spoil(folder / name, damage)
    capsys.readouterr()
    assert train(light_run, run, "--train.keep-last", "2", "--resume") == 0
    lines = capsys.readouterr().out.splitlines()
    passed_over = [line for line in lines if line.startswith("passed over: checkpoint ")]
    assert [str(folder / "last.pt") in passed_over[0], len(passed_over)] == [True, 2 - (damage == "absent")]
    assert f"continued from {folder / 'step_00000002.pt'}" in lines and "resumed after iteration 2" in lines
    assert outcome(run) == outcome(unbroken)
    assert sorted(p.name for p in folder.glob("step_*")) == ["step_00000003.pt", "step_00000004.pt"]


def spoil(path, damage):
    data = path.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
    path.write_bytes({"torn": data[:middle], "empty": b"", "bit": flipped}.get(damage, b"no checkpoint"))
    if damage == "absent":
        path.unlink()


def test_best_weights_that_are_lost_are_said(light_run, tmp_path, capsys):
    run = tmp_path / "run"
    stop_after(3, light_run, run)
    spoil(run / "checkpoints" / "best.pt", "bit")
    capsys.readouterr()
    assert resume(light_run, run) == 0
    assert "the weights of step 2, the best so far, are lost: checkpoint " in capsys.readouterr().out
    assert load_checkpoint(run / "checkpoints" / "best.pt")["step"] == 4


def fails_in_one_line(capsys, code, text):
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1, error
    assert error.startswith("error: cannot write ") and text in error, error


@contextmanager
def largest_file(size):
    """No file can grow over so many bytes, as on a full disk or with a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["checkpoints/last.pt", "metrics.jsonl", "log.txt"])
def test_a_file_that_cannot_grow(light_run, unbroken, tmp_path, capsys, name):
    run = tmp_path / "run"
    stop_after(3, light_run, run)
    limit, size = 50_000, (run / name).stat().st_size
    before = (run / "checkpoints" / "last.pt").read_bytes()
    if name == "checkpoints/last.pt":
        assert size > limit
    else:  # leave room for 100 bytes, a part of a record or of a line
        filler = {"step": 1, "filler": "x" * (limit - size - 135)}
        with (run / name).open("a") as file:
            file.write(json.dumps(filler) + "\n")
    capsys.readouterr()
    with largest_file(limit):
        code = resume(light_run, run)
    fails_in_one_line(capsys, code, f"{run / name}: File too large")
    assert (run / "checkpoints" / "last.pt").read_bytes() == before
    assert resume(light_run, run) == 0
    found, expected = outcome(run), outcome(unbroken)
    found["records"] = [record for record in found["records"] if "filler" not in record]
    assert found == expected


@pytest.fixture
def small_disk(light_run, unbroken, tmp_path):
    """A file system with room for one checkpoint, but not for a second while the first is there."""
    size = int(1.7 * (unbroken / "checkpoints" / "last.pt").stat().st_size)
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small file system, and not everywhere")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(light_run, unbroken, tmp_path, small_disk, capsys):
    run = small_disk / "run"
    code = train(light_run, run)
    fails_in_one_line(capsys, code, "No space left on device")
    assert load_checkpoint(run / "checkpoints" / "last.pt")["step"] == 2
    moved = tmp_path / "moved"
    subprocess.run(["cp", "-r", str(run), str(moved)], check=True)
    assert resume(light_run, moved) == 0
    assert outcome(moved) == outcome(unbroken)


@contextmanager
def without_privileges():
    """Takes from root, for a while, what lets it write where the permissions say no."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, held = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, held) == 0
    fewer = (ctypes.c_uint32 * 6)(*held)
    fewer[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, among the effective ones
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        libc.capset(header, held)


@pytest.mark.parametrize("place", ["run", "checkpoints"])
def test_unwritable_folder(light_run, unbroken, tmp_path, capsys, place):
    run = tmp_path / "run"
    stop_after(3, light_run, run)
    folder = {"run": run, "checkpoints": run / "checkpoints"}[place]
    before = (run / "checkpoints" / "last.pt").read_bytes()
    capsys.readouterr()
    folder.chmod(0o555)
    try:
        with without_privileges():
            code = resume(light_run, run)
    finally:
        folder.chmod(0o755)
    fails_in_one_line(capsys, code, "Permission denied")
    assert (run / "checkpoints" / "last.pt").read_bytes() == before
    assert resume(light_run, run) == 0
    assert outcome(run) == outcome(unbroken)


def test_pictures_that_cannot_be_written(light_run, unbroken, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(finish, "draw_predictions", full)
        code = train(light_run, run, "--train.pictures", "1")
    fails_in_one_line(capsys, code, "predictions: No space left on device")
    assert resume(light_run, run) == 0
    assert outcome(run) == outcome(unbroken)
