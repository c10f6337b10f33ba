"""``drcnn predict``: files, folders and globs in; pictures and COCO-format results out."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from drcnn.cli import main as drcnn
from drcnn.engine.prediction_files import PredictionFiles
from drcnn.predict import find_inputs, main


def error_of(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.fixture
def photos(tiny_coco, tmp_path):
    """Three images in a folder, one of them below it, under names that repeat."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    sources = sorted((tiny_coco / "images" / "val").iterdir())[:3]
    for source, name in zip(sources, ("a.jpg", "b.jpg", "deep/a.jpg"), strict=True):
        shutil.copy(source, folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_a_folder(tiny_run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(tiny_run), str(photos), "--out", str(out), "--score", "0.1", "--batch-size", "2"]) == 0
    captured = capsys.readouterr()
    assert "3/3 images" in captured.err and "ETA" in captured.err
    results = json.loads((out / "results.json").read_text())
    images = json.loads((out / "images.json").read_text())
    assert len(results) > 0 and f"{len(results)} objects in 3 images" in captured.out
    assert [image["file_name"] for image in images["images"]] == [
        str(photos / name) for name in ("a.jpg", "b.jpg", "deep/a.jpg")
    ]
    assert [image["picture"] for image in images["images"]] == ["a.jpg", "b.jpg", "a_2.jpg"]
    for image in images["images"]:
        picture, original = Image.open(out / image["picture"]), Image.open(image["file_name"])
        assert original.size == (image["width"], image["height"])
        assert picture.width % original.width == 0
        boxes = [r["bbox"] for r in results if r["image_id"] == image["id"]]
        assert boxes
        for x, y, width, height in boxes:
            assert 0 <= x <= x + width <= image["width"] + 1e-3
            assert 0 <= y <= y + height <= image["height"] + 1e-3
        plain = np.asarray(original.convert("RGB").resize(picture.size))
        assert (np.abs(plain.astype(int) - np.asarray(picture)) > 60).any(-1).mean() > 0.005, "nothing drawn"
    assert min(r["score"] for r in results) >= 0.1
    assert {r["category_id"] for r in results} <= {c["id"] for c in images["categories"]}
    # pycocotools takes the two files together.
    (tmp_path / "truth.json").write_text(json.dumps(images | {"annotations": []}))
    assert len(COCO(str(tmp_path / "truth.json")).loadRes(str(out / "results.json")).anns) == len(results)


def test_results_do_not_depend_on_the_batch_size(tiny_run, photos, tmp_path):
    # Images of one size: group norm sees the padding, which depends on the other images of a batch.
    for name in ("b.jpg", "deep/a.jpg"):
        shutil.copy(photos / "a.jpg", photos / name)
    found = []
    for size in ("1", "3"):
        out = tmp_path / size
        assert (
            main([str(tiny_run), str(photos), "--out", str(out), "--batch-size", size, "--score", "0"]) == 0
        )
        found.append(json.loads((out / "results.json").read_text()))
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert one["image_id"] == other["image_id"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)


def test_a_high_threshold_finds_nothing_and_is_no_error(tiny_run, photos, tmp_path):
    assert main([str(tiny_run), str(photos / "a.jpg"), "--out", str(tmp_path / "out"), "--score", "1"]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == []
    assert (tmp_path / "out" / "a.jpg").exists()


def test_a_broken_image_is_named_and_the_others_are_done(tiny_run, photos, tmp_path, capsys):
    broken = photos / "broken.jpg"
    broken.write_bytes((photos / "a.jpg").read_bytes()[:300])
    out = tmp_path / "out"
    assert main([str(tiny_run), str(photos), "--out", str(out), "--batch-size", "4"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("warning: ") and str(broken) in line]) == 1
    assert lines[-1] == f"1 of 4 inputs could not be read: {broken}"
    images = json.loads((out / "images.json").read_text())["images"]
    assert len(images) == 3 and not (out / "broken.jpg").exists()


def test_only_broken_images(tiny_run, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_text("no image")
    assert main([str(tiny_run), str(broken), "--out", str(tmp_path / "out")]) == 1
    assert "1 of 1 inputs could not be read" in capsys.readouterr().err


def test_files_folders_and_globs(photos, tmp_path):
    names = ["a.jpg", "b.jpg", "deep/a.jpg"]
    paths = [photos / name for name in names]
    out = tmp_path / "out"
    assert find_inputs([str(photos)], out) == paths
    assert find_inputs([str(photos / "**" / "*.jpg")], out) == paths
    assert find_inputs([str(photos / "?.jpg")], out) == paths[:2]
    assert find_inputs([str(photos / "b.jpg"), str(photos)], out) == [paths[1], paths[0], paths[2]]
    odd = photos / "odd[1].jpg"
    shutil.copy(paths[0], odd)
    assert find_inputs([str(odd)], out) == [odd]
    # Pictures of an earlier run are no input.
    assert find_inputs([str(photos)], photos / "deep") == [paths[0], paths[1], odd]


def test_names_of_pictures_never_repeat(tmp_path):
    with PredictionFiles(tmp_path / "out", [], []) as files:
        names = [files.name(stem, ".jpg") for stem in ("a", "a", "a", "A", "a_2")]
    assert len({name.lower() for name in names}) == 5 and names[0] == "a.jpg"


def test_errors_are_one_line(tiny_run, photos, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    run = str(tiny_run)
    for arguments, words in (
        ([run], "no input"),
        ([run, str(photos / "*.png")], "no image or video matches"),
        ([run, str(photos / "absent.jpg")], "no image or video matches"),
        ([run, str(empty)], "holds no image"),
        ([str(tmp_path / "absent"), str(photos)], "does not exist"),
        ([run, str(photos), "--score", "2"], "--score"),
        ([run, str(photos), "--batch-size", "0"], "--batch-size"),
        ([run, str(photos), "--threads", "0"], "--threads"),
        ([run, str(photos), "--frames", "0"], "--frames"),
        ([run, str(photos), "--timeout", "0"], "--timeout"),
        ([run, str(photos), "--camera", "0"], "--camera"),
        ([run, str(photos), "--classes", "Circel"], "did you mean 'circle'?"),
        ([run, str(photos), "--tta", "all"], "--tta"),
        ([run, str(photos), "--data.test-short-sid", "64"], "did you mean --data.test-short-side?"),
        ([run, str(photos), "--device", "abacus"], "abacus"),
        ([run, str(photos), "--scores", "0.3"], "did you mean --score?"),
        ([run, str(photos), "--out", str(photos / "notes.txt" / "out")], "--out"),
    ):
        assert main(arguments) == 2, arguments
        assert words in error_of(capsys)


def test_help_explains_each_flag(capsys):
    assert drcnn(["predict", "--help"]) == 0
    text = capsys.readouterr().out
    for word in (
        "RUN",
        "INPUT...",
        "--score",
        "Least score",
        "--batch-size",
        "--device",
        "folders",
        "results.json",
    ):
        assert word in text
