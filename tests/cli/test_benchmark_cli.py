"""``drcnn benchmark``: our detectors beside torchvision's, and the paper's table."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drcnn import benchmark, presets
from drcnn.benchmark import TABLE_6, main
from drcnn.cli import main as drcnn
from drcnn.config import Config

SMALL = ["--size", "64", "96", "--rounds", "2", "--threads", "1", "--device", "cpu"]


def test_a_run_beside_torchvision(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "deep" / "speed.json"
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save(images / "a.png")
    flags = ["--batch-sizes", "1", "2", "--backends", "auto", "reference", "--images", images.name]
    assert main([str(tiny_run), *SMALL, *flags, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "64 x 96 px, 2 rounds in turns" in captured.out and f"written: {out}" in captured.out
    assert "benchmark 2/2 rounds" in captured.err
    written = json.loads(out.read_text())
    rows = written["timings"]
    assert [(row["batch"], row["name"].count("torchvision"), row["backend"]) for row in rows] == [
        (batch, theirs, backend)
        for batch in (1, 2)
        for theirs, backend in ((0, "auto"), (0, "reference"), (1, ""))
    ]
    for row in rows:
        assert 0 < row["p50_ms"] <= row["p95_ms"] and row["images_per_second"] > 0
        assert row["peak_mb"] > 1
        assert f"{row['p50_ms']:.1f}" in captured.out
    for first in (0, 3):
        ours, reference, theirs = rows[first : first + 3]
        assert ours["speed_of_rival"] == pytest.approx(theirs["p50_ms"] / ours["p50_ms"])
        assert reference["objects"] == ours["objects"] and "speed_of_rival" not in theirs


def test_configs_and_flags_of_their_fields(tiny_data, write_config, tmp_path, capsys):
    files = []
    for name, model in (("one", presets.light_faster_rcnn(4)), ("two", presets.light_cascade_rcnn(4))):
        files.append(write_config(tmp_path / f"{name}.py", Config(model, tiny_data)))
    flags = ["--model.rpn.test-post-nms", "50", "--dtypes", "bf16"]
    assert main([*files, *SMALL, *flags]) == 0
    out = capsys.readouterr().out
    assert "note: two stands alone: torchvision has no detector with a cascade" in out
    lines = [line.split() for line in out.splitlines() if "bf16" in line]
    assert [line[0] for line in lines] == ["one", "one,", "two"]
    assert main([*files, *SMALL, "--no-torchvision"]) == 0
    assert "torchvision " not in capsys.readouterr().out


def test_table_6(monkeypatch, capsys):
    # The light twins of the paper's four detectors.
    light = (
        presets.light_faster_rcnn(4),
        presets.light_cascade_rcnn(4),
        presets.light_mask_rcnn(4),
        presets.light_cascade_rcnn(4),
    )
    monkeypatch.setattr(benchmark, "_table_6", lambda: dict(zip(TABLE_6, light, strict=True)))
    assert main(["--table6", *SMALL]) == 0
    out = capsys.readouterr().out
    for name, paper in TABLE_6.items():
        assert any(line.startswith(name) and line.rstrip().endswith(str(paper)) for line in out.splitlines())
    assert "Cascade R-CNN (1.24 in the paper)" in out and "Cascade Mask R-CNN (1.55 in the paper)" in out


def test_the_usual_and_the_papers_detectors():
    usual, table = benchmark._usual(), benchmark._table_6()
    assert list(usual) == ["Faster R-CNN", "Dynamic R-CNN"] and list(table) == list(TABLE_6)
    assert usual["Dynamic R-CNN"] == table["Dynamic R-CNN"]
    masks = [config.mask_head is not None for config in table.values()]
    stages = [len(getattr(config.box_head, "iou_thresholds", "1")) for config in table.values()]
    assert masks == [False, False, True, True] and stages == [1, 3, 1, 3]
    assert {config.backbone.name for config in table.values()} == {"resnet50"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "100", "96"], "--size must be multiples of 32"),
        (["--rounds", "0"], "--rounds"),
        (["--batch-sizes", "0"], "--batch-sizes"),
        (["--dtypes"], "--dtypes needs"),
        (["--threads", "0"], "--threads"),
        (["--dtypes", "fp8"], "--dtypes"),
        (["--table6", "some/run"], "--table6 goes without detectors, got some/run"),
        (["some/run"], "does not exist"),
        (["some/config.py"], "does not exist"),
        (["--round", "3"], "did you mean --rounds?"),
        (["--images", "some/absent/*.jpg"], "no image or video matches"),
    ],
)
def test_errors_are_one_line(arguments, words, capsys):
    assert main([*SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_a_file_that_cannot_be_written(tiny_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = Path(tmp_path / "file" / "speed.json")
    assert main([str(tiny_run), *SMALL, "--rounds", "1", "--no-torchvision", "--out", str(out)]) == 2
    assert "pass another --out" in capsys.readouterr().err


def test_help_has_examples(capsys):
    assert drcnn(["benchmark", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("drcnn benchmark --table6", "--batch-sizes", "--dtypes", "--backends", "Examples"):
        assert word in text
