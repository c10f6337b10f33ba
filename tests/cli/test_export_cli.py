"""``drcnn export`` and ``drcnn predict`` with what it writes."""

import json
import sys

import pytest
import torch

from drcnn.cli import main as drcnn
from drcnn.engine.exporting_check import Agreement


def error_of(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_onnx_predicts_as_the_run_does(tiny_run, tiny_coco, tmp_path, capsys):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"needs {name}, which the extra `export` installs")
    file = tmp_path / "made" / "tiny.onnx"
    flags = ["--model.box-head.score-threshold", "0.1"]
    assert drcnn(["export", str(tiny_run), "--format", "onnx", "--out", str(file), *flags]) == 0
    said = capsys.readouterr().out
    assert f"{file}: " in said and "MiB" in said and "multiples of 32 from 96" in said
    assert "checked on 3 images at two sizes" in said and "detections, the same; boxes differ by" in said
    results = []
    for index, source in enumerate((file, tiny_run)):
        out = tmp_path / str(index)
        command = ["predict", str(source), str(tiny_coco / "images" / "test"), "--out", str(out)]
        assert drcnn([*command, "--score", "0.15", "--device", "cpu"]) == 0
        results.append(json.loads((out / "results.json").read_text()))
        assert len(list(out.glob("*.jpg"))) == 3
    assert len(results[0]) == len(results[1]) > 10
    for found, expected in zip(*results, strict=True):
        assert found["image_id"] == expected["image_id"]
        assert found["score"] == pytest.approx(expected["score"], abs=1e-3)
    images = [json.loads((tmp_path / str(i) / "images.json").read_text()) for i in range(2)]
    assert images[0]["categories"] == images[1]["categories"]


def test_a_torch_program(tiny_run, tiny_coco, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = [str(path) for path in sorted((tiny_coco / "images" / "test").iterdir())[:2]]
    assert drcnn(["export", str(tiny_run), "--device", "cpu", "--images", *images]) == 0
    assert (tmp_path / "run.pt2").is_file()
    assert "checked on 2 images at two sizes" in capsys.readouterr().out
    extra = {"drcnn": ""}
    torch.export.load("run.pt2", extra_files=extra)
    assert json.loads(extra["drcnn"])["short_side"] == 64


def test_a_file_that_differs_is_said(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("drcnn.export.write", lambda predictor, out, *rest: out.write_bytes(b"x"))
    monkeypatch.setattr("drcnn.export.check", lambda *arguments: Agreement(7, unmatched=2))
    assert drcnn(["export", str(tiny_run), "--out", str(tmp_path / "x.pt2")]) == 1
    captured = capsys.readouterr()
    assert "7 detections, 2 without a counterpart" in captured.out
    assert captured.err == "error: the file does not find what the detector finds; do not use it\n"


def test_a_file_that_finds_nothing_was_not_compared(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("drcnn.export.write", lambda predictor, out, *rest: out.write_bytes(b"x"))
    monkeypatch.setattr("drcnn.export.check", lambda *arguments: Agreement(0))
    assert drcnn(["export", str(tiny_run), "--out", str(tmp_path / "x.pt2")]) == 1
    assert "nothing was compared" in error_of(capsys)


def test_where_nothing_can_be_written(tiny_run, tmp_path, capsys):
    folder = tmp_path / "x.pt2"
    folder.mkdir()
    assert drcnn(["export", str(tiny_run), "--out", str(folder)]) == 2
    assert f"cannot write {folder}" in error_of(capsys)


def test_a_program_is_not_predicted_with(tiny_coco, tmp_path, capsys):
    (tmp_path / "x.pt2").touch()
    assert drcnn(["predict", str(tmp_path / "x.pt2"), str(tiny_coco / "images" / "test")]) == 2
    assert "x.pt2 is a program of its own" in error_of(capsys)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "x.onnx"], "a file of --format torch is called .pt2, got --out x.onnx"),
        (["--format", "onnx", "--out", "x.pt2"], "a file of --format onnx is called .onnx"),
        (["--format", "tflite"], "--format"),
        (["--opset", "11"], "--opset must be at least 18, got 11"),
        (["--images", "none.jpg"], "none.jpg"),
        (["--data.root", "nowhere"], "no images to check on: "),
        (["--model.box-head.score-treshold", "1"], "did you mean --model.box-head.score-threshold?"),
    ],
)
def test_errors_are_one_line(tiny_run, monkeypatch, tmp_path, arguments, message, capsys):
    monkeypatch.chdir(tmp_path)
    assert drcnn(["export", str(tiny_run), *arguments]) == 2
    assert message in error_of(capsys)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_without_the_extra(tiny_run, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.delitem(sys.modules, "drcnn.engine.exporting_onnx", raising=False)
    assert drcnn(["export", str(tiny_run), "--format", "onnx"]) == 2
    assert "--format onnx needs onnxscript; install it with: pip install 'drcnn[export]'" in error_of(capsys)


def test_predict_names_the_extra(tiny_coco, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "drcnn.engine.onnx_detector", raising=False)
    out = str(tmp_path / "out")
    assert drcnn(["predict", "some.onnx", str(tiny_coco / "images" / "test"), "--out", out]) == 2
    message = "some.onnx needs onnxruntime; install it with: pip install 'drcnn[export]'"
    assert message in error_of(capsys)


@pytest.mark.parametrize(
    "flags",
    [["--tta", "flip"], ["--soft-nms", "linear"], ["--amp", "bf16"], ["--data.test-short-side", "99"]],
)
def test_an_onnx_file_is_taken_as_it_is(flags, tiny_coco, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert drcnn(["predict", "some.onnx", str(tiny_coco / "images" / "test"), "--out", out, *flags]) == 2
    assert "some.onnx finds objects as it was exported" in error_of(capsys)


def test_help_has_examples(capsys):
    assert drcnn(["export", "--help"]) == 0
    said = capsys.readouterr().out
    assert "drcnn export runs/mine --format onnx" in said and "--opset" in said
