"""Two ranks of gloo through the command line: they hold one state, which is that of a single rank."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from drcnn import eval as evaluation
from drcnn import train
from drcnn.config import Config
from drcnn.data import DataConfig, SplitConfig
from drcnn.dynamics import DynamicTrainingConfig, ScaleTrainingConfig
from drcnn.engine import rank_watch
from drcnn.engine.checkpoint import load_checkpoint
from drcnn.engine.optim import OptimConfig
from drcnn.engine.signals import RunStopped
from drcnn.engine.trainer import TrainConfig, Trainer
from drcnn.models import AnchorConfig, BoxHeadConfig, FasterRCNNConfig, FPNConfig, ResNetConfig, RPNConfig

MODEL = FasterRCNNConfig(
    4,
    ResNetConfig("resnet18", norm="gn", frozen_stages=5),
    FPNConfig(channels=16),
    RPNConfig(AnchorConfig(sizes=(16, 32, 64, 128, 256)), pre_nms=100, post_nms=50, test_post_nms=50),
    BoxHeadConfig(channels=32, samples=32, sampling_ratio=1),
    training=DynamicTrainingConfig(window=2, iou_top_k=5, min_iou_threshold=0.05, max_beta=10.0),
    scale=ScaleTrainingConfig(threshold=0.4, small_area=150.0, medium_area=600.0),
)
STEPS, HALF = 10, 5
MEASURED = ("time_per_step", "data_time", "memory_mb")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def enter_rank(rank: int, port: int, folder: Path) -> None:
    """Makes this process what torchrun would make it, with its output in a file."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    sys.stdout = sys.stderr = open(folder / f"output{rank}.txt", "a", buffering=1)


def start_ranks(function, *arguments) -> list[int]:
    """Starts two ranks that run ``function(rank, *arguments)`` of this file and returns their exit codes.

    They are no forks: autograd does not work in one if its threads had begun before.
    """
    command = [sys.executable, __file__, function.__name__]
    text = json.dumps(arguments, default=str)
    ranks = [subprocess.Popen([*command, str(rank), text]) for rank in range(2)]
    try:
        return [rank.wait(1200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@contextlib.contextmanager
def recorded(seen: list, last: int | None = None):
    """Notes the state after each iteration of a run."""
    update = Trainer.update

    def spy(self, *arguments):
        update(self, *arguments)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        digest = hashlib.sha256(b"".join(g.numpy().tobytes() for g in gradients)).hexdigest()
        dynamics, scale = self.model.dynamics, self.model.scale
        values = {"threshold": dynamics.iou_threshold, "beta": dynamics.beta, "ratio": scale.ratio}
        seen.append(
            {name: value.item() for name, value in values.items()}
            | {"collage": bool(scale.collage), "gradients": digest, "images": self.log.recent[-1][1].tolist()}
        )
        if len(seen) == last:
            raise RunStopped(signal.SIGUSR1, self.step)

    Trainer.update = spy
    try:
        yield
    finally:
        Trainer.update = update


def run(config_file: str, out, *flags: str, breaks: bool = False) -> list[dict]:
    """Runs, or breaks off one iteration after the checkpoint of half of the steps."""
    seen: list[dict] = []
    with recorded(seen, HALF + 1 if breaks else None):
        assert train.main([config_file, "--out", str(out), *flags]) == (128 + signal.SIGUSR1 if breaks else 0)
    return seen


def _ranks(rank: int, config_file: str, place: str) -> None:
    folder = Path(place)
    ports = json.loads((folder / "ports.json").read_text())
    try:
        seen = {}
        for name in ("two", "two_half", "two_two", "one_two"):
            enter_rank(rank, ports.pop(), folder)
            flags = ["--resume"] if name in ("two_two", "one_two") else []
            seen[name] = run(config_file, folder / name, *flags, breaks=name == "two_half")
            if name == "two_half" and rank == 0:
                shutil.copytree(folder / "two_half", folder / "two_one")
                shutil.copytree(folder / "two_half", folder / "two_two")
        enter_rank(rank, ports.pop(), folder)
        flags = ["--batch-size", "2", "--out", str(folder / "eval_two")]
        assert evaluation.main([str(folder / "one"), *flags]) == 0
        (folder / f"seen{rank}.json").write_text(json.dumps(seen))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.fixture(scope="module")
def data(tiny_coco, tmp_path_factory) -> DataConfig:
    """Half of the images have no object; all training images have one canvas, so that ranks pad alike."""
    root = tmp_path_factory.mktemp("ranks_data")
    (root / "images").symlink_to(tiny_coco / "images")
    (root / "annotations").mkdir()
    for split in ("train", "val", "test"):
        content = json.loads((tiny_coco / f"annotations/instances_{split}.json").read_text())
        if split == "train":
            kept = {image["id"] for image in content["images"][::2]}
            content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    splits = [SplitConfig(f"images/{s}", f"annotations/instances_{s}.json") for s in ("train", "val", "test")]
    sizes = dict(short_sides=(64,), max_size=64, test_short_side=64, test_max_size=96, pad_step=64)
    return DataConfig(str(root), *splits, batch_size=4, workers=0, filter_empty=False, **sizes)


@pytest.fixture(scope="module")
def config_file(data, tmp_path_factory, write_config) -> str:
    optim = OptimConfig(lr=0.02, reference_batch=4, warmup_iterations=4, iterations=STEPS, milestones=(8,))
    config = Config(MODEL, data, optim, TrainConfig(log_every=4, checkpoint_every=HALF, pictures=0))
    return write_config(tmp_path_factory.mktemp("ranks_config") / "tiny.py", config)


@pytest.fixture(scope="module")
def runs(config_file, tmp_path_factory):
    """Runs of one rank, of two, and of both in turn: folder, and what each rank saw in each run."""
    folder = tmp_path_factory.mktemp("ranks")
    one = {"one": run(config_file, folder / "one")}
    one["one_half"] = run(config_file, folder / "one_two", breaks=True)
    (folder / "ports.json").write_text(json.dumps([free_port() for _ in range(5)]))
    codes = start_ranks(_ranks, config_file, folder)
    output = "".join((folder / f"output{rank}.txt").read_text()[-3000:] for rank in range(2))
    assert codes == [0, 0], output
    one["two_one"] = run(config_file, folder / "two_one", "--resume")
    flags = ["--batch-size", "2", "--out", str(folder / "eval_one")]
    assert evaluation.main([str(folder / "one"), *flags]) == 0
    return folder, one, [json.loads((folder / f"seen{rank}.json").read_text()) for rank in range(2)]


def states(folder, *names: str) -> list[dict]:
    return [load_checkpoint(folder / name / "checkpoints/last.pt") for name in names]


def assert_close(state: dict, expected: dict) -> None:
    for name, value in expected["model"].items():
        torch.testing.assert_close(state["model"][name], value, rtol=0, atol=1e-5, equal_nan=True, msg=name)


def records(run) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in lines]


def test_ranks_have_one_state_at_each_step(runs):
    _, _, (first, second) = runs
    for name in ("threshold", "beta", "ratio", "collage", "gradients"):
        assert [step[name] for step in first["two"]] == [step[name] for step in second["two"]], name
    assert len({step["threshold"] for step in first["two"]}) > 2, "the dynamics move"
    assert len({step["collage"] for step in first["two"]}) == 2, "both kinds of iterations occur"
    assert len({step["gradients"] for step in first["two"]}) == STEPS


def test_two_ranks_train_as_one_with_all_images(runs):
    folder, one, ranks = runs
    one_state, two_state = states(folder, "one", "two")
    assert_close(two_state, one_state)
    (half,) = states(folder, "two_half")
    for name in ("fpn.inner_blocks.0.0.weight", "rpn.conv.weight", "box_head.classifier.weight"):
        moved = (one_state["model"][name] - half["model"][name]).abs().max()
        assert moved > 1e-4, "the weights move by far more than they differ"
    for alone, shared in zip(one["one"], ranks[0]["two"], strict=True):
        assert shared["collage"] == alone["collage"]
        for name in ("threshold", "beta", "ratio"):
            assert shared[name] == pytest.approx(alone[name], abs=1e-5)
    for alone, shared in zip(records(folder / "one"), records(folder / "two"), strict=True):
        if "split" not in alone:
            assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def test_the_ranks_share_the_batches_without_a_gap_or_a_repeat(runs, data):
    _, one, ranks = runs
    for alone, *shares in zip(one["one"], *(rank["two"] for rank in ranks), strict=True):
        batches = len(alone["images"]) // data.batch_size
        by_batch = [torch.tensor(share["images"]).view(batches, -1) for share in shares]
        assert torch.cat(by_batch, dim=1).flatten().tolist() == alone["images"]


def test_a_rank_without_objects_takes_part(runs):
    _, _, ranks = runs
    empty = [rank["two"][step]["images"] for step in range(STEPS) for rank in ranks]
    assert any(all(image % 2 for image in images) for images in empty), "odd images have no objects"


@pytest.mark.parametrize(("name", "line"), [("two_one", "ranks 2 -> 1"), ("one_two", "ranks 1 -> 2")])
def test_a_run_goes_on_with_another_number_of_ranks(runs, name, line):
    folder, one, ranks = runs
    one_state, resumed = states(folder, "one", name)
    assert_close(resumed, one_state)
    assert resumed["position"] == one_state["position"] and resumed["ranks"] == int(line[-1])
    assert line in (folder / name / "log.txt").read_text()
    seen = one["two_one"] if name == "two_one" else ranks[0]["one_two"]
    expected = one["one"] if name == "two_one" else ranks[0]["two"]
    assert [step["images"] for step in seen] == [step["images"] for step in expected[HALF:]]
    assert [r["step"] for r in records(folder / name)] == [r["step"] for r in records(folder / "one")]


def test_two_ranks_resume_bit_for_bit(runs):
    folder, _, _ = runs
    resumed, unbroken = states(folder, "two_two", "two")
    for name, value in unbroken["model"].items():
        torch.testing.assert_close(resumed["model"][name], value, rtol=0, atol=0, equal_nan=True, msg=name)
    assert records(folder / "two_two") == records(folder / "two"), "the sums of each rank are kept"
    assert "ranks 2 ->" not in (folder / "two_two/log.txt").read_text()


def test_shared_evaluation_is_that_of_one_rank(runs):
    folder, _, _ = runs
    for name in ("results_val.json", "metrics_val.json"):
        one, two = ((folder / f"eval_{ranks}" / name).read_bytes() for ranks in ("one", "two"))
        assert one == two and len(one) > 100


def _failing(rank: int, port: int, place: str, argv: list[str], hangs: bool) -> None:
    folder = Path(place)
    enter_rank(rank, port, folder)
    forward = Trainer.forward

    def stuck(self, batch):
        if rank == 1 and self.step == 1:
            time.sleep(600)
        return forward(self, batch)

    if hangs:
        Trainer.forward, rank_watch._GRACE = stuck, 3.0
    try:
        code = train.main([*argv, "--out", str(folder / "run")])
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def fail(tmp_path, *argv: str, hangs: bool = False) -> list[str]:
    """Runs two ranks that both have to end with code 2, and returns the lines of their errors."""
    codes = start_ranks(_failing, free_port(), tmp_path, [*argv], hangs)
    text = "".join((tmp_path / f"output{rank}.txt").read_text() for rank in range(2))
    assert codes == [2, 2], text
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_bad_file_on_one_rank_ends_all_with_one_line(config_file, data, tmp_path):
    shutil.copytree(data.root, tmp_path / "data")
    bad = sorted((tmp_path / "data/images/train").iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:300])
    (line,) = fail(tmp_path, config_file, "--data.root", str(tmp_path / "data"))
    assert re.match(r"error: rank [01] of 2: .*" + re.escape(bad.name), line)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.batch-size", "3"], r"batch_size 3 cannot be shared out evenly"),
        (["--train.sync-bn"], r"train.sync_bn has nothing to do: this model trains no batch norm"),
        (
            ["--train.sync-bn", "--model.backbone.norm", "bn", "--model.backbone.frozen-stages", "4"],
            r"train.sync_bn needs ranks on GPUs, torch cannot do it on cpu",
        ),
    ],
)
def test_what_ranks_cannot_do_is_said_once(config_file, tmp_path, flags, message):
    (line,) = fail(tmp_path, config_file, *flags)
    assert re.match(rf"error: rank [01] of 2: .*{message}", line)


def test_a_rank_that_hangs_is_named(config_file, tmp_path):
    (line,) = fail(tmp_path, config_file, "--train.rank-timeout", "0.1", hangs=True)
    assert re.match(r"error: rank 0 of 2: waited 0.1 minutes .* for rank 1 of 2 \(.*, pid \d+\)", line)


DIES = """
import os, pathlib, signal, threading, time


def die():
    while not pathlib.Path({metrics!r}).is_file() or not pathlib.Path({metrics!r}).read_text():
        time.sleep(0.01)
    pathlib.Path({killed!r}).write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


if os.environ["RANK"] == "1":
    threading.Thread(target=die, daemon=True).start()
"""


def test_a_killed_rank_ends_torchrun_within_a_minute(config_file, tmp_path):
    dying = tmp_path / "dying.py"
    places = {"metrics": str(tmp_path / "run/metrics.jsonl"), "killed": str(tmp_path / "killed")}
    dying.write_text(Path(config_file).read_text() + DIES.format(**places))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = ["--out", str(tmp_path / "run"), "--data.workers", "1", "--optim.iterations", "100000"]
    done = subprocess.run(
        [*launch, "-m", "drcnn.train", str(dying), *flags, "--train.log-every", "1"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    ended = time.time()
    assert done.returncode != 0
    assert re.search(r"^error: rank 1 of 2 \(.*, pid \d+\) died without a word", done.stderr, re.MULTILINE)
    assert "Signal 9 (SIGKILL)" in done.stderr, "torchrun's report"
    assert ended - float((tmp_path / "killed").read_text()) < 60


ENDS_LATE = """\
import os, time
import torch
import torch.distributed as dist
from drcnn.engine.distributed import process_group

send = dist.send


def late(*arguments, **options):
    time.sleep(0.2)
    send(*arguments, **options)


if os.environ["RANK"] == "0":
    dist.send = late
with process_group(torch.device("cpu")):
    dist.all_reduce(torch.ones(1))
"""


def test_a_rank_waits_for_a_goodbye_that_comes_late(tmp_path):
    """Python aborts if a thread wakes up in a collective while it ends."""
    script = tmp_path / "ends_late.py"
    script.write_text(ENDS_LATE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    name, own_rank, given = sys.argv[1:]
    globals()[name](int(own_rank), *json.loads(given))
