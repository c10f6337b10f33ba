"""Reading of PASCAL VOC's files: coordinates, classes, lists and what is wrong with them."""

import re

import pytest
from PIL import Image

from drcnn.data import VOC_CLASSES, read_voc
from drcnn.errors import DataError

BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
SIZE = "<size><width>40</width><height>30</height><depth>3</depth></size>"


def dog(xmin=1, ymin=1, xmax=10, ymax=10, extra=""):
    return f"<object><name>dog</name>{extra}{BOX.format(xmin, ymin, xmax, ymax)}</object>"


class Voc:
    """A folder VOC2007 whose images have 40x30 pixels."""

    def __init__(self, root):
        self.root = root / "VOC2007"
        for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (self.root / name).mkdir(parents=True)
        self.list = self.root / "ImageSets" / "Main" / "train.txt"
        self.list.write_text("")

    def add(self, stem, objects=None, size=SIZE, ending="jpg", xml=None):
        if ending is not None:
            Image.new("RGB", (40, 30)).save(self.root / "JPEGImages" / f"{stem}.{ending}")
        if objects is not None or xml is not None:
            text = f"<annotation>{size}{objects}</annotation>" if xml is None else xml
            (self.root / "Annotations" / f"{stem}.xml").write_text(text)
        self.list.write_text(self.list.read_text() + f"{stem}\n")
        return self


@pytest.fixture
def voc(tmp_path):
    return Voc(tmp_path)


def test_pixels_are_counted_from_one_and_inclusive(voc):
    voc.add("000001", dog(1, 1, 40, 30) + dog(3, 5, 3, 5) + dog("2.5", 2, "4.5", 7))
    dataset = read_voc(voc.list)
    assert dataset.boxes(0).tolist() == [[0, 0, 40, 30], [2, 4, 3, 5], [1.5, 1, 4.5, 7]]
    assert dataset.packed_areas.tolist() == [1200, 1, 18]


def test_boxes_counted_from_zero_are_clipped_by_their_pixel(voc):
    assert read_voc(voc.add("a", dog(0, 0, 40, 30)).list).boxes(0).tolist() == [[0, 0, 40, 30]]


def test_difficult_objects_and_parts(voc):
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    objects = dog(extra="<difficult>1</difficult>") + dog(extra="<difficult>0</difficult>" + part) + dog()
    dataset = read_voc(voc.add("a", objects).list)
    assert dataset.crowd(0).tolist() == [True, False, False] and dataset.categories == ["dog"]


def test_an_image_with_difficult_objects_alone_is_not_trained_on(voc):
    voc.add("a", dog(extra="<difficult>1</difficult>")).add("b", dog())
    assert read_voc(voc.list, filter_empty=True).image_ids.tolist() == [2]


def test_the_standard_classes():
    assert len(VOC_CLASSES) == 20 and list(VOC_CLASSES) == sorted(VOC_CLASSES)


def test_given_classes_order_the_labels_and_refuse_others(voc):
    voc.add("a", dog() + dog().replace("dog", "cat"))
    assert read_voc(voc.list).labels(0).tolist() == [1, 0]
    assert read_voc(voc.list, classes=("dog", "cat", "eel")).labels(0).tolist() == [0, 1]
    with pytest.raises(
        DataError, match=r"a\.xml: object 2 \(cat\) has the class 'cat', which is not in data"
    ):
        read_voc(voc.list, classes=("dog",))
    dataset = read_voc(voc.list, classes=("dog",), skip=("unknown-category",))
    assert dataset.labels(0).tolist() == [0] and "skipped 1" in dataset.report[0]


def test_images_are_found_by_stem_whatever_their_ending(voc):
    voc.add("a", dog(), ending="png").add("b.v2", dog())
    dataset = read_voc(voc.list)
    assert [dataset.file_name(i) for i in range(2)] == ["a.png", "b.v2.jpg"]


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_a_missing_size_is_read_from_the_image(voc, size):
    dataset = read_voc(voc.add("a", dog(), size=size).list)
    assert (dataset.heights.tolist(), dataset.widths.tolist()) == ([30], [40])


def test_another_size_than_the_images_is_found_when_it_is_loaded(voc):
    size = SIZE.replace("40", "41")
    dataset = read_voc(voc.add("a", dog(), size=size).list)
    with pytest.raises(
        DataError, match=r"a\.jpg is 40x30 pixels .* annotations say 41x30.*id 1 in .*train\.txt"
    ):
        dataset.load(0)


def test_unlabelled_images_can_be_read_but_not_trained_on(voc):
    voc.add("a").add("b")
    dataset = read_voc(voc.list, classes=("dog",))
    assert not dataset.has_annotations and dataset.image_ids.tolist() == [1, 2]
    assert (dataset.heights.tolist(), dataset.widths.tolist()) == ([30, 30], [40, 40])
    with pytest.raises(DataError, match="cannot be trained on"):
        read_voc(voc.list, classes=("dog",), filter_empty=True)
    with pytest.raises(DataError, match=r"no object names a class; set data\.classes"):
        read_voc(voc.list)


def test_folders_of_xml_files(voc, tmp_path):
    voc.add("b", dog()).add("a", dog() + dog())
    dataset = read_voc(voc.root / "Annotations")
    assert dataset.file_name(0) == "a.jpg" and dataset.offsets.tolist() == [0, 2, 3]
    for file in [*(voc.root / "Annotations").iterdir(), *(voc.root / "JPEGImages").iterdir()]:
        file.rename(voc.root / file.name)
    assert read_voc(voc.root, images=voc.root).offsets.tolist() == [0, 2, 3]
    (voc.root / "JPEGImages").rmdir()
    assert read_voc(voc.root).offsets.tolist() == [0, 2, 3]


NO_BOX = "<object><name>dog</name></object>"
BAD_INPUT = {
    "no xml": ({}, [r"b\.xml not found", "malformed-file"]),
    "torn xml": ({"xml": "<annotation><obj"}, [r"b\.xml is not valid xml", "malformed-file"]),
    "other xml": ({"xml": "<svg/>"}, [r"b\.xml .* holds <svg>", "malformed-file"]),
    "binary xml": ({"xml": "\0\1"}, [r"b\.xml", "malformed-file"]),
    "no box": ({"objects": dog() + NO_BOX}, [r"b\.xml: object 2 \(dog\) has no bndbox", "malformed-object"]),
    "no number": ({"objects": dog("x")}, [r"b\.xml: object 1 \(dog\) has the bndbox \['x'", "numbers"]),
    "not finite": ({"objects": dog("nan")}, [r"object 1 \(dog\) has the bndbox \['nan'", "numbers"]),
    "no name": ({"objects": dog().replace("dog", " ")}, [r"object 1 \(without a name\) has no class"]),
    "difficult": (
        {"objects": dog(extra="<difficult>yes</difficult>")},
        [r"object 1 \(dog\) has difficult 'yes'", "malformed-object"],
    ),
    "no area": (
        {"objects": dog(10, 1, 9, 5)},
        [r"b\.xml: object 1 \(dog\) \(image 2\) has a box of no area: width 0, height 5", "box-no-area"],
    ),
    "outside": (
        {"objects": dog(41, 1, 42, 5)},
        [r"b\.xml: object 1 .*outside its image of 40x30", "box-outside"],
    ),
    "no image": ({"objects": dog(), "ending": None}, [r"JPEGImages/b\.jpg .*not found", "missing-image"]),
    "neither image nor size": (
        {"objects": dog(), "ending": None, "size": ""},
        [r"JPEGImages/b\.jpg not found", "missing-image"],
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_can_be_skipped(voc, case):
    voc.add("a", dog())
    damaged, patterns = BAD_INPUT[case]
    voc.add("b", **damaged)
    with pytest.raises(DataError) as error:
        read_voc(voc.list)
    message = str(error.value)
    assert "\n" not in message
    for pattern in patterns:
        assert re.search(pattern, message), message
    kind = re.search(r"--data\.skip (\S+)", message).group(1)
    dataset = read_voc(voc.list, skip=(kind,))
    assert dataset.boxes(0).tolist() == [[0, 0, 10, 10]] and kind in dataset.report[0]
    ids = {record["id"] for record in dataset.source.content()["annotations"]}
    assert ids >= set(dataset.annotation_ids.tolist())


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda v: v.list.unlink(), r"image set .*train\.txt not found: check the path"),
        (lambda v: v.list.write_bytes(b"\xff\xfe"), r"train\.txt cannot be read: it is not text"),
        (lambda v: v.list.write_text("a -1\n"), r"train\.txt, line 1: expected the name .* got 'a -1'"),
        (lambda v: v.list.write_text("a\na\n"), r"a is listed twice in .*train\.txt"),
        (lambda v: v.list.write_text("a\n../../x\n"), r"line 2: '\.\./\.\./x' leads out of the image folder"),
        (lambda v: v.list.write_text("/etc/x\n"), r"line 1: '/etc/x' leads out of the image folder"),
        (lambda v: v.list.write_text("a\0\n"), r"line 1: 'a.x00' leads out"),
        (lambda v: v.list.write_text(""), r"no object names a class"),
    ],
)
def test_bad_lists(voc, change, pattern):
    voc.add("a", dog())
    change(voc)
    with pytest.raises(DataError, match=pattern):
        read_voc(voc.list)


def test_a_list_outside_of_image_sets(voc, tmp_path):
    voc.add("a", dog())
    voc.list.rename(tmp_path / "train.txt")
    with pytest.raises(DataError, match="is in no folder ImageSets"):
        read_voc(tmp_path / "train.txt")
