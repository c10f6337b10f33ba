"""The same content in COCO, VOC and YOLO format is the same data set."""

import json
import pickle

import numpy as np
import pytest

from drcnn.data import DataConfig, SplitConfig, load_split, read_coco, read_voc, read_yolo
from drcnn.errors import ConfigError, DataError

FORMATS = ("coco", "voc", "yolo")


@pytest.fixture
def written(tmp_path, tiny_content, write_voc, write_yolo):
    """The train split in the three formats, after a change of its content."""

    def write(change=lambda content: None) -> dict:
        content, images = tiny_content("train")
        order = sorted(c["name"] for c in content["categories"])
        renumber = {c["id"]: order.index(c["name"]) for c in content["categories"]}
        content["categories"] = [{"id": k, "name": name} for k, name in enumerate(order)]
        for record in content["annotations"]:
            record["category_id"] = renumber[record["category_id"]]
        change(content)
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(content))
        return {
            "coco": read_coco(path, images),
            "voc": read_voc(write_voc(content, images, tmp_path / "voc", "train")),
            "yolo": read_yolo(write_yolo(content, images, tmp_path / "yolo", "train"), "train"),
        }

    return write


def assert_same(one, other, category_offset=0, tolerance=0.0):
    assert one.categories == other.categories and len(one) == len(other)
    assert (other.category_ids - one.category_ids).tolist() == [category_offset] * len(one.categories)
    for name, value in vars(one).items():
        if isinstance(value, np.ndarray) and name != "category_ids":
            theirs = getattr(other, name)
            assert value.dtype == theirs.dtype, name
            np.testing.assert_allclose(value, theirs, rtol=0, atol=tolerance, err_msg=name)


def test_three_formats_fill_the_same_tables(written):
    found = written()
    assert len(found["coco"].packed_boxes) == 20
    assert_same(found["coco"], found["voc"], category_offset=1)
    assert_same(found["coco"], found["yolo"], tolerance=1e-3)
    for format, dataset in found.items():
        assert dataset.source.format == format and dataset.has_annotations and dataset.report == []
        assert dataset.load(0).shape == (dataset.heights[0], dataset.widths[0], 3)


def test_difficult_objects_are_crowd_regions(written):
    def change(content):
        for record in content["annotations"][::3]:
            record["iscrowd"] = 1

    found = written(change)
    assert found["voc"].packed_crowd.sum() == len(found["voc"].packed_crowd[::3])
    assert_same(found["coco"], found["voc"], category_offset=1)


def test_images_without_objects(written):
    def change(content):
        kept = [r for r in content["annotations"] if r["image_id"] not in (2, 3)]
        content["annotations"] = [{**record, "id": k} for k, record in enumerate(kept, 1)]

    found = written(change)
    assert_same(found["coco"], found["voc"], category_offset=1)
    assert_same(found["coco"], found["yolo"], tolerance=1e-3)


@pytest.mark.parametrize("format", FORMATS)
def test_content_is_read_again_for_evaluation_even_in_another_process(written, format):
    dataset = pickle.loads(pickle.dumps(written()[format]))
    content = dataset.source.content()
    assert [r["id"] for r in content["annotations"]] == sorted(dataset.annotation_ids.tolist())
    assert [i["file_name"] for i in content["images"]] == [dataset.file_name(i) for i in range(len(dataset))]


def data_config(root, train: SplitConfig, val: SplitConfig | None = None, **fields) -> DataConfig:
    return DataConfig(str(root), train, val or train, workers=0, **fields)


def test_load_split_tells_the_format(tmp_path, tiny_content, write_voc, write_yolo):
    for split in ("train", "val"):
        content, images = tiny_content(split)
        write_voc(content, images, tmp_path / split, split)
        write_yolo(content, images, tmp_path / "yolo", split)
    sets = {s: f"{s}/VOC2007/ImageSets/Main/{s}.txt" for s in ("train", "val")}
    classes = ("triangle", "star", "square", "circle")
    voc = data_config(tmp_path, SplitConfig("", (sets["train"], sets["val"])), classes=classes)
    both = load_split(voc, "train")
    assert both.source.format == "voc" and len(both) == 18 and both.categories == list(classes)
    assert both.image_ids.tolist() == list(range(1, 19))
    assert both.file_name(0) == "train/VOC2007/JPEGImages/000001.jpg" and both.image_folder == tmp_path
    assert both.image_path(17).is_file() and str(both.annotation_file).count(".txt") == 2
    yolo = data_config(tmp_path, SplitConfig(annotations="yolo/data.yaml"))
    assert [len(load_split(yolo, s)) for s in ("train", "val")] == [12, 6]
    assert load_split(yolo, "train").source.format == "yolo"


def test_voc_splits_agree_on_classes_that_only_one_of_them_has(tmp_path, tiny_content, write_voc):
    content, images = tiny_content("val")
    write_voc(content, images, tmp_path / "b", "val")
    for category in content["categories"]:
        category["name"] = category["name"].replace("star", "anvil")
    write_voc(content, images, tmp_path / "a", "val")
    (tmp_path / "b/VOC2007/ImageSets/Main/one.txt").write_text("000001\n")  # of the images of val.txt
    lists = ("b/VOC2007/ImageSets/Main/val.txt",), ("a/VOC2007/ImageSets/Main/val.txt",)
    splits = [SplitConfig(annotations=names) for names in lists]
    config = data_config(tmp_path, *splits, test=SplitConfig(annotations="b/VOC2007/ImageSets/Main/one.txt"))
    expected = ["anvil", "circle", "square", "star", "triangle"]
    assert load_split(config, "train").categories == load_split(config, "val").categories == expected
    assert load_split(config, "test").categories == expected and len(load_split(config, "test")) == 1


@pytest.mark.parametrize(
    "annotations", ["", (), "a.json.gz", ("a.json", "b.json"), ("a.yaml", "b.txt"), ("a.txt", "")]
)
def test_annotations_of_no_format(annotations):
    with pytest.raises(ConfigError, match=r"one COCO \.json, one YOLO \.yaml, or VOC lists"):
        SplitConfig("images", annotations)


def test_classes_are_for_voc_alone():
    coco = SplitConfig("images", "a.json")
    with pytest.raises(ConfigError, match=r"data\.classes is for VOC data alone"):
        data_config("data", coco, classes=("a", "b"))
    with pytest.raises(ConfigError, match="different names, got a a"):
        data_config("data", SplitConfig(annotations="a.txt"), classes=("a", "a"))


@pytest.mark.parametrize(
    ("annotations", "words"),
    [
        ("VOC2012/ImageSets/Main/trainval.txt", ["host.robots.ox.ac.uk", "--data.root", "trainval.txt"]),
        ("mine/ImageSets/train.txt", ["train.txt not found", "--data.root FOLDER"]),
        ("data.yaml", ["data.yaml not found", "--data.root FOLDER"]),
    ],
)
def test_absent_data_say_what_to_do(tmp_path, annotations, words):
    with pytest.raises(DataError) as error:
        load_split(data_config(tmp_path, SplitConfig(annotations=annotations)), "train")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_progress_is_shown_on_a_terminal_alone(written, capfd, monkeypatch):
    monkeypatch.setattr("drcnn.data.source._MANY_FILES", 1)
    written()
    assert capfd.readouterr() == ("", "")
