"""``drcnn compare``: two runs or two files of results."""

import json
import shutil

import pytest

from drcnn.cli import main as drcnn
from drcnn.compare import main
from drcnn.engine.metrics import evaluate_results
from drcnn.eval import main as evaluate


@pytest.fixture
def truth(tiny_coco):
    return tiny_coco / "annotations/instances_val.json"


@pytest.fixture
def results(truth, tmp_path):
    """Two files of results with masks: all objects, and one in two."""
    records = [
        {key: record[key] for key in ("image_id", "category_id", "bbox", "segmentation")} | {"score": 0.9}
        for record in json.loads(truth.read_text())["annotations"]
    ]
    files = []
    for name, kept in (("half", records[::2]), ("all", records)):
        files.append(str(tmp_path / f"{name}.json"))
        (tmp_path / f"{name}.json").write_text(json.dumps(kept))
    return files


def test_two_files(results, truth, tmp_path, capsys):
    out = tmp_path / "sub" / "compared.json"
    arguments = [*results, "--annotations", str(truth), "--resamples", "60", "--out", str(out)]
    assert drcnn(["compare", *arguments]) == 0
    captured = capsys.readouterr()
    for word in ("bbox", "segm", "AP75", "APs", "95% interval", "B - A", "circle"):
        assert word in captured.out
    assert "60/60 resamples" in captured.err
    content = json.loads(out.read_text())
    for kind in ("bbox", "segm"):
        row = content[kind]["summary"][0]
        wanted = [evaluate_results(truth, file, iou_type=kind).summary["AP"] for file in results]
        assert [row["first"], row["second"]] == pytest.approx(wanted)
        assert row["low"] > 0 and row["low"] <= row["difference"] <= row["high"]


def test_runs_are_evaluated_once(tiny_run, tmp_path, capsys):
    other = shutil.copytree(tiny_run, tmp_path / "other")
    assert evaluate([str(tiny_run)]) == 0
    capsys.readouterr()
    assert main([str(tiny_run), str(other), "--resamples", "20"]) == 0
    out = capsys.readouterr().out
    assert f"results in {tiny_run / 'eval' / 'results_val.json'}" in out and "evaluating 6 images" in out
    assert "bbox" in out and "segm" not in out and "+0.000 to +0.000 " in out
    written = json.loads((other / "eval/metrics_val.json").read_text())
    assert written["step"] == 7 and written["split"] == "val"
    assert main([str(tiny_run), str(other), "--resamples", "20"]) == 0
    assert "evaluating" not in capsys.readouterr().out
    # Results of another step are not those of this checkpoint.
    (other / "eval/metrics_val.json").write_text(json.dumps({**written, "step": 6}))
    assert main([str(tiny_run), str(other), "--resamples", "20"]) == 0
    assert capsys.readouterr().out.count("evaluating") == 1
    assert main([str(tiny_run), str(other), "--resamples", "20", "--split", "test", "--again"]) == 0
    assert capsys.readouterr().out.count("evaluating 3 images") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass two runs"),
        (["a"], "pass two runs"),
        (["a.json", "b.json"], "--annotations FILE and two json files of results go together"),
        (["a", "b", "--annotations", "x.json"], "go together"),
        (["a", "b", "--confidence", "1.5"], "--confidence must lie between 0 and 1"),
        (["a", "b", "--resamples", "0"], "--resamples must be at least 1"),
        (["a.json", "b.json", "--annotations", "x.json", "--data.root", "y"], "--data.root has no meaning"),
        (["a.json", "b.json", "--annotations", "x.json"], "annotation file x.json not found"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_file_that_is_no_list(results, truth, tmp_path, capsys):
    (tmp_path / "no.json").write_text("{}")
    assert main([results[0], str(tmp_path / "no.json"), "--annotations", str(truth)]) == 2
    assert "must hold a json list" in capsys.readouterr().err


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "drcnn compare runs/baseline runs/dynamic" in capsys.readouterr().out
