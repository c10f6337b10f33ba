"""``drcnn predict``: images, addresses, videos and a camera in; pictures, videos, COCO json and CSV out."""

import csv
import itertools
import json
import shutil
import sys
import threading
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from drcnn.cli import main as drcnn
from drcnn.data import video
from drcnn.data.video import VideoReader, VideoWriter
from drcnn.engine.prediction_files import PredictionFiles
from drcnn.errors import ConfigError, DataError
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
    with pytest.raises(ConfigError, match=r"lies in .*, the folder for the results"):
        find_inputs([str(photos)], photos)
    assert find_inputs([str(photos)]) == [*paths[:2], paths[2], odd]
    with pytest.raises(ConfigError, match="no image or video matches"):
        find_inputs(["data:image/png;base64," + 5000 * "A"])


def test_names_of_pictures_never_repeat(tmp_path):
    with PredictionFiles(tmp_path / "out", [], []) as files:
        names = [files.name(stem, ".jpg") for stem in ("a", "a", "a", "A", "a_2")]
    assert len({name.lower() for name in names}) == 5 and names[0] == "a.jpg"


@pytest.fixture
def site(photos):
    """Address of a local web server that serves the photos."""
    handler = partial(QuietHandler, directory=str(photos))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    """A file server that writes no log."""

    def log_message(self, *_):
        pass


def read(out):
    """What a run wrote: results, images, and the rows of the table."""
    results, images = (json.loads((out / f"{name}.json").read_text()) for name in ("results", "images"))
    with (out / "results.csv").open(newline="") as file:
        return results, images["images"], list(csv.DictReader(file))


def test_an_address(tiny_run, photos, site, tmp_path, capsys):
    out, local = tmp_path / "out", tmp_path / "local"
    urls = [f"{site}/a.jpg", f"{site}/absent.jpg", f"{site}/notes.txt"]
    assert main([str(tiny_run), *urls, "--out", str(out), "--score", "0"]) == 1
    error = capsys.readouterr().err
    assert f"warning: cannot fetch {urls[1]}: the server says 404" in error
    assert f"warning: image {urls[2]} cannot be decoded" in error
    assert "2 of 3 inputs could not be read" in error
    assert main([str(tiny_run), str(photos / "a.jpg"), "--out", str(local), "--score", "0"]) == 0
    results, images, _ = read(out)
    assert results == read(local)[0] and len(results) > 0
    assert [image["file_name"] for image in images] == urls[:1] and (out / "a.jpg").exists()


def test_limits_of_addresses(tiny_run, site, tmp_path, capsys):
    arguments = [str(tiny_run), f"{site}/a.jpg", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--max-megabytes", "0.0001"]) == 1
    assert "more than the limit of 0.0001 MB" in capsys.readouterr().err


def test_the_table_holds_what_the_results_hold(tiny_run, photos, tmp_path):
    out = tmp_path / "out"
    arguments = [str(tiny_run), str(photos), "--out", str(out), "--score", "0", "--no-pictures"]
    assert main(arguments) == 0
    results, images, rows = read(out)
    assert not list(out.glob("*.jpg")) and not any("picture" in image for image in images)
    assert len(rows) == len(results) > 0
    for row, result in zip(rows, results, strict=True):
        x, y, width, height = result["bbox"]
        corners = [float(row[name]) for name in ("x1", "y1", "x2", "y2")]
        assert corners == pytest.approx([x, y, x + width, y + height], abs=1e-4)
        assert int(row["image_id"]) == result["image_id"]
        assert int(row["category_id"]) == result["category_id"]
        assert float(row["score"]) == pytest.approx(result["score"])
        assert row["file"] == images[result["image_id"] - 1]["file_name"] and row["frame"] == ""


def test_classes_alone_are_written(tiny_run, photos, tmp_path):
    out = tmp_path / "out"
    arguments = [str(tiny_run), str(photos), "--out", str(out), "--score", "0"]
    assert main(arguments) == 0
    every = read(out)[2]
    # A detector with random weights may find one class alone.
    found = every[0]["name"]
    other = next(name for name in ("circle", "square") if name != found)
    for names in ([found], [other], [found, other]):
        assert main([*arguments, "--classes", *names]) == 0
        assert read(out)[2] == [row for row in every if row["name"] in names]


def test_ways_of_testing_change_what_is_found(tiny_run, photos, tmp_path):
    found = {}
    for name, flags in {
        "plain": [],
        "flip": ["--tta", "flip"],
        "scales": ["--tta", "scales"],
        "soft": ["--soft-nms", "gaussian"],
        "small": ["--data.test-short-side", "32"],
        "same": ["--tta", "off", "--soft-nms", "off", "--data.test-short-side=64"],
    }.items():
        out = tmp_path / name
        arguments = [str(tiny_run), str(photos / "a.jpg"), *flags, "--out", str(out), "--score", "0"]
        assert main(arguments) == 0
        found[name] = read(out)[0]
    assert found["same"] == found["plain"]
    assert all(found[name] != found["plain"] for name in ("flip", "scales", "soft", "small"))


@pytest.fixture
def clip(photos, tmp_path):
    """A video of five frames: one of the photos, getting darker."""
    pytest.importorskip("av", reason="PyAV is not installed")
    image = Image.open(photos / "a.jpg").convert("RGB")
    with VideoWriter(tmp_path / "clip.mp4", Fraction(5)) as writer:
        for number in range(5):
            writer.write(image.point(lambda value, k=number: value * (10 - k) // 10), number / 5)
    return tmp_path / "clip.mp4"


def test_a_video(tiny_run, photos, clip, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [str(tiny_run), str(clip), str(photos / "b.jpg"), "--out", str(out), "--score", "0.1"]
    assert main([*arguments, "--batch-size", "2"]) == 0
    captured = capsys.readouterr()
    assert "clip.mp4 5/5 frames" in captured.err and "ETA" in captured.err
    results, images, rows = read(out)
    assert f"{len(results)} objects in 6 images" in captured.out and len(rows) == len(results)
    photo, *frames = images  # photos come first
    assert photo["picture"] == "b.jpg" and "frame" not in photo
    assert [frame["frame"] for frame in frames] == list(range(5))
    assert [frame["seconds"] for frame in frames] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert {frame["picture"] for frame in frames} == {"clip.mp4"}
    assert {frame["file_name"] for frame in frames} == {str(clip)}
    with VideoReader(out / "clip.mp4") as reader, VideoReader(clip) as source:
        for drawn, plain in zip(reader, source, strict=True):
            factor = drawn.image.shape[1] // plain.image.shape[1]
            large = np.asarray(Image.fromarray(plain.image).resize(drawn.image.shape[1::-1]))
            changed = np.abs(large.astype(int) - drawn.image).max(-1) > 60
            assert factor >= 1 and drawn.seconds == pytest.approx(plain.seconds)
            assert changed.mean() > 0.005, "nothing drawn"


def test_the_first_frames_alone(tiny_run, clip, tmp_path):
    out = tmp_path / "out"
    assert main([str(tiny_run), str(clip), "--out", str(out), "--frames", "3", "--no-pictures"]) == 0
    assert len(read(out)[1]) == 3 and not list(out.glob("*.mp4"))


def test_a_video_that_breaks_off_keeps_its_beginning(tiny_run, clip, tmp_path, capsys, monkeypatch):
    plain = VideoReader.__iter__

    def broken(reader):
        yield from itertools.islice(plain(reader), 3)
        raise DataError(f"{reader.name}, after 3 frames, cannot be read: damaged")

    monkeypatch.setattr(VideoReader, "__iter__", broken)
    out = tmp_path / "out"
    assert main([str(tiny_run), str(clip), "--out", str(out), "--batch-size", "2"]) == 1
    error = capsys.readouterr().err
    assert "after 3 frames, cannot be read" in error and f"1 of 1 inputs could not be read: {clip}" in error
    assert len(read(out)[1]) == 3
    monkeypatch.setattr(VideoReader, "__iter__", plain)
    with VideoReader(out / "clip.mp4") as reader:
        assert len(list(reader)) == 3


def test_a_camera_runs_until_ctrl_c(tiny_run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("av", reason="PyAV is not installed")
    endless = "testsrc=size=64x48:rate=10"
    monkeypatch.setitem(video._CAMERAS, sys.platform, (endless, "lavfi"))
    out = tmp_path / "out"
    arguments = [str(tiny_run), "--camera", "0", "--out", str(out), "--score", "0"]
    assert main([*arguments, "--frames", "2"]) == 0
    assert len(read(out)[1]) == 2
    plain = VideoReader.__iter__

    def interrupted(reader):
        yield from itertools.islice(plain(reader), 4)
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoReader, "__iter__", interrupted)
    assert main(arguments) == 0
    assert "in 4 images" in capsys.readouterr().out
    images = read(out)[1]
    assert [image["file_name"] for image in images] == ["camera 0"] * 4
    monkeypatch.setattr(VideoReader, "__iter__", plain)
    with VideoReader(out / "camera_0.mp4") as reader:
        assert len(list(reader)) == 4


def test_a_camera_that_is_not_there(tiny_run, tmp_path, capsys):
    pytest.importorskip("av", reason="PyAV is not installed")
    assert main([str(tiny_run), "--camera", "97", "--out", str(tmp_path / "out")]) == 2
    assert "camera 97 cannot be read" in error_of(capsys)


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
