"""``drcnn convert`` and a run that begins with a detector's weights."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

import drcnn
from drcnn import presets
from drcnn.config import Config, to_dict
from drcnn.convert import main
from drcnn.engine.checkpoint import FORMAT, save_checkpoint
from drcnn.engine.trainer import TrainConfig
from drcnn.train import main as train


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a light detector with weights that differ from any other's."""
    model = presets.dynamic(presets.light_faster_rcnn(3))
    config = Config(model, presets.synthetic_shapes("data"))
    torch.manual_seed(5)
    state = {
        "format": FORMAT,
        "step": 7,
        "model": model.build().state_dict(),
        "config": to_dict(config),
        "categories": ["a", "b", "c"],
        "category_ids": [4, 5, 9],
    }
    save_checkpoint(tmp_path / "theirs.pt", state)
    return tmp_path / "theirs.pt", state


def error_of(capsys) -> str:
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_one_file_holds_all(checkpoint, tmp_path, capsys):
    path, state = checkpoint
    out = tmp_path / "sub" / "ours.safetensors"
    assert main([str(path), str(out), "--model.box-head.nms", "0.6"]) == 0
    said = capsys.readouterr().out
    assert (
        "source: drcnn" in said
        and "FasterRCNN of 3 classes (a, b, c) on resnet18" in said
        and str(out) in said
    )
    with safe_open(out, framework="pt") as file:
        stored = json.loads(file.metadata()["drcnn"])
    assert stored["config"]["model"]["box_head"]["nms"] == 0.6 and stored["step"] == 7
    predictor = drcnn.load(out, device="cpu")
    assert predictor.categories == ("a", "b", "c") and predictor.category_ids == (4, 5, 9)
    assert predictor.model.config.box_head.nms == 0.6
    for name, tensor in predictor.model.state_dict().items():
        torch.testing.assert_close(tensor, state["model"][name], rtol=0, atol=0, equal_nan=True, msg=name)
    image = torch.zeros(3, 40, 50, dtype=torch.uint8)
    assert predictor(image).boxes.shape[1] == 4


def test_half_of_the_space(checkpoint, tmp_path):
    path, _ = checkpoint
    sizes = []
    for name, flags in (("full", []), ("half", ["--half"])):
        out = tmp_path / f"{name}.safetensors"
        assert main([str(path), str(out), *flags]) == 0
        sizes.append(out.stat().st_size)
        drcnn.load(out, device="cpu")
    assert sizes[1] < 0.6 * sizes[0]


def test_what_is_wrong_is_one_line(checkpoint, tmp_path, capsys):
    path, _ = checkpoint
    assert main([str(path), str(tmp_path / "x.pth")]) == 2
    assert "must end in .safetensors" in error_of(capsys)
    out = tmp_path / "x.safetensors"
    out.write_text("mine")
    assert main([str(path), str(out)]) == 2
    assert "--overwrite" in error_of(capsys) and out.read_text() == "mine"
    assert main([str(path), str(out), "--overwrite"]) == 0
    assert main([str(tmp_path / "absent.pth"), str(tmp_path / "y.safetensors")]) == 2
    assert "absent.pth" in error_of(capsys)
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    assert main([str(tmp_path / "other.pth"), str(tmp_path / "y.safetensors")]) == 2
    assert "no detector that drcnn knows" in error_of(capsys)
    assert main([str(path), str(tmp_path / "y.safetensors"), "--model.num-classes", "4"]) == 2
    assert "another number of classes" in error_of(capsys)
    assert not (tmp_path / "y.safetensors").exists()


def test_help_and_module(checkpoint):
    done = subprocess.run([sys.executable, "-m", "drcnn.convert", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "safetensors" in done.stdout and "--overwrite" in done.stdout
    assert not done.stderr


def test_a_run_begins_with_a_detectors_weights(checkpoint, tiny_data, tmp_path, write_config, capsys):
    path, state = checkpoint
    settings = presets.short_schedule(10), TrainConfig(log_every=1, pictures=0)
    config = Config(presets.light_faster_rcnn(4), tiny_data, *settings)
    file = write_config(tmp_path / "config.py", config)
    run = tmp_path / "run"
    arguments = [file, "--out", str(run), "--train.weights", str(path), "--optim.lr", "1e-12"]
    assert train(arguments) == 2
    assert "another number of classes" in error_of(capsys)
    assert train([*arguments, "--train.partial-weights"]) == 0
    log = " ".join((run / "log.txt").read_text().split())
    left = ", ".join(f"box_head.{n}.{kind}" for n in ("classifier", "deltas") for kind in ("weight", "bias"))
    assert f"left at their initial values: {left}" in log
    trained = torch.load(run / "checkpoints" / "last.pt", weights_only=True)["model"]
    torch.testing.assert_close(trained["box_head.fc1.weight"], state["model"]["box_head.fc1.weight"])
