"""Whole runs through the command line, at a size that takes a fraction of a second a step."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drcnn import presets
from drcnn.config import Config, load_config, to_dict
from drcnn.data import CropConfig, DataConfig, SplitConfig, load_split, train_loader
from drcnn.dynamics import DynamicTrainingConfig
from drcnn.engine.checkpoint import load_checkpoint
from drcnn.engine.trainer import TrainConfig, Trainer, iteration_seed
from drcnn.errors import TrainingError
from drcnn.models import AnchorConfig, BoxHeadConfig, FasterRCNNConfig, FPNConfig, ResNetConfig, RPNConfig
from drcnn.train import main

TINY = FasterRCNNConfig(
    4,
    ResNetConfig("resnet18", norm="gn", frozen_stages=3),
    FPNConfig(channels=16),
    RPNConfig(AnchorConfig(sizes=(16, 32, 64, 128, 256)), pre_nms=100, post_nms=50, test_post_nms=50),
    BoxHeadConfig(channels=32, samples=32, sampling_ratio=1),
    training=DynamicTrainingConfig(window=5, iou_top_k=10),
)
COMPUTED = ("step", "epoch", "lr", "time_per_step", "data_time", "memory_mb")


def experiment(data: DataConfig) -> Config:
    return Config(TINY, data, presets.short_schedule(20), TrainConfig(log_every=1, pictures=0))


@pytest.fixture
def tiny(tmp_path, tiny_data, write_config):
    return write_config(tmp_path / "tiny.py", experiment(tiny_data))


def records(run, evaluations=False):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if ("split" in r) == evaluations]


def losses(run):
    """Every value that follows from the seed, by step; the rest is about time and memory."""
    return {r["step"]: {k: v for k, v in r.items() if k not in COMPUTED} for r in records(run)}


def weights(run, name="last.pt"):
    return load_checkpoint(Path(run) / "checkpoints" / name)["model"]


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].nan_to_num(-1), b[name].nan_to_num(-1)), name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny_coco, write_config):
    """A run of 20 steps that was never stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    splits = [SplitConfig(f"images/{s}", f"annotations/instances_{s}.json") for s in ("train", "val", "test")]
    sizes = dict(short_sides=(64,), max_size=96, test_short_side=64, test_max_size=96, pad_step=32)
    data = DataConfig(str(tiny_coco), *splits, batch_size=4, workers=0, **sizes)
    path = write_config(folder / "tiny.py", experiment(data))
    assert main([path, "--out", str(folder / "run")]) == 0
    return path, folder / "run"


def test_run_folder_holds_all(unbroken):
    path, run = unbroken
    config = load_config(path)
    assert json.loads((run / "config.json").read_text()) == to_dict(config)
    assert [r["step"] for r in records(run)] == list(range(1, 21))
    first = records(run)[0]
    assert {"loss", "loss_rpn_objectness", "loss_rpn_box", "loss_classification", "loss_box"} <= first.keys()
    assert {"iou_threshold", "beta", "grad_norm", "lr", "epoch", "time_per_step", "memory_mb"} <= first.keys()
    parts = sum(v for k, v in first.items() if k.startswith("loss_") and "share" not in k)
    assert first["loss"] == pytest.approx(parts, rel=1e-6)
    assert first["epoch"] == pytest.approx(4 / 12)
    assert [(r["step"], r["split"]) for r in records(run, evaluations=True)] == [(20, "val"), (20, "test")]
    for split in ("val", "test"):
        summary = json.loads((run / f"metrics_{split}.json").read_text())["summary"]
        assert {"AP", "AP50", "AP75", "AP90", "AR100"} <= summary.keys()
    text = (run / "log.txt").read_text()
    assert "lr 0.02 for 4 images" in text and "seed 0" in text and "operators: " in text


def test_checkpoint_holds_the_state_of_the_run(unbroken):
    path, run = unbroken
    state = load_checkpoint(run / "checkpoints" / "last.pt")
    assert (
        state["step"] == 20 and state["rng"] == {"seed": 0} and state["config"] == to_dict(load_config(path))
    )
    assert state["categories"] == ["circle", "square", "triangle", "star"] and len(state["category_ids"]) == 4
    assert any("iou_threshold" in name for name in state["model"])
    assert load_checkpoint(run / "checkpoints" / "best.pt")["best"]["step"] == 20


def test_equal_seeds_give_equal_losses(unbroken, tmp_path):
    path, run = unbroken
    assert main([path, "--out", str(tmp_path / "again")]) == 0
    assert losses(tmp_path / "again") == losses(run)
    assert_same_weights(weights(tmp_path / "again"), weights(run))


def test_other_seeds_and_workers(unbroken, tmp_path):
    path, run = unbroken
    short = ["--optim.iterations", "3", "--out"]
    assert main([path, "--data.workers", "2", *short, str(tmp_path / "workers")]) == 0
    assert losses(tmp_path / "workers") == {k: v for k, v in losses(run).items() if k <= 3}
    assert main([path, "--train.seed", "1", *short, str(tmp_path / "other")]) == 0
    assert losses(tmp_path / "other")[1]["loss"] != losses(run)[1]["loss"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stop_saves_and_resume_continues(unbroken, tmp_path, monkeypatch, capsys, number, code):
    path, run = unbroken
    out = str(tmp_path / "stopped")
    update = Trainer.update

    def stop_in_step_7(self, *arguments):
        if self.step == 6:
            os.kill(os.getpid(), number)
        update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", stop_in_step_7)
        assert main([path, "--out", out]) == code
    assert f"stopped by {number.name} after iteration 7" in capsys.readouterr().err
    with (Path(out) / "metrics.jsonl").open("a") as later:  # as if it had run on after its checkpoint
        later.write('{"step": 8, "loss": 0.0}\n{"step": 9, "lo')
    assert main([path, "--out", out, "--resume"]) == 0
    assert "resumed after iteration 7" in capsys.readouterr().out
    assert [r["step"] for r in records(out)] == list(range(1, 21))
    assert losses(out) == losses(run)
    assert_same_weights(weights(out), weights(run))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_the_whole_process_group(unbroken, tmp_path, number):
    """As a batch system sends it: the loader's workers get it too, and die of SIGTERM."""
    path, run = unbroken
    out = tmp_path / "run"
    command = [sys.executable, "-m", "drcnn.train", path, "--out", str(out), "--data.workers", "2"]
    command += ["--optim.iterations", "2000", "--optim.milestones", "14", "18", "--train.threads", "1"]
    with subprocess.Popen(command, start_new_session=True, stdout=-1, stderr=-1, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 3/"):
                os.killpg(process.pid, number)
                break
        _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert error.startswith(f"stopped by {number.name} after iteration ") and error.count("\n") == 1
    step = load_checkpoint(out / "checkpoints" / "last.pt")["step"]
    assert [r["step"] for r in records(out)] == list(range(1, step + 1))
    assert losses(out)[3] == losses(run)[3]


def test_resume_in_the_middle_of_a_log_window(unbroken, tmp_path, monkeypatch):
    path, run = unbroken
    out = str(tmp_path / "run")
    flags = ["--optim.iterations", "8", "--train.log-every", "4", "--out", out]
    update = Trainer.update

    def stop_in_step_6(self, *arguments):
        if self.step == 5:
            self.stop.signal = signal.SIGTERM
        update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", stop_in_step_6)
        assert main([path, *flags]) == 143
    assert main([path, *flags, "--resume"]) == 0
    expected = [losses(run)[s]["loss"] for s in (5, 6, 7, 8)]
    assert [r["step"] for r in records(out)] == [4, 8]
    assert records(out)[-1]["loss"] == pytest.approx(sum(expected) / 4, rel=1e-12)


def test_adamw_resumes_bit_for_bit_and_no_other_optimizer_continues(tiny, tmp_path, monkeypatch, capsys):
    flags = ["--optim.optimizer", "adamw", "--optim.lr", "1e-3", "--optim.iterations", "6"]
    assert main([tiny, *flags, "--out", str(tmp_path / "whole")]) == 0
    update = Trainer.update

    def stop_in_step_3(self, *arguments):
        if self.step == 2:
            self.stop.signal = signal.SIGTERM
        update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", stop_in_step_3)
        assert main([tiny, *flags, "--out", str(tmp_path / "run")]) == 143
    assert main([tiny, "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "trained with optim.optimizer adamw, and now it is sgd" in capsys.readouterr().err
    assert main([tiny, *flags, "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert "schedule: AdamW, 6 iterations" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_best_weights_are_evaluated_at_the_end(unbroken, tmp_path, monkeypatch):
    path, _ = unbroken
    out = tmp_path / "run"
    evaluate, seen = Trainer.evaluate, []

    def scripted(self, split, dataset, step):
        metrics = evaluate(self, split, dataset, step)
        if split == "val":
            metrics.summary["AP"] = {2: 0.1, 4: 0.5, 6: 0.3}[step]
        else:
            seen.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return metrics

    monkeypatch.setattr(Trainer, "evaluate", scripted)
    flags = ["--optim.iterations", "6", "--train.eval-every", "2", "--train.pictures", "2"]
    assert main([path, *flags, "--out", str(out)]) == 0
    assert [(r["step"], r["split"]) for r in records(out, evaluations=True)] == [
        (2, "val"), (4, "val"), (6, "val"), (4, "test"),
    ]  # fmt: skip
    assert load_checkpoint(out / "checkpoints" / "best.pt")["step"] == 4
    assert json.loads((out / "metrics_val.json").read_text())["step"] == 4
    assert_same_weights(seen[0], weights(out, "best.pt"))
    assert len(list((out / "predictions").glob("*.jpg"))) == 2


def test_loss_that_is_not_finite_stops_and_names_the_images(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--optim.lr", "1e30", "--optim.warmup-iterations", "0", "--optim.clip-norm", "None"]
    flags += ["--train.log-every", "3", "--train.checkpoint-every", "2"]
    assert main([tiny, *flags, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: a loss or gradient was not finite at iteration 2 ")
        and error.count("\n") == 1
    )
    data = load_config(tiny).data
    dataset = load_split(data, "train")
    _, second = train_loader(dataset, data, seed=0, start_step=0, num_steps=2)
    for index in second.indices.tolist():
        assert dataset.file_name(index) in error
    assert "--optim.lr" in error
    assert not list(out.glob("checkpoints/*"))


def test_training_goes_on_where_crops_leave_images_without_objects(tiny_data, tmp_path, write_config):
    crop = CropConfig(probability=1.0, short_sides=(64,), min_size=12, max_size=12)
    data = replace(tiny_data, crop=crop, batch_size=2, max_size=400)
    path = write_config(tmp_path / "tiny.py", experiment(data))
    assert main([path, "--out", str(tmp_path / "run"), "--optim.iterations", "4"]) == 0
    batches = train_loader(load_split(data, "train"), data, seed=0, start_step=0, num_steps=4)
    counts = [int(n) for batch in batches for n in batch.targets.valid.sum(dim=1)]
    assert 0 in counts and len(records(tmp_path / "run")) == 4


def test_gradients_are_clipped_by_the_norm_of_all_weights_together(tiny, tmp_path):
    config = load_config(tiny, ["--optim.clip-norm", "1"])
    trainer = Trainer(config, to_dict(config), tmp_path, resume=False, command="test")
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.backward({"loss": torch.stack([(i + 1) * w.sum() for i, w in enumerate(weights)]).sum()})
    norm = trainer.clip_gradients()
    expected = sum((i + 1) ** 2 * w.numel() for i, w in enumerate(weights)) ** 0.5
    assert norm.item() == pytest.approx(expected, rel=1e-3)  # single precision
    for i, weight in enumerate(weights):  # all by one factor
        assert weight.grad.unique().tolist() == pytest.approx([(i + 1) / norm.item()], rel=1e-4)


def test_weights_that_are_not_finite_are_never_written(tiny, tmp_path):
    config = load_config(tiny)
    trainer = Trainer(config, to_dict(config), tmp_path, resume=False, command="test")
    trainer.save("good.pt")
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).view(-1)[0] = float("nan")
    with pytest.raises(TrainingError, match="a weight is not finite after iteration 0"):
        trainer.save("bad.pt")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["good.pt"]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_trains(tiny, tmp_path, amp):
    out = tmp_path / amp
    assert main([tiny, "--train.amp", amp, "--optim.iterations", "2", "--out", str(out)]) == 0
    assert [r["step"] for r in records(out)] == [1, 2]
    assert (load_checkpoint(out / "checkpoints" / "last.pt")["scaler"] != {}) == (amp == "fp16")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("order", [("off", "fp16"), ("fp16", "off"), ("fp16", "fp16")])
def test_resume_with_another_number_type(tiny, tmp_path, order, optimizer):
    out = ["--out", str(tmp_path / "run")]
    for resume, amp in enumerate(order):
        flags = ["--train.amp", amp, "--optim.iterations", str(2 + resume), "--optim.optimizer", optimizer]
        assert main([tiny, *flags, *out, *(["--resume"] * resume)]) == 0
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3]


def test_iteration_seeds_differ():
    seeds = {iteration_seed(a, b, c) for a in range(3) for b in range(50) for c in range(3)}
    assert len(seeds) == 450 and iteration_seed(1, 2, 3) == iteration_seed(1, 2, 3)
    assert all(0 <= s < 2**63 for s in seeds)
