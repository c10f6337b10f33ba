"""Averaged weights, micro-batches, early stopping, compiling and layouts in whole, very short runs."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import drcnn
from drcnn.config import Config, to_dict
from drcnn.data import DataConfig, SplitConfig, split_batch
from drcnn.dynamics import DynamicTrainingConfig
from drcnn.engine.checkpoint import load_checkpoint
from drcnn.engine.ema import AveragedWeights
from drcnn.engine.optim import OptimConfig
from drcnn.engine.run_config import TrainConfig
from drcnn.engine.trainer import Trainer
from drcnn.loading import read_state
from drcnn.models import AnchorConfig, BoxHeadConfig, FasterRCNNConfig, FPNConfig, ResNetConfig, RPNConfig
from drcnn.train import main

# Every anchor and proposal is in the loss, so that nothing is drawn.
TINY = FasterRCNNConfig(
    4,
    ResNetConfig("resnet18", norm="gn", frozen_stages=3),
    FPNConfig(channels=8),
    RPNConfig(
        AnchorConfig(sizes=(16, 32, 64, 128, 256)),
        pre_nms=60,
        post_nms=30,
        test_pre_nms=60,
        test_post_nms=30,
        samples=10**6,
        positive_fraction=1.0,
    ),
    BoxHeadConfig(channels=16, samples=1000, positive_fraction=1.0, sampling_ratio=1),
    training=DynamicTrainingConfig(window=2, iou_top_k=4, error_top_k=2),
)
OPTIM = OptimConfig(lr=0.02, reference_batch=4, warmup_iterations=0, iterations=4, milestones=())
TRAIN = TrainConfig(log_every=1, pictures=0, threads=1, device="cpu")


@pytest.fixture
def config(tiny_data):
    return Config(TINY, tiny_data, OPTIM, TRAIN)


def trainer_of(config: Config, run: Path, **options) -> Trainer:
    return Trainer(config, to_dict(config), run, resume=False, command="test", **options)


def state_of(run: Path, name: str = "last.pt") -> dict:
    return load_checkpoint(run / "checkpoints" / name)


def records(run: Path, split: str | None = None) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in lines if record.get("split") == split]


def assert_same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name].nan_to_num(-1), two[name].nan_to_num(-1)) for name in one)


def stop_in(monkeypatch, iteration: int) -> None:
    update = Trainer.update

    def stop(self, *arguments):
        if self.step == iteration - 1:
            self.stop.signal = signal.SIGTERM
        update(self, *arguments)

    monkeypatch.setattr(Trainer, "update", stop)


def test_average_of_weights_follows_its_equation_and_copies_buffers():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    averaged, expected = AveragedWeights(model, 0.9), None
    for value in (1.0, 2.0, 5.0):
        with torch.no_grad():
            model[0].weight.fill_(value)
            model[1].running_mean.fill_(-value)
            model[1].num_batches_tracked.fill_(int(value))
        averaged.update_parameters(model)
        expected = value if expected is None else 0.9 * expected + 0.1 * value
    own = averaged.module
    torch.testing.assert_close(own[0].weight, torch.full((3, 2), expected))
    assert own[1].running_mean.tolist() == [-5.0] * 3 and own[1].num_batches_tracked == 5
    assert torch.equal(own[0].bias, model[0].bias)
    assert not any(p.requires_grad for p in own.parameters()) and not own.training


def test_averaged_weights_are_kept_evaluated_loaded_and_resumed(config, tmp_path, write_config, monkeypatch):
    config = replace(config, optim=replace(OPTIM, ema=0.5, accumulate=2), train=replace(TRAIN, eval_every=2))
    path, whole, run = write_config(tmp_path / "c.py", config), tmp_path / "whole", tmp_path / "run"
    evaluated, evaluate = [], Trainer.evaluate

    def spy(self, split, *arguments):
        evaluated.append({k: v.clone() for k, v in self.evaluated_model.state_dict().items()})
        return evaluate(self, split, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", spy)
        assert main([path, "--out", str(whole)]) == 0
    state, best = state_of(whole), state_of(whole, "best.pt")
    assert_same(evaluated[1], state["ema"])  # after the last iteration
    assert_same(evaluated[2], best["ema"])  # the test split, by the best weights
    trained = {n for n, p in config.model.build().named_parameters() if p.requires_grad}
    assert_same(*({n: v for n, v in state[key].items() if n not in trained} for key in ("model", "ema")))
    assert not any(torch.equal(state["model"][n], state["ema"][n]) for n in trained if "conv" in n)
    detector = drcnn.load(whole, device="cpu")
    assert_same(dict(detector.model.state_dict()), best["ema"])
    assert_same(read_state(whole)[1]["model"], best["ema"])
    with monkeypatch.context() as patch:
        stop_in(patch, 3)
        assert main([path, "--out", str(run)]) == 143
    assert main([path, "--out", str(run), "--resume"]) == 0
    for key in ("model", "ema"):
        assert_same(state_of(run)[key], state[key])


def test_micro_batches_give_the_gradients_of_the_whole_batch(config, tmp_path):
    """Of images that lie alike in both micro-batches, so that the divisors of the losses are alike too."""
    trainer = trainer_of(config, tmp_path)
    batch = next(trainer.batches())
    twice = torch.tensor([0, 1, 0, 1])
    images = batch.images._replace(tensor=batch.images.tensor[twice], sizes=batch.images.sizes[twice])
    targets = batch.targets._replace(boxes=batch.targets.boxes[twice], labels=batch.targets.labels[twice])
    targets = targets._replace(valid=batch.targets.valid[twice])
    batch = batch._replace(images=images, targets=targets)
    found = []
    for count in (1, 2):
        losses = trainer.compute_gradients(split_batch(batch, count))
        gradients = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
        sums = trainer.model.dynamics.sums.clone()
        trainer.model.dynamics.update()
        found.append((losses, gradients, sums))
    (whole, gradients, sums), (parts, added, added_sums) = found
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert len(added) == len(gradients) > 10
    for one, two in zip(gradients, added, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    # The statistics are over all images of both, gathered before one update.
    torch.testing.assert_close(added_sums, sums)
    assert sums[1] == 4 and trainer.model.dynamics.sums.sum() == 0


def test_a_step_of_micro_batches_counts_once(config, tmp_path, write_config):
    path = write_config(tmp_path / "c.py", replace(config, optim=replace(OPTIM, accumulate=4, iterations=3)))
    assert main([path, "--out", str(tmp_path / "run")]) == 0
    state = state_of(tmp_path / "run")
    assert state["position"] == 3 and state["model"]["dynamics.iteration"] == 1  # a window of 2 is done
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3]
    assert records(tmp_path / "run")[-1]["epoch"] == pytest.approx(3 * 4 / 12)


def test_a_batch_that_cannot_be_shared_out(config, tmp_path, write_config, capsys):
    path = write_config(tmp_path / "c.py", config)
    assert main([path, "--optim.accumulate", "3", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "batch_size 4 cannot be shared out evenly to 1 rank of 3 micro-batches" in error
    assert error.count("\n") == 1


def test_ranks_exchange_gradients_after_the_last_micro_batch_alone(tiny_coco, tmp_path, write_config):
    """Before that each holds its own, after it both hold the same."""
    splits = [SplitConfig(f"images/{s}", f"annotations/instances_{s}.json") for s in ("train", "val")]
    sizes = dict(short_sides=(64,), max_size=96, test_short_side=64, test_max_size=96, pad_step=32)
    data = DataConfig(str(tiny_coco), *splits, batch_size=4, workers=0, **sizes)
    optim = replace(OPTIM, accumulate=2, iterations=2, ema=0.9)
    path = write_config(tmp_path / "c.py", Config(TINY, data, optim, TRAIN))
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys, torch\n"
        "from drcnn.engine.trainer import Trainer\n"
        "from drcnn.train import main\n"
        "backward, out, seen = Trainer.backward, sys.argv.pop(), []\n"
        "def spy(self, losses):\n"
        "    backward(self, losses)\n"
        "    seen.append([p.grad.clone() for p in self.model.parameters() if p.grad is not None])\n"
        "    torch.save(seen, f'{out}-{self.rank}.pt')\n"
        "Trainer.backward = spy\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(script), path, "--out", str(tmp_path / "run"), str(tmp_path / "gradients")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"gradients-{rank}.pt") for rank in range(2))
    equal = [
        [torch.equal(*pair) for pair in zip(*own, strict=True)] for own in zip(first, second, strict=True)
    ]
    assert len(equal) == 4 and len(equal[0]) > 10
    assert not any(equal[0]) and all(equal[1])
    assert not any(equal[2]) and all(equal[3])
    assert state_of(tmp_path / "run")["step"] == 2


def test_training_stops_early_and_remembers_it(config, tmp_path, write_config, monkeypatch, capsys):
    train = replace(TRAIN, eval_every=1, patience=2, log_every=5)
    config = replace(config, optim=replace(OPTIM, iterations=9), train=train)
    path, out = write_config(tmp_path / "c.py", config), ["--out", str(tmp_path / "run")]
    evaluate, stops = Trainer.evaluate, [3]

    def scripted(self, split, *arguments):
        metrics = evaluate(self, split, *arguments)
        if split == "val":
            metrics.summary["AP"] = {1: 0.1, 2: 0.5, 3: 0.3, 4: 0.4}[self.step]
            if self.step in stops:
                self.stop.signal = signal.SIGTERM
        return metrics

    monkeypatch.setattr(Trainer, "evaluate", scripted)
    assert main([path, *out]) == 143
    stops.clear()
    assert state_of(tmp_path / "run")["since_best"] == 1
    assert main([path, *out, "--resume"]) == 0
    assert "stopped early, after iteration 4: no better AP in 2 evaluations" in capsys.readouterr().out
    state = state_of(tmp_path / "run")
    assert (state["step"], state["since_best"], state["best"]["step"]) == (4, 2, 2)
    assert main([path, *out, "--resume"]) == 0  # ended is ended: nothing is trained, or logged twice
    assert [r["step"] for r in records(tmp_path / "run", "val")] == [1, 2, 3, 4]
    assert [r["step"] for r in records(tmp_path / "run", "test")] == [2]
    assert [r["step"] for r in records(tmp_path / "run")] == [4]


def test_compiled_losses_are_those_of_the_plain_detector(config, tmp_path, monkeypatch):
    """As one graph with its backward; the code generator, which takes minutes, is left out."""
    compile_, asked = torch.compile, []

    def traced(model, **options):
        asked.append(options)
        return compile_(model, fullgraph=options["fullgraph"], backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    config = replace(config, model=replace(TINY, rpn=replace(TINY.rpn, samples=64, positive_fraction=0.5)))
    found = []
    for compiled in (False, True):
        own = replace(config, train=replace(TRAIN, compile=compiled))
        (tmp_path / str(compiled)).mkdir()
        trainer = trainer_of(own, tmp_path / str(compiled))
        batches = trainer.fetch(trainer.batches())
        found.append(trainer.compute_gradients(batches))
        assert trainer.model.state_dict().keys() == own.model.build().state_dict().keys()
    assert asked == [{"fullgraph": True, "options": {"fallback_random": True}}]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_channels_last_trains_alike(config, tmp_path):
    found = []
    for wanted in (False, True):
        (tmp_path / str(wanted)).mkdir()
        trainer = trainer_of(
            replace(config, train=replace(TRAIN, channels_last=wanted)), tmp_path / str(wanted)
        )
        found.append(trainer.compute_gradients(trainer.fetch(trainer.batches())))
    weight = trainer.model.backbone.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_all_switches_together_resume_bit_for_bit(config, tmp_path, write_config, monkeypatch, optimizer):
    optim = replace(OPTIM, optimizer=optimizer, fused=True, schedule="cosine", accumulate=2, ema=0.9, lr=1e-3)
    train = replace(TRAIN, deterministic=True, channels_last=True)
    path = write_config(tmp_path / "c.py", replace(config, optim=optim, train=train))
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main([path, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        stop_in(patch, 2)
        assert main([path, "--out", str(run)]) == 143
    assert main([path, "--out", str(run), "--resume"]) == 0
    for key in ("model", "ema"):
        assert_same(state_of(run)[key], state_of(whole)[key])
    assert not torch.are_deterministic_algorithms_enabled()
    assert "deterministic: equal bits" in (run / "log.txt").read_text()


def test_profile_traces_some_iterations(config, tmp_path, write_config, capsys):
    path = write_config(tmp_path / "c.py", replace(config, optim=replace(OPTIM, iterations=5)))
    assert main([path, "--profile", "2", "--out", str(tmp_path / "run")]) == 0
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"ProfilerStep#3", "ProfilerStep#4"} <= names and "ProfilerStep#2" not in names
    said = capsys.readouterr().out
    assert "profile of 2 iterations" in said and "trace.json" in said and "perfetto" in said
    assert main([path, "--profile", "9", "--optim.iterations", "1", "--out", str(tmp_path / "short")]) == 0
    assert "no profile: the run ended 11 iterations too early" in capsys.readouterr().out


def test_a_stalled_loader_is_said(config, tmp_path, write_config, monkeypatch):
    train = replace(TRAIN, stall_seconds=0.2)
    path = write_config(tmp_path / "c.py", replace(config, optim=replace(OPTIM, iterations=1), train=train))
    batches = Trainer.batches

    def slow(self):
        for batch in batches(self):
            time.sleep(1.0)
            yield batch

    monkeypatch.setattr(Trainer, "batches", slow)
    assert main([path, "--out", str(tmp_path / "run")]) == 0
    assert (
        "stalled: waiting for the loader, before iteration 1 for " in (tmp_path / "run/log.txt").read_text()
    )
