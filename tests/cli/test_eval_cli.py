"""``drcnn eval``: a run on a split, or a file of results, as a table and as json."""

import json
import subprocess
import sys

import pytest
from pycocotools.coco import COCO

from drcnn import presets, sparse_presets
from drcnn.cli import main as drcnn
from drcnn.engine.checkpoint import load_checkpoint, save_checkpoint
from drcnn.engine.evaluator import evaluate_results
from drcnn.eval import main


def error_of(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.fixture
def files(tmp_path):
    truth = {
        "images": [{"id": 1, "height": 100, "width": 200, "file_name": "1.jpg"}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 100, 100], "area": 1e4, "iscrowd": 0}
        ],
    }
    results = [{"image_id": 1, "category_id": 3, "bbox": [0, 0, 72, 100], "score": 0.5}]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_run_on_a_split(tiny_run, tiny_data, tiny_coco, capsys, split):
    assert main([str(tiny_run), "--split", split, "--batch-size", "2"]) == 0
    captured = capsys.readouterr()
    results_file = tiny_run / "eval" / f"results_{split}.json"
    saved = json.loads((tiny_run / "eval" / f"metrics_{split}.json").read_text())
    results = json.loads(results_file.read_text())
    truth = tiny_coco / getattr(tiny_data, split).annotations
    assert saved["step"] == 7 and saved["split"] == split
    assert saved["num_detections"] == len(results) > 0
    assert saved["num_images"] == len(json.loads(truth.read_text())["images"])
    # The files can be scored again to the same numbers, and pycocotools reads them.
    assert evaluate_results(truth, results_file).summary == pytest.approx(saved["summary"])
    assert len(COCO(str(truth)).loadRes(str(results_file)).anns) == len(results)
    for word in ("AP90", "ARl", str(results_file), *saved["per_class"]):
        assert word in captured.out
    assert "images/s" in captured.err and "ETA" in captured.err


def test_overrides_of_the_runs_config(tiny_run, tmp_path, capsys):
    out = tmp_path / "elsewhere"
    arguments = [str(tiny_run / "checkpoints" / "best.pt"), "--out", str(out)]
    assert main([*arguments, "--model.box-head.detections", "3", "--data.test-short-side", "48"]) == 0
    results = json.loads((out / "results_val.json").read_text())
    images = [r["image_id"] for r in results]
    assert max(images.count(i) for i in images) == 3
    capsys.readouterr()
    assert main([*arguments, "--data.root", str(tmp_path / "absent")]) == 2
    assert "absent" in error_of(capsys)
    assert main([*arguments, "--data.rot", "x"]) == 2
    assert "did you mean --data.root?" in error_of(capsys)


def test_a_file_of_results(files, capsys):
    arguments = ["--results", str(files / "results.json"), "--annotations", str(files / "truth.json")]
    assert main([*arguments, "--out", str(files / "out")]) == 0
    assert "AP90" in capsys.readouterr().out
    saved = json.loads((files / "out" / "metrics.json").read_text())
    assert saved["summary"]["AP"] == pytest.approx(0.5)
    assert saved["per_class"] == {"cat": pytest.approx(0.5)}


def test_errors_are_one_line(files, tiny_run, tiny_data, capsys):
    results, truth = str(files / "results.json"), str(files / "truth.json")
    for arguments, words in (
        ([], "no run given"),
        (["--results", results], "go together"),
        (["run", "--results", results, "--annotations", truth], "not both"),
        (["--results", results, "--annotations", truth, "--data.root", "x"], "--data.root"),
        (["--results", str(files / "absent.json"), "--annotations", truth], "absent.json"),
        ([str(files / "absent")], "does not exist"),
        ([str(files)], "no checkpoint"),
        ([truth], "truth.json"),
        ([str(tiny_run), "--split", "all"], "--split"),
        ([str(tiny_run), "--batch-size", "0"], "--batch-size"),
        ([str(tiny_run), "--batch-size", "two"], "two"),
    ):
        assert main(arguments) == 2, arguments
        assert words in error_of(capsys)
    (files / "results.json").write_text(
        '[{"image_id": 9, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}]'
    )
    assert main(["--results", results, "--annotations", truth]) == 2
    assert "image id 9" in error_of(capsys)


def test_other_classes_than_trained_for(tiny_run, capsys):
    file = tiny_run / "checkpoints" / "best.pt"
    state = load_checkpoint(file)
    state["categories"][0] = "unicorn"
    save_checkpoint(file, state)
    assert main([str(tiny_run)]) == 2
    assert "unicorn" in error_of(capsys)


def test_weights_that_do_not_fit_the_overrides(tiny_run, capsys):
    assert main([str(tiny_run), "--model.fpn.channels", "32"]) == 2
    assert "misshaped" in error_of(capsys)


def test_a_split_without_annotations_gives_results_only(tiny_run, tiny_data, tiny_coco, tmp_path, capsys):
    content = json.loads((tiny_coco / tiny_data.test.annotations).read_text())
    del content["annotations"]
    (tmp_path / "test.json").write_text(json.dumps(content))
    flags = ["--split", "test", "--data.test.annotations", str(tmp_path / "test.json")]
    assert main([str(tiny_run), *flags]) == 0
    assert "not scored" in capsys.readouterr().out
    assert (tiny_run / "eval" / "results_test.json").exists()
    assert not (tiny_run / "eval" / "metrics_test.json").exists()


@pytest.mark.parametrize(
    ("model", "stages"),
    [(presets.light_cascade_rcnn(4), 3), (sparse_presets.light_sparse_rcnn(4, proposals=10), 6)],
    ids=["cascade", "sparse"],
)
def test_ap_by_stage(make_run, model, stages, capsys):
    run = make_run(model)
    assert main([str(run), "--stages"]) == 0
    out = capsys.readouterr().out
    rows = [line.split()[0] for line in out.splitlines()[-stages - 1 : -1]]
    assert rows == [str(number) for number in range(1, stages + 1)]
    saved = json.loads((run / "eval" / "metrics_val.json").read_text())
    assert len(saved["stages"]) == stages and saved["stages"][-1] == saved["summary"]
    assert main([str(run)]) == 0
    plain = json.loads((run / "eval" / "metrics_val.json").read_text())
    assert "stages" not in plain and plain["summary"] == saved["summary"]


def test_ap_by_stage_needs_stages_and_annotations(tiny_run, make_run, tiny_data, tmp_path, tiny_coco, capsys):
    assert main([str(tiny_run), "--stages"]) == 2
    assert "this FasterRCNN has none" in error_of(capsys)
    content = json.loads((tiny_coco / tiny_data.test.annotations).read_text())
    del content["annotations"]
    (tmp_path / "test.json").write_text(json.dumps(content))
    flags = ["--stages", "--split", "test", "--data.test.annotations", str(tmp_path / "test.json")]
    assert main([str(make_run(presets.light_cascade_rcnn(4))), *flags]) == 2
    assert "the test split has none" in error_of(capsys)


def test_help_explains_each_flag(capsys, tiny_run):
    assert drcnn(["eval", str(tiny_run), "--help"]) == 0
    text = capsys.readouterr().out
    for word in (
        "--split",
        "--results",
        "--data.root",
        "Folder that the paths of all splits",
        "--batch-size",
    ):
        assert word in text
    assert drcnn(["eval", "--help"]) == 0


def test_two_ranks_under_torchrun(tiny_run, tmp_path):
    # One image at a time: group norm sees the padding, which depends on the other images of a batch.
    flags = [str(tiny_run), "--batch-size", "1", "--out"]
    assert main([*flags, str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "drcnn.eval", *flags, str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("AP90") == 1
    one, two = (json.loads((tmp_path / n / "metrics_val.json").read_text()) for n in ("one", "two"))
    assert one["summary"] == pytest.approx(two["summary"])
    assert one["num_detections"] == two["num_detections"]
