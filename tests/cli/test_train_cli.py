import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from drcnn import __version__, presets
from drcnn.cli import VERBS
from drcnn.cli import main as drcnn
from drcnn.config import Config
from drcnn.engine.checkpoint import save_checkpoint
from drcnn.train import main as train

REPOSITORY = Path(__file__).parents[2]
R101 = str(REPOSITORY / "configs" / "r101_fpn_2x.py")


@pytest.fixture
def tiny(tmp_path, tiny_data, write_config):
    config = Config(presets.light_faster_rcnn(4), tiny_data, presets.short_schedule(20))
    return write_config(tmp_path / "tiny.py", config)


def error_of(capsys) -> str:
    """The one line that the verb printed on stderr."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error.removeprefix("error: ").rstrip()


def test_coco_is_not_there(tmp_path):
    command = [sys.executable, "-m", "drcnn.train", R101, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "instances_train2017.json" in done.stderr
    assert "cocodataset.org" in done.stderr and "--data.root" in done.stderr


def test_dry_run_of_r101_2x(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert train([R101, "--dry-run", "--data.batch-size", "4"]) == 0
    out = capsys.readouterr().out
    assert "180000 iterations, lr x 0.1 at 120000 and 160000, warm-up over 500" in out
    assert "lr 0.02 for 16 images -> 0.005 for 4 images" in out
    parameters = next(line for line in out.splitlines() if line.startswith("model: resnet101"))
    assert 59.5 < float(parameters.split(", ")[2].split()[0]) < 61.5
    assert "data.batch_size = 4" in out and "optim.milestones = (120000, 160000)" in out
    assert "backbone: [2, 256, 64, 80]" in out and "fpn: [2, 256, 64, 80]" in out
    assert "detections: boxes [2, 100, 4], scores [2, 100]" in out
    assert not list(tmp_path.iterdir())


def test_dry_run_of_a_dense_detector(capsys):
    assert (
        train([str(REPOSITORY / "configs" / "fcos_r50_fpn_1x.py"), "--dry-run", "--model.head.nms", "0.55"])
        == 0
    )
    out = capsys.readouterr().out
    assert "model.head.nms = 0.55" in out and "lr 0.01 for 16 images" in out
    assert "fpn: [2, 256, 32, 40]" in out and "detections: boxes [2, 100, 4], scores [2, 100]" in out


# Millions of parameters, as published.
PUBLISHED = {
    "r50_fpn_1x": (41.5, 41.8),
    "faster_rcnn_r50_fpn_1x": (41.5, 41.8),
    "mask_rcnn_r50_fpn_1x": (44.2, 44.4),
    "dynamic_mask_rcnn_r50_fpn_1x": (44.2, 44.4),
    "cascade_rcnn_r50_fpn_1x": (69.1, 69.4),
    "retinanet_r50_fpn_1x": (37, 38),
    "retinanet_r101_fpn_2x": (56, 57),
    "fcos_r50_fpn_1x": (32, 33),
    "sparse_rcnn_r50_300_3x": (105.5, 106.5),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py")))
def test_every_config_runs_dry(capsys, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    assert train([str(REPOSITORY / "configs" / f"{name}.py"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("model: "))
    millions = float(re.search(r"([\d.]+) M parameters", line)[1])
    least, most = PUBLISHED.get(name, (1, 150))
    assert least <= millions <= most
    assert "detections: boxes [2, " in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.num-clases", "3"], "unknown flag --model.num-clases; did you mean --model.num-classes?"),
        (["--optim.lr", "fast"], "--optim.lr must be a number, got fast"),
        (["--dry-runs"], "unknown flag --dry-runs"),
        (
            ["--resume", "--overwrite"],
            "--resume continues a run and --overwrite deletes it; pass one of them",
        ),
        (["--resume"], "there is nothing to resume"),
        (["--train.device", "toaster"], "there is no device 'toaster'; use auto, cpu, cuda or cuda:N"),
        (["--train.threads", "0"], "train.threads must be at least 1 or None, got 0"),
        (["--model.num-classes", "3"], "has 4 classes but the model has 3; pass --model.num-classes 4"),
        (
            ["--data.root", "nowhere"],
            "nowhere/annotations/instances_train.json not found: pass --data.root FOLDER",
        ),
        (
            ["--model.backbone.frozen-stages", "9"],
            "the model cannot be built: frozen_stages must be 0 to 5, got 9",
        ),
    ],
)
def test_user_errors_are_one_line(tiny, tmp_path, capsys, flags, message):
    assert train([tiny, "--out", str(tmp_path / "run"), *flags]) == 2
    assert message in error_of(capsys)


def test_config_file_is_needed(capsys):
    assert train([]) == 2
    assert "r50_fpn_1x.py" in error_of(capsys)
    assert train(["--optim.lr", "1"]) == 2
    assert "no config file given" in error_of(capsys)
    assert train(["configs/absent.py"]) == 2
    assert "configs/absent.py does not exist" in error_of(capsys)


def test_a_run_is_not_overwritten_unasked(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    save_checkpoint(run / "checkpoints" / "last.pt", {"step": 1})
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "notes.txt").write_text("mine")
    assert train([tiny, "--out", str(run)]) == 2
    error = error_of(capsys)
    assert "--resume" in error and "--out" in error and "--overwrite" in error
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n'
    flags = ["--optim.iterations", "1", "--train.pictures", "0"]
    assert train([tiny, "--out", str(run), "--overwrite", *flags]) == 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 1, 1] and (run / "notes.txt").read_text() == "mine"


def test_torn_checkpoint_cannot_be_resumed(tiny, tmp_path, capsys):
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"PK\x03\x04torn")
    assert train([tiny, "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert f"checkpoint {last} is torn" in error_of(capsys)


def test_run_folder_that_cannot_be_made(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train([tiny, "--out", str(tmp_path / "file" / "run")]) == 2
    assert "cannot write the run folder" in error_of(capsys)


def test_splits_must_agree_on_their_classes(tiny, tmp_path, tiny_coco, capsys):
    content = json.loads((tiny_coco / "annotations" / "instances_val.json").read_text())
    content["categories"][0]["name"], content["categories"][1]["name"] = "square", "circle"
    changed = tmp_path / "instances_val.json"
    changed.write_text(json.dumps(content))
    assert train([tiny, "--out", str(tmp_path / "run"), "--data.val.annotations", str(changed)]) == 2
    assert "has other classes than" in error_of(capsys)


def test_help_explains_the_flags_and_the_fields(tiny, capsys):
    assert train(["--help"]) == 0
    general = capsys.readouterr().out
    assert "--dry-run" in general and "--optim.lr" in general and "--data.root" in general
    assert train([tiny, "--help"]) == 0
    own = capsys.readouterr().out
    assert "Learning rate for" in own and "(default: 20)" in own


def test_top_level_help_version_and_verbs(capsys):
    for arguments in ([], ["--help"]):
        assert drcnn(arguments) == 0
        out = capsys.readouterr().out
        assert all(verb in out for verb in VERBS)
    assert drcnn(["--version"]) == 0
    assert capsys.readouterr().out == f"drcnn {__version__}\n"
    assert drcnn(["trian"]) == 2
    assert error_of(capsys) == "drcnn has no verb 'trian'; did you mean 'drcnn train'?"
    assert drcnn(["train", "absent.py"]) == 2
    assert "absent.py does not exist" in error_of(capsys)


def test_top_level_help_does_not_wait_for_torch():
    code = "import sys; from drcnn.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "import sys; from drcnn.command import command\n"
        "@command\n"
        "def main(argv):\n"
        "    for _ in range(100000): print('line')\n"
        "    return 0\n"
        "sys.exit(main([]))"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.wait(timeout=60) == 141
    assert writer.stderr.read() == b""


def test_output_to_a_full_disk_is_one_line():
    code = (
        "import sys; from drcnn.command import command\n"
        "@command\n"
        "def main(argv):\n"
        "    for _ in range(100000): print('line')\n"
        "    return 0\n"
        "sys.exit(main([]))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device for the output; free space\n"


def test_lr_follows_the_batch(tiny, tmp_path):
    flags = ["--data.batch-size", "1", "--optim.iterations", "1", "--train.pictures", "0"]
    assert train([tiny, "--out", str(tmp_path / "run"), *flags]) == 0
    assert "lr 0.02 for 4 images -> 0.005 for 1 image" in (tmp_path / "run" / "log.txt").read_text()
