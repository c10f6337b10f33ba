"""Reading of YOLO's files: data.yaml, rows, polygons, orientation and what is wrong with them."""

import re

import numpy as np
import pytest
import yaml
from PIL import Image

from drcnn.data import read_yolo
from drcnn.errors import DataError


class Yolo:
    """A data set of images of 40x20 pixels and the classes cat and dog."""

    def __init__(self, root):
        self.root, self.file = root, root / "data.yaml"
        for name in ("images/train", "labels/train"):
            (root / name).mkdir(parents=True)
        self.describe()

    def describe(self, **changes):
        fields = {"train": "images/train", "names": ["cat", "dog"], **changes}
        self.file.write_text(yaml.safe_dump({k: v for k, v in fields.items() if v is not None}))
        return self

    def add(self, stem, rows=None, ending="png", exif=None):
        image = Image.new("RGB", (40, 20), "red")
        image.paste("blue", (0, 0, 4, 4))
        image.save(self.root / "images" / "train" / f"{stem}.{ending}", **({"exif": exif} if exif else {}))
        if rows is not None:
            (self.root / "labels" / "train" / f"{stem}.txt").write_text(rows)
        return self

    def read(self, **options):
        return read_yolo(self.file, "train", **options)


@pytest.fixture
def yolo(tmp_path):
    return Yolo(tmp_path)


def test_rows_are_fractions_of_the_image(yolo):
    yolo.add("b", "\n1 0.5 0.5 0.5 0.5\n  \n0 0.25 0.1 0.5 0.2").add("a").add("c", "")
    dataset = yolo.read()
    assert [dataset.file_name(i) for i in range(3)] == ["a.png", "b.png", "c.png"]
    assert dataset.offsets.tolist() == [0, 0, 2, 2] and dataset.labels(1).tolist() == [1, 0]
    np.testing.assert_allclose(dataset.boxes(1), [[10, 5, 30, 15], [0, 0, 20, 4]], atol=1e-5)
    np.testing.assert_allclose(dataset.packed_areas, [200, 80], rtol=1e-5)
    assert dataset.categories == ["cat", "dog"] and dataset.category_ids.tolist() == [0, 1]


def test_polygons_give_boxes_and_stay(yolo):
    yolo.add("a", "0 0.25 0.5 0.75 0.5 0.5 1.0\n1 0.5 0.5 0.5 0.5")
    dataset = yolo.read()
    np.testing.assert_allclose(dataset.boxes(0), [[10, 10, 30, 20], [10, 5, 30, 15]])
    assert dataset.packed_areas.tolist() == [100, 200]  # the triangle's own area, not its box's
    polygon, box = dataset.source.content()["annotations"]
    assert polygon["segmentation"] == [[10, 10, 30, 10, 20, 20]] and "segmentation" not in box


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_images_are_turned_upright(yolo, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    dataset = yolo.add("a", "0 0.5 0.25 1.0 0.5", ending, exif).read()
    sideways = orientation in (6, 8)
    size = (40, 20) if sideways else (20, 40)
    assert (dataset.heights[0], dataset.widths[0]) == size
    np.testing.assert_allclose(dataset.boxes(0), [[0, 0, size[1], size[0] / 2]])
    blue = np.argwhere(dataset.load(0)[..., 2] > 128)
    corner = {1: (0, 0), 3: (1, 1), 6: (0, 1), 8: (1, 0)}[orientation]
    assert tuple(blue.mean(axis=0) > np.array(size) / 2) == corner


def test_names_and_splits_in_all_their_forms(yolo, tmp_path):
    yolo.add("a", "1 .5 .5 .5 .5").add("b")
    (tmp_path / "one.txt").write_text("./images/train/a.png\n\n")
    (tmp_path / "two.txt").write_text(f"{tmp_path}/images/train/b.png\n")
    assert len(yolo.describe(names={0: "cat", 1: "dog"}, nc=2).read()) == 2
    assert len(yolo.describe(path=str(tmp_path)).read()) == 2
    assert len(yolo.describe(path=".", train=["one.txt", "two.txt"]).read()) == 2
    assert yolo.describe(train="one.txt").read().labels(0).tolist() == [1]
    assert len(yolo.describe(train="../images/train").read()) == 2  # as Roboflow writes it
    assert len(yolo.describe(path="/absent").read(base=tmp_path)) == 2
    assert len(yolo.describe(train="images").read()) == 2


def test_labels_beside_the_images(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("0 .5 .5 1 1")
    (tmp_path / "data.yml").write_text("names: [cat]\ntrain: .\n")
    assert read_yolo(tmp_path / "data.yml", "train").boxes(0).tolist() == [[0, 0, 40, 20]]


def test_without_any_label_file_the_split_is_unlabelled(yolo):
    dataset = yolo.add("a").add("b").read()
    assert len(dataset) == 2 and not dataset.has_annotations
    with pytest.raises(DataError, match="cannot be trained on"):
        yolo.read(filter_empty=True)


BAD_ROWS = {
    "too few": ("0 .5 .5 .5", r"b\.txt: line 1 is '0 .5 .5 .5'; expected the numbers", "malformed-object"),
    "a score": ("\n0 .5 .5 .5 .5 .9", r"b\.txt: line 2 is ", "malformed-object"),
    "odd polygon": ("0 .1 .1 .5 .1 .5 .5 .1", r"line 1 is ", "malformed-object"),
    "text": ("cat .5 .5 .5 .5", r"line 1 is 'cat", "malformed-object"),
    "not finite": ("0 nan .5 .5 .5", r"line 1 is '0 nan", "malformed-object"),
    "class": ("2 .5 .5 .5 .5", r"b\.txt: line 1 has class 2; the names .* are 0 to 1", "unknown-category"),
    "half class": ("0.5 .5 .5 .5 .5", r"has class 0\.5", "unknown-category"),
    "negative class": ("-1 .5 .5 .5 .5", r"has class -1", "unknown-category"),
    "outside": ("0 .5 .5 1.2 .5", r"b\.txt: line 1 .* outside its image of 40x20 pixels", "box-outside"),
    "pixels": ("0 20 10 8 8", r"b\.txt: line 1 .* outside its image of 40x20 pixels", "box-outside"),
    "no area": ("0 .5 .5 0 .5", r"b\.txt: line 1 .* a box of no area: width 0", "box-no-area"),
    "line": ("0 .5 .5 .7 .5 .6 .5", r"b\.txt: line 1 .* a box of no area", "box-no-area"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_one_line_and_can_be_skipped(yolo, case):
    rows, pattern, kind = BAD_ROWS[case]
    yolo.add("a", "1 .5 .5 1 1").add("b", rows)
    with pytest.raises(DataError) as error:
        yolo.read()
    message = str(error.value)
    assert re.search(pattern, message) and "\n" not in message, message
    assert message.endswith(f"pass --data.skip {kind} to leave such out")
    dataset = yolo.read(skip=(kind,))
    assert dataset.boxes(0).tolist() == [[0, 0, 40, 20]] and "skipped 1 " in dataset.report[0]


def test_files_that_cannot_be_read(yolo, tmp_path):
    yolo.add("a", "1 .5 .5 1 1").add("b", "1 .5 .5 1 1").add("c")
    (tmp_path / "labels/train/b.txt").write_bytes(b"\xff\xfe\0")
    (tmp_path / "images/train/c.png").write_bytes(b"none")
    with pytest.raises(DataError, match=r"c\.png cannot be decoded.*--data\.skip truncated-image"):
        yolo.read()
    with pytest.raises(
        DataError, match=r"b\.txt cannot be read: it is not text.*--data\.skip malformed-file"
    ):
        yolo.read(skip=("truncated-image",))
    dataset = yolo.read(skip=("truncated-image", "malformed-file"))
    assert dataset.image_ids.tolist() == [1] and len(dataset.report) == 2


def test_an_image_that_a_list_names_is_missing(yolo, tmp_path):
    yolo.add("a", "1 .5 .5 1 1").describe(train="list.txt")
    (tmp_path / "list.txt").write_text("images/train/a.png\nimages/train/b.png\nimages/train/c.png\n")
    with pytest.raises(DataError, match=r"b\.png not found \(and 1 more\).*--data\.skip missing-image"):
        yolo.read()
    assert yolo.read(skip=("missing-image",)).image_ids.tolist() == [1]


def test_links_that_form_circles(yolo, tmp_path):
    yolo.add("a", "1 .5 .5 1 1")
    for name in ("one", "two", "three"):
        (tmp_path / "images" / "train" / name).symlink_to(tmp_path / "images")
    assert len(yolo.read()) == 1


def test_all_of_a_computer_is_no_folder_of_images(yolo):
    yolo.add("a", "1 .5 .5 1 1").describe(train="/")
    with pytest.raises(DataError, match="train is /, all of this computer"):
        yolo.read()


@pytest.mark.parametrize("line", ["../b.png", "/etc/passwd", "images/../../b.png", "a\0.png"])
def test_a_list_cannot_lead_out_of_the_data_set(yolo, tmp_path, line):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "list.txt").write_text(f"a.png\n{line}\n")
    yolo.add("a", "1 .5 .5 1 1").describe(path="data", train="list.txt")
    with pytest.raises(DataError, match=r"list\.txt, line 2: .* leads out of the data set's folder") as error:
        yolo.read()
    assert str(error.value).isprintable()


def test_a_data_set_may_be_named_with_all_folders_of_its_images(yolo, tmp_path):
    yolo.add("a", "1 .5 .5 1 1").describe(path=str(tmp_path), train="lists/list.txt")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "list.txt").write_text("../images/train/a.png\n")
    assert yolo.read().labels(0).tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"train": None}, r"data\.yaml has no `train`"),
        ({"train": "absent"}, r"train .*absent not found; correct `train` or `path`"),
        ({"train": "labels"}, r"no image found for train of .*data\.yaml"),
        ({"train": ["images", "images/train"]}, r"a\.png is in train twice"),
        ({"path": "absent"}, r"path .*absent is no folder; .*--data\.train\.images FOLDER"),
        ({"names": None}, r"data\.yaml has no `names`"),
        ({"names": []}, r"data\.yaml has no `names`"),
        ({"names": {"1": "cat", "2": "dog"}}, r"the numbers in `names` must be 0, 1, 2"),
        ({"names": [["cat"], "dog"]}, r"the class name \['cat'\] in `names` is not text"),
        ({"path": ["a"]}, r"`path` is \['a'\], expected a folder"),
        ({"train": [3]}, r"train is 3, expected a folder or a list"),
        ({"nc": 3}, r"nc is 3 but there are 2 names"),
    ],
)
def test_bad_descriptions(yolo, changes, pattern):
    yolo.add("a", "1 .5 .5 1 1").describe(**changes)
    with pytest.raises(DataError, match=pattern) as error:
        yolo.read()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "names: [a\n: :",
        "- 1\n- 2",
        "\x00",
        "nc: 2001-99-99",
        "[" * 3000,
        "!!python/object/apply:os.mkdir [x]",
    ],
)
def test_torn_descriptions(yolo, text):
    yolo.file.write_text(text)
    with pytest.raises(DataError, match=r"data\.yaml") as error:
        yolo.read()
    assert "\n" not in str(error.value)
