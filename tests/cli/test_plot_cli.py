"""``drcnn plot``: what is read from metrics.jsonl, and what is drawn of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drcnn.cli import main as drcnn
from drcnn.engine.charts import COLOURS, draw
from drcnn.engine.curves import Curve, read_histories
from drcnn.engine.progress import MetricsFile
from drcnn.plot import main

STEPS = range(10, 101, 10)
AP = {"AP": 0.3, "AP50": 0.5, "AP75": 0.31, "AP90": 0.05, "APl": -1.0}


def training_record(step: int, **more: object) -> dict:
    losses = {"loss_rpn_box": 1 / step, "loss_classification": 2 / step, "loss_box": 3 / step}
    record = {"step": step, "epoch": step / 10, "lr": 0.02 if step > 30 else 0.001 * step}
    return {**record, "loss": sum(losses.values()), **losses, **more, "time_per_step": 0.1}


def dynamic(step: int) -> dict:
    """A record of Dynamic R-CNN with scale training: every second iteration is a collage."""
    shares = {"loss_share_small": 0.1, "loss_share_medium": 0.3, "loss_share_large": 0.6}
    lists = {name: [share + i / 100 for i in range(10)] for name, share in shares.items()}
    return training_record(
        step, iou_threshold=0.4 + step / 1000, beta=1 - step / 200, scale_collage=[0.0, 1.0] * 5, **lists
    )


def write_run(folder: Path, records: list[dict], torn: str = "") -> Path:
    folder.mkdir(parents=True)
    file = MetricsFile(folder / "metrics.jsonl")
    for record in records:
        file.write(record)
    file.close()
    with (folder / "metrics.jsonl").open("a") as appended:
        appended.write(torn)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    """A Dynamic R-CNN with scale training and three evaluations, killed while it wrote."""
    evaluations = [{"step": s, "split": "val", **AP, "AP": AP["AP"] + s / 1000} for s in (50, 100)]
    evaluations.append({"step": 50, "split": "test", **AP})
    records = [dynamic(s) for s in STEPS] + evaluations
    return write_run(tmp_path / "runs" / "dynamic", records, torn='{"step": 110, "lo')


def error_of(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_curves_are_the_records(run):
    (history,) = read_histories([str(run)])
    assert history.name == "dynamic" and history.log_every == 10
    for name in ("lr", "loss", "loss_box", "iou_threshold", "beta"):
        curve = history.curves[name]
        assert curve.steps.tolist() == list(STEPS)
        assert curve.values.tolist() == [dynamic(step)[name] for step in STEPS]
    assert history.losses() == ["loss", "loss_rpn_box", "loss_classification", "loss_box"]
    assert history.evaluations["val"]["AP"].steps.tolist() == [50, 100]
    assert history.evaluations["val"]["AP"].values.tolist() == pytest.approx([0.35, 0.4])
    assert history.evaluations["test"]["AP90"].values.tolist() == [0.05]
    assert "APl" not in history.evaluations["val"]  # no ground truth ever defines it
    (note,) = history.notes
    assert "metrics.jsonl, line 14, is cut off" in note


def test_lists_have_a_point_for_each_iteration(run):
    curves = read_histories([str(run / "metrics.jsonl")])[0].curves
    small, collage = curves["loss_share_small"], curves["scale_collage"]
    assert small.steps.tolist() == collage.steps.tolist() == list(range(1, 101))
    assert small.values[10:20].tolist() == pytest.approx([0.1 + i / 100 for i in range(10)])
    blocks = small.blocks(10)
    assert blocks.steps.tolist() == list(STEPS)
    assert blocks.values.tolist() == pytest.approx([0.145] * 10)
    assert collage.blocks(30).steps.tolist() == [30, 60, 90, 100]
    assert collage.blocks(30).values.tolist() == [0.5] * 4


def test_means_leave_gaps_out():
    curve = Curve(np.arange(1, 7), np.array([1.0, np.nan, 3.0, 4.0, np.nan, np.nan]))
    assert curve.blocks(2).values.tolist() == pytest.approx([1.0, 3.5, np.nan], nan_ok=True)
    expected = [1.0, np.nan, 3.5, 3.5, np.nan, np.nan]
    assert curve.smooth(3).values.tolist() == pytest.approx(expected, nan_ok=True)
    assert len(curve.smooth(99).values) == 6


def test_stages_come_in_their_order_and_infinite_values_are_gaps(tmp_path):
    names = [f"loss_giou_{stage}" for stage in range(11)]
    record = {"step": 1, "loss": float("inf")} | {name: float(i) for i, name in enumerate(names)}
    (history,) = read_histories([str(write_run(tmp_path / "run", [record]))])
    assert [curve.values[0] for curve in history.stages("loss_giou")] == list(range(11))
    assert np.isnan(history.curves["loss"].values[0])
    assert history.losses() == ["loss", "loss_giou"] and history.stages("beta") == []


def test_runs_have_names_that_differ(tmp_path):
    folders = [write_run(tmp_path / name, [training_record(1)]) for name in ("a/run", "b/run")]
    runs = [str(folder) for folder in [*folders, folders[0]]]
    assert [history.name for history in read_histories(runs)] == ["a/run", "b/run"]


def test_lines_are_the_records(run, tmp_path):
    fixed = [training_record(s, iou_threshold=0.5, beta=1.0) for s in STEPS]
    other = write_run(tmp_path / "runs" / "fixed", fixed)
    figure = draw(read_histories([str(run), str(other)]))
    panels = {axes.get_title(loc="left") or axes.get_title(): axes for axes in figure.axes}
    first, second = panels["T_now, threshold of label assignment"].lines
    assert first.get_color() != second.get_color()
    np.testing.assert_allclose(first.get_ydata(), [0.4 + step / 1000 for step in STEPS])
    np.testing.assert_array_equal(second.get_xdata(), STEPS)
    np.testing.assert_array_equal(second.get_ydata(), [0.5] * 10)
    np.testing.assert_allclose(panels["Box loss"].lines[0].get_ydata(), [3 / step for step in STEPS])
    shares = panels["Loss by size of object, dynamic"]
    assert "Loss by size of object, fixed" not in panels
    np.testing.assert_allclose([line.get_ydata()[0] for line in shares.lines], [0.145, 0.345, 0.645])
    (collages,) = shares.patches
    np.testing.assert_array_equal(collages.get_data().edges, [0, *STEPS])
    np.testing.assert_array_equal(collages.get_data().values, [0.5] * 10)
    assert not [title for title in panels if "Temperature" in title or "VOC" in title]


def test_one_run(run, capsys):
    assert drcnn(["plot", str(run)]) == 0
    captured = capsys.readouterr()
    assert "line 14, is cut off" in captured.out and str(run / "plots" / "curves.svg") in captured.out
    with Image.open(run / "plots" / "curves.png") as picture:
        assert picture.width > 2000 and len(picture.convert("L").getcolors(256)) > 20
    svg = (run / "plots" / "curves.svg").read_text()
    for text in ("dynamic", "Learning rate", "T_now, threshold of label assignment", "beta_now of SmoothL1"):
        assert f">{text}</text>" in svg
    for text in ("Loss, sum of all", "RPN box loss", "small", "share of collages", "AP75", "iteration"):
        assert f">{text}</text>" in svg
    again = run.parent / "again"
    assert main([str(run), "--formats", "svg", "--out", str(again)]) == 0
    assert [file.name for file in again.iterdir()] == ["curves.svg"]
    assert (again / "curves.svg").read_text() == svg


def test_several_runs(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    retinanet = write_run(tmp_path / "runs" / "retinanet", [training_record(s) for s in STEPS])
    assert main(["runs/dynamic", "runs/retinanet", "--formats", "svg"]) == 0
    svg = (tmp_path / "plots" / "curves.svg").read_text()
    assert ">dynamic</text>" in svg and ">retinanet</text>" in svg
    assert all(colour.lower() in svg for colour in COLOURS[:2]) and COLOURS[2].lower() not in svg
    assert main([str(retinanet), "--formats", "svg"]) == 0
    alone = (retinanet / "plots" / "curves.svg").read_text()
    assert "Box loss" in alone and "T_now" not in alone and "size of object" not in alone


def test_errors_are_one_line(run, tmp_path, capsys):
    empty = write_run(tmp_path / "empty", [])
    torn = write_run(tmp_path / "torn", [training_record(1)], torn='{"st\n{"step": 2}\n')
    (tmp_path / "notes.txt").write_text("dear diary\n")
    (tmp_path / "other.jsonl").write_text('["step"]\n')
    (tmp_path / "bare.jsonl").write_text('{"step": 1}\n')
    for arguments, message in (
        ([], "no run given"),
        ([str(tmp_path / "absent")], "there is no run"),
        ([str(tmp_path)], "it has no metrics.jsonl"),
        ([str(empty)], "holds no record yet"),
        ([str(torn)], "line 2, is no record of a run"),
        ([str(tmp_path / "notes.txt")], "line 1, is no record of a run"),
        ([str(tmp_path / "other.jsonl")], "line 1, is no record of a run"),
        ([str(tmp_path / "bare.jsonl")], "there is nothing to draw"),
        ([str(run), "--formats", "gif"], "gif"),
        ([str(run), "--out", str(tmp_path / "notes.txt" / "plots")], "pass another --out"),
    ):
        assert main(arguments) == 2, arguments
        assert message in error_of(capsys)


def test_without_matplotlib(run, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "drcnn.engine.charts")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(run)]) == 2
    assert "needs matplotlib; install it with: pip install 'drcnn[plot]'" in error_of(capsys)


def test_nothing_that_opens_windows_is_imported(run):
    code = (
        "import sys; from drcnn.plot import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
