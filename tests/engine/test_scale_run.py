"""Dynamic scale training through the command line: each iteration's decision makes the next one's batch."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drcnn.config import load_config
from drcnn.data import load_split
from drcnn.data.sampler import StreamSampler
from drcnn.engine.checkpoint import load_checkpoint
from drcnn.engine.trainer import Trainer
from drcnn.train import main

TEMPLATE = """
from drcnn import presets
from drcnn.config import Config
from drcnn.data import AugmentationConfig, DataConfig, SplitConfig
from drcnn.dynamics import ScaleTrainingConfig
from drcnn.engine.trainer import TrainConfig
from drcnn.models import AnchorConfig, BoxHeadConfig, FasterRCNNConfig, FPNConfig, MaskHeadConfig
from drcnn.models import ResNetConfig, RPNConfig

config = Config(
    FasterRCNNConfig(
        4,
        ResNetConfig("resnet18", norm="gn", frozen_stages=3),
        FPNConfig(channels=16),
        RPNConfig(AnchorConfig(sizes=(16, 32, 64, 128, 256)), pre_nms=100, post_nms=50, test_post_nms=50),
        BoxHeadConfig(channels=32, samples=32, sampling_ratio=1),
        scale=ScaleTrainingConfig(threshold=0.4, small_area=200.0, medium_area=600.0),
    ),
    {data},
    presets.short_schedule(10),
    TrainConfig(log_every=4, pictures=0),
)
"""
PER_ITERATION = ["scale_ratio", "scale_collage"] + [f"loss_share_{s}" for s in ("small", "medium", "large")]
MEASURED = ("time_per_step", "data_time", "memory_mb")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, tiny_coco):
    from drcnn.data import DataConfig, SplitConfig

    splits = [SplitConfig(f"images/{s}", f"annotations/instances_{s}.json") for s in ("train", "val")]
    sizes = dict(short_sides=(64,), max_size=96, test_short_side=64, test_max_size=96, pad_step=32)
    data = DataConfig(str(tiny_coco), *splits, batch_size=2, workers=0, **sizes)
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TEMPLATE.replace("{data}", repr(data)))
    return str(path)


@pytest.fixture(scope="module")
def unbroken(config_file, tmp_path_factory):
    """A run of 10 iterations that was never stopped."""
    run = tmp_path_factory.mktemp("scale") / "run"
    assert main([config_file, "--out", str(run)]) == 0
    return run


def records(run: Path) -> list[dict]:
    """What was logged and follows from the seed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in lines if "split" not in r]


def joined(run: Path, name: str) -> list[float]:
    """The value of each iteration."""
    return [value for record in records(run) for value in record[name]]


def weights(run: Path) -> dict:
    return load_checkpoint(run / "checkpoints/last.pt")["model"]


def assert_same_run(run: Path, other: Path) -> None:
    assert records(run) == records(other)
    one, two = weights(run), weights(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_each_decision_follows_from_the_logged_ratio_before(unbroken):
    ratios, collages = joined(unbroken, "scale_ratio"), joined(unbroken, "scale_collage")
    assert len(ratios) == 10 and [len(r["scale_ratio"]) for r in records(unbroken)] == [4, 4, 2]
    replayed = [0] + [int(ratio <= 0.4) for ratio in ratios[:-1]]
    assert collages == replayed
    assert 0 < sum(collages) < 9, "both kinds of iterations occur"
    small, medium, large = (joined(unbroken, name) for name in PER_ITERATION[2:])
    assert small == ratios
    assert [sum(parts) for parts in zip(small, medium, large, strict=True)] == pytest.approx([1] * 10)
    batches = 0
    for record, done in zip(records(unbroken), (4, 8, 10), strict=True):
        batches = sum(4 if collage else 1 for collage in collages[:done])
        assert record["epoch"] == pytest.approx(batches * 2 / 12)
    state = load_checkpoint(unbroken / "checkpoints/last.pt")
    assert state["position"] == batches and state["model"]["scale.collages"] == sum(collages)
    twentieths = [min(int(20 * ratio), 19) for ratio in ratios]
    assert records(unbroken)[-1]["scale_histogram"] == [twentieths.count(b) for b in range(20)]
    assert "collages 0." in (unbroken / "log.txt").read_text()


def test_images_come_in_the_order_of_the_stream(config_file, unbroken, tmp_path, monkeypatch):
    fetch, seen = Trainer.fetch, []

    def spy(self, batches):
        micro_batches = fetch(self, batches)
        seen.append([index for batch in micro_batches for index in batch.indices.tolist()])
        return micro_batches

    monkeypatch.setattr(Trainer, "fetch", spy)
    assert main([config_file, "--out", str(tmp_path / "run")]) == 0
    data = load_config(config_file).data
    dataset = load_split(data, "train")
    sampler = StreamSampler(len(dataset), 2, 0, dataset.widths >= dataset.heights)
    total = [index for indices in seen for index in indices]
    assert total == [int(i) for step in range(len(total) // 2) for i in sampler.batch(step)]
    sizes = [8 if collage else 2 for collage in joined(unbroken, "scale_collage")]
    assert [len(indices) for indices in seen] == sizes


@pytest.mark.parametrize("workers", ["1", "3"])
def test_workers_change_nothing(config_file, unbroken, tmp_path, workers):
    assert main([config_file, "--data.workers", workers, "--out", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize("last", [1, 6])
def test_stopped_and_resumed_is_as_never_stopped(config_file, unbroken, tmp_path, monkeypatch, last):
    update, out = Trainer.update, ["--out", str(tmp_path / "run")]

    def stop(self, *arguments):
        if self.step == last - 1:
            self.stop.signal = signal.SIGTERM
        update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", stop)
        assert main([config_file, *out]) == 143
    assert main([config_file, *out, "--resume"]) == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_a_checkpoint_from_before_scale_training_resumes(config_file, tmp_path):
    plain = {"control": "never", "threshold": 0.1, "small-area": 32**2, "medium-area": 96**2}
    flags = [text for name, value in plain.items() for text in (f"--model.scale.{name}", str(value))]
    out = ["--out", str(tmp_path / "run"), *flags]
    assert main([config_file, *out, "--optim.iterations", "2"]) == 0
    path = tmp_path / "run/checkpoints/last.pt"
    state = load_checkpoint(path)
    state["model"] = {k: v for k, v in state["model"].items() if not k.startswith("scale.")}
    del state["position"], state["config"]["model"]["scale"], state["window"]["traces"]
    torch.save(state, path)
    assert main([config_file, *out, "--optim.iterations", "4", "--resume"]) == 0
    assert load_checkpoint(path)["position"] == 4
    assert joined(tmp_path / "run", "scale_collage")[-2:] == [0, 0]


def test_two_ranks_decide_alike(config_file, tmp_path):
    """Every rank writes what it did; no rank waits for another that has decided otherwise."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import json, sys\n"
        "from drcnn.engine.trainer import Trainer\n"
        "from drcnn.train import main\n"
        "trace, update = [], Trainer.update\n"
        "def spy(self, *arguments):\n"
        "    trace.append([self.position, float(self.model.scale.ratio), bool(self.model.scale.collage)])\n"
        "    update(self, *arguments)\n"
        "    open(f'{sys.argv[-1]}-{self.rank}.json', 'w').write(json.dumps(trace))\n"
        "Trainer.update = spy\n"
        "sys.exit(main(sys.argv[1:-1]))\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    command += [config_file, "--out", str(tmp_path / "run"), "--train.threads", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "trace")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"trace-{rank}.json").read_text()) for rank in range(2))
    assert len(first) == 10 and first == second
    assert 0 < sum(collage for *_, collage in first) < 10
    assert joined(tmp_path / "run", "scale_ratio") == [ratio for _, ratio, _ in first]


def test_an_error_names_the_images_of_a_whole_collage(config_file, tmp_path, capsys):
    flags = ["--optim.lr", "1e30", "--optim.warmup-iterations", "0", "--optim.clip-norm", "None"]
    flags += ["--model.scale.control", "always"]
    assert main([config_file, *flags, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "not finite at iteration 2 " in error and error.count(".jpg") == 8


@pytest.mark.parametrize("flags", [[], ["--model.scale.layout", "batch", "--model.scale.components", "3"]])
def test_masks_train_on_collages(config_file, tmp_path, flags):
    path = tmp_path / "masks.py"
    text = Path(config_file).read_text().replace("masks=False", "masks=True")
    text = text.replace(
        "        scale=", "        mask_head=MaskHeadConfig(channels=8, convs=1),\n        scale="
    )
    path.write_text(text)
    assert load_config(path).data == replace(load_config(config_file).data, masks=True)
    more = ["--model.scale.control", "always", "--optim.iterations", "2", "--train.log-every", "1"]
    assert main([str(path), *flags, *more, "--out", str(tmp_path / "run")]) == 0
    assert joined(tmp_path / "run", "scale_collage") == [1, 1]
    assert all(record["loss_mask"] > 0 for record in records(tmp_path / "run"))
