"""``drcnn report``: where its numbers come from, and what it refuses."""

import json
import os
import re
import shutil
import sys

from drcnn.cli import main as drcnn
from drcnn.engine.metrics import evaluate_results
from drcnn.report import main


def content_of(page) -> dict:
    """The data that a page shows."""
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', page.read_text(), re.S)
    return json.loads(found[1])


def panels_of(page) -> dict[str, dict]:
    return {panel["title"]: panel for section in content_of(page)["sections"] for panel in section["panels"]}


def error_of(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_one_run(reported_run, tiny_content, capsys):
    run = reported_run("first")
    assert drcnn(["report", str(run), "--images", "3", "--image-side", "64"]) == 0
    assert f"written: {run / 'report.html'} (" in capsys.readouterr().out
    page = run / "report.html"
    panels = panels_of(page)
    results = json.loads((run / "eval" / "results_val.json").read_text())
    metrics = evaluate_results(tiny_content("val")[0], results)
    row = panels["AP by class and size"]["variants"]["0,0"]["rows"][0]["cells"]
    assert row[0] == "all classes" and abs(row[2] - 100 * metrics.summary["AP"]) < 1e-6
    assert abs(row[3] - 100 * metrics.summary["AP50"]) < 1e-6
    loss = panels["Loss, sum of all"]["variants"][""]["data"][0]
    assert loss["x"] == list(range(10, 101, 10)) and loss["y"][0] == 0.3
    assert {"DST decisions", "Loss by size of object", "Learning rate", "Calibration"} < set(panels)
    gallery = next(s["gallery"] for s in content_of(page)["sections"] if s["gallery"])
    assert len(gallery["pictures"]) == 3
    said = panels["Command and environment"]["variants"][""]["rows"]
    assert ["first", "command", "drcnn train configs/x.py --out first"] in [r["cells"] for r in said]


def test_page_asks_for_nothing(reported_run):
    run = reported_run("</script><b>bold")
    assert main([str(run), "--images", "1"]) == 0
    text = (run / "report.html").read_text()
    assert "default-src 'none'" in text and "<b>bold" not in text
    assert not re.search(r'(src|href)="(?!data:|#)', text.split("<script>")[0])
    assert content_of(run / "report.html")["runs"][0]["name"] == "script><b>bold"


def test_several_runs_show_what_differs(reported_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [reported_run("a"), reported_run("b", 1, iou_threshold=0.6)]
    assert main([*map(str, runs), "--images", "2"]) == 0
    panels = panels_of(tmp_path / "report.html")
    threshold = panels["T_now, threshold of label assignment"]["variants"][""]["data"]
    assert [(trace["y"][0], trace["meta"]["run"]) for trace in threshold] == [(0.4, 0), (0.6, 1)]
    settings = panels["Settings"]
    assert settings["selects"][0][1][0] == "1 that differ"
    assert settings["variants"]["0"]["rows"][0]["cells"] == ["train.seed", "0", "1"]
    assert len(settings["variants"]["1"]["rows"]) > 50


def test_evaluates_where_there_are_no_results_and_keeps_them(tiny_run, reported_run, capsys):
    logged = reported_run("logged")
    for name in ("metrics.jsonl", "config.json"):
        os.rename(logged / name, tiny_run / name)
    assert main([str(tiny_run), "--images", "1", "--device", "cpu"]) == 0
    assert "evaluating" in capsys.readouterr().out
    kept = tiny_run / "eval" / "results_val.json"
    assert len(json.loads(kept.read_text())) == 600  # 100 detections on each of 6 images
    assert main([str(tiny_run), "--images", "1"]) == 0
    assert f"results of {kept}" in capsys.readouterr().out
    os.utime(kept, (1, 1))  # older than the weights
    assert main([str(tiny_run), "--images", "1", "--device", "cpu"]) == 0
    assert "evaluating" in capsys.readouterr().out


def test_curves_alone(reported_run, capsys):
    run = reported_run("going")
    (run / "checkpoints" / "best.pt").unlink()
    assert main([str(run)]) == 0
    assert "going is shown without an analysis" in capsys.readouterr().out
    assert "Calibration" not in panels_of(run / "report.html")
    assert main([str(run), "--no-analysis"]) == 0
    assert "note" not in capsys.readouterr().out


def test_errors_are_one_line(reported_run, tmp_path, capsys):
    run = reported_run("run")
    damaged = reported_run("damaged")
    (damaged / "eval" / "results_val.json").write_text("[{")
    for arguments, message in (
        ([], "no run given"),
        ([str(tmp_path / "absent")], "there is no run"),
        ([str(run), "--data-root", str(tmp_path)], "--no-analysis leaves detections out"),
        ([str(damaged)], "results_val.json is not readable json"),
        ([str(run), "--images", "-1"], "--images must be at least 0, got -1"),
        ([str(run), "--splt", "val"], "did you mean --split"),
        ([str(run), "--no-analysis", "--out", str(run / "log.txt" / "page.html")], "pass another --out"),
    ):
        assert main(arguments) == 2, arguments
        assert message in error_of(capsys)


def test_without_plotly(reported_run, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("drcnn.engine.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert main([str(reported_run("run"))]) == 2
    assert "needs plotly; install it with: pip install 'drcnn[report]'" in error_of(capsys)


def test_the_data_are_checked_once_for_each_data_set(reported_run, tiny_coco, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [str(reported_run("a")), str(reported_run("b", 1))]
    assert main([*runs, "--no-analysis"]) == 0
    assert "Findings" not in panels_of(tmp_path / "report.html")
    assert main([*runs, "--no-analysis", "--check"]) == 0
    section = next(s for s in content_of(tmp_path / "report.html")["sections"] if s["name"] == "data")
    assert section["intro"].startswith("a, b: no errors")
    panels = {panel["title"]: panel["variants"][""] for panel in section["panels"]}
    assert [row["cells"][0] for row in panels["Splits"]["rows"]] == ["train", "val", "test"]
    found = json.loads((tiny_coco / "annotations" / "instances_train.json").read_text())
    row = panels["Splits"]["rows"][0]["cells"]
    assert row[1] == len(found["images"]) and row[3] == sum(not a["iscrowd"] for a in found["annotations"])
    assert row[3] == sum(row["cells"][1] for row in panels["Objects of each class"]["rows"])
    for title in ("Size of objects", "Height over width", "Objects in an image", "Best IoU over the anchors"):
        for trace in panels[title]["data"]:
            assert len(trace["x"]) == len(trace["y"]) and abs(sum(trace["y"][:-1]) - 100) < 0.01


def test_what_is_wrong_with_the_data_is_listed(reported_run, tiny_coco, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_coco, broken)
    file = broken / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] = 0
    file.write_text(json.dumps(content))
    run = reported_run("mine")
    assert main([str(run), "--no-analysis", "--check", "--data-root", str(broken)]) == 0
    rows = panels_of(run / "report.html")["Findings"]["variants"][""]["rows"]
    assert ["error", "box-no-area", "train"] in [row["cells"][:3] for row in rows]
    assert any(f"annotation {content['annotations'][0]['id']}" in row["cells"][3] for row in rows)
