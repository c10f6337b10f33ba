"""``drcnn check``: what it prints, writes and returns for COCO, VOC, YOLO and configs."""

import json
import shutil
from dataclasses import replace

import pytest

from drcnn.check import main
from drcnn.cli import main as drcnn
from drcnn.config import Config, load_config
from drcnn.data.audit import find_sources
from drcnn.errors import DataError
from drcnn.presets import fcos, light_faster_rcnn


@pytest.fixture
def copy(tiny_coco, tmp_path):
    return shutil.copytree(tiny_coco, tmp_path / "data")


@pytest.fixture
def spoil(copy):
    """Function that changes the training annotations of a copy."""

    def change(**values):
        file = copy / "annotations/instances_train.json"
        content = json.loads(file.read_text())
        content["annotations"][4].update(values)
        file.write_text(json.dumps(content))
        return content["annotations"][4]

    return change


def test_clean_data(tiny_coco, capsys):
    assert drcnn(["check", str(tiny_coco), "--threads", "1"]) == 0
    captured = capsys.readouterr()
    for word in ("train", "val", "test", "objects per image", "best anchor IoU", "no errors"):
        assert word in captured.out
    assert "21/21 images" in captured.err and "ETA" in captured.err


def test_errors_are_named_and_end_with_1(spoil, copy, capsys):
    record = spoil(bbox=[1, 2, 0, 4])
    assert main([str(copy)]) == 1
    out = capsys.readouterr().out
    assert f"instances_train.json: annotation {record['id']} (image {record['image_id']})" in out
    assert "error box-no-area: 1 boxes of no area" in out and "1 error, no warnings" in out


def test_json_holds_everything(spoil, copy, tmp_path, capsys):
    record = spoil(category_id=77)
    assert main([str(copy), "--json", str(tmp_path / "sub" / "check.json"), "--no-images"]) == 1
    found = json.loads((tmp_path / "sub/check.json").read_text())
    finding = found["findings"][0]
    assert (finding["kind"], finding["severity"], finding["split"]) == ("unknown-category", "error", "train")
    assert (finding["annotation_id"], finding["image_id"]) == (record["id"], record["image_id"])
    assert finding["file"].endswith("instances_train.json") and finding["action"]
    assert not found["images_decoded"] and set(found["splits"]) == {"train", "val", "test"}
    assert "the image files were not read" in capsys.readouterr().out
    assert main([str(copy), "--json", "-"]) == 1
    assert json.loads(capsys.readouterr().out)["num_errors"] == 1


def test_a_repaired_copy_passes(spoil, copy, tmp_path, capsys):
    spoil(bbox=[1, 2, 0, 4], segmentation=None)
    out = tmp_path / "fixed"
    assert main([str(copy), "--fix", str(out)]) == 0
    assert "1 repairs, listed in repairs.json; no errors" in capsys.readouterr().out
    assert json.loads((out / "repairs.json").read_text())[0]["repair"] == "removed"
    assert main([str(out)]) == 0
    capsys.readouterr()
    assert main([str(copy), "--fix", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_config_gives_splits_resize_and_anchors(tiny_data, write_config, tmp_path, capsys):
    file = write_config(tmp_path / "own.py", Config(light_faster_rcnn(4), tiny_data))
    assert main([file, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["splits"]) == {"train", "val", "test"} and (found["short_side"], found["max_size"]) == (
        64,
        96,
    )
    assert found["anchors"]["sizes"] == list(load_config(file).model.rpn.anchors.sizes)
    assert main([file, "--json", "-", "--data.short-sides", "128", "--max-size", "512"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["short_side"], found["max_size"]) == (128, 512)
    assert main([file, "--json", "-", "--data.max-pixels", "100"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert "more than the limit of 100" in found["findings"][0]["message"]
    file = write_config(tmp_path / "free.py", Config(fcos(num_classes=4), replace(tiny_data, masks=True)))
    assert main([file, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["anchors"] is None


def test_voc_names_the_file_and_the_object(tiny_content, write_voc, tmp_path, capsys):
    for split in ("train", "val"):
        content, images = tiny_content(split)
        # Both splits count their images from 1; VOC keeps them in one folder.
        folder = tmp_path / "pictures"
        folder.mkdir(exist_ok=True)
        for image in content["images"]:
            name = f"{split}_{image['file_name']}"
            shutil.copy(images / image["file_name"], folder / name)
            image["file_name"] = name
        write_voc(content, folder, tmp_path / "voc", split)
    root = tmp_path / "voc"
    assert main([str(root)]) == 0
    capsys.readouterr()
    xml = root / "VOC2007/Annotations"
    flat = xml / "train_000001.xml"
    text = flat.read_text()
    start, end = text.index("<xmax>") + 6, text.index("</xmax>")
    flat.write_text(f"{text[:start]}-7{text[end:]}")
    (xml / "train_000002.xml").write_text("<annotation>")
    (root / "VOC2007/JPEGImages/train_000003.jpg").unlink()
    assert main([str(root), "--limit", "9"]) == 1
    out = capsys.readouterr().out
    assert f"{flat}: object 1 (" in out and "box-no-area" in out
    assert f"{xml / 'train_000002.xml'}: is not valid xml" in out or f"{xml / 'train_000002.xml'}: not" in out
    assert "train_000003.jpg not found" in out and "3 errors of 3 kinds" in out


def test_yolo_names_the_file_and_the_line(tiny_content, write_yolo, tmp_path, capsys):
    root = tmp_path / "yolo"
    for split in ("train", "val", "test"):
        write_yolo(*tiny_content(split), root, split)
    assert main([str(root)]) == 0
    assert main([str(root / "data.yaml")]) == 0
    capsys.readouterr()
    label = root / "labels/train/000001.txt"
    rows = label.read_text().split("\n")[0]
    label.write_text(f"{rows}\n9 0.5 0.5 0.1 0.1\n0 0.5 0.5\n{rows}\n0 0.9 0.5 0.5 0.5\n")
    for name in ("000002", "000003"):
        (root / f"images/train/{name}.jpg").write_text("no picture")
    out = tmp_path / "fixed"
    assert main([str(root), "--fix", str(out)]) == 0  # the copy has no error
    text = capsys.readouterr().out
    for number, kind in (
        (2, "unknown-category"),
        (3, "malformed-annotation"),
        (4, "duplicate-box"),
        (5, "box-outside"),
    ):
        assert f"{label}: line {number}" in text and kind in text
    assert text.count("cannot be decoded: not a known image format") >= 2
    assert main([str(out)]) == 0


def test_data_in_two_formats_are_asked_about(tiny_content, write_yolo, copy, capsys):
    write_yolo(*tiny_content("train"), copy, "train")
    assert main([str(copy)]) == 2
    error = capsys.readouterr().err
    assert "COCO (" in error and "YOLO (" in error and "which is meant?" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no data given"),
        (["nowhere"], "nowhere does not exist"),
        (["README.txt"], "README.txt does not exist"),
        (["configs/nothing.py"], "config file configs/nothing.py does not exist"),
        (["nowhere", "--limit", "-1"], "--limit must be at least"),
        (["nowhere", "--data.root", "x"], "--data.root"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match="holds no data of a known format"):
        find_sources(tmp_path)


def test_names_of_files_tell_the_splits(copy):
    folder = copy / "annotations"
    (folder / "instances_train.json").rename(folder / "instances_train2017.json")
    (folder / "instances_val.json").rename(folder / "instances_valid.json")
    shutil.copy(folder / "instances_test.json", folder / "instances_extra.json")
    (folder / "captions_train2017.json").write_text('{"images": []}')
    found = find_sources(copy)
    assert list(found.sources) == ["train", "val", "test"]
    assert [file.name for file in found.left_out] == ["instances_extra.json"]
    shutil.copy(folder / "instances_test.json", folder / "instances_test2.json")
    with pytest.raises(DataError, match="several files of test"):
        find_sources(copy)


def test_help(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "--fix" in out and "--no-images" in out and "drcnn check configs/bccd.py" in out
