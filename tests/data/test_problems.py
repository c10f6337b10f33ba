"""Bad input: each kind gives one line with the file and the id; some kinds can be skipped."""

import json
import shutil

import pytest

from drcnn.data import read_coco
from drcnn.errors import DataError


@pytest.fixture
def broken(tiny_coco, tmp_path):
    """A function that copies the small data set, changes its json and reads it."""

    def read(change=None, text=None, **options):
        folder = tmp_path / "images"
        shutil.copytree(tiny_coco / "images/val", folder, dirs_exist_ok=True)
        path = tmp_path / "instances.json"
        content = json.loads((tiny_coco / "annotations/instances_val.json").read_text())
        if change is not None:
            change(content, folder)
        path.write_text(json.dumps(content) if text is None else text)
        return read_coco(path, folder, **options)

    return read


def annotation(**values):
    return lambda content, folder: content["annotations"][1].update(values)


def duplicate(key):
    return lambda content, folder: content[key].append(dict(content[key][1]))


def image(**values):
    return lambda content, folder: content["images"][2].update(values)


def remove_image(content, folder):
    (folder / content["images"][2]["file_name"]).unlink()


def truncate_image(content, folder):
    path = folder / content["images"][2]["file_name"]
    path.write_bytes(path.read_bytes()[:-200])


def text_as_image(content, folder):
    (folder / content["images"][2]["file_name"]).write_text("<html>not found</html>")


FATAL = {
    "an id twice": (duplicate("images"), "image id 2 occurs 2 times"),
    "one id twice, another thrice": (
        lambda c, f: c["images"].extend([c["images"][1], c["images"][2], c["images"][2]]),
        "image id 2 occurs 2 times",
    ),
    "a category twice": (duplicate("categories"), "category id 2 occurs 2 times"),
    "a text as id": (image(id="3"), "image number 3 has the id '3', which is not an integer"),
    "a huge id": (annotation(id=2**80), "annotation number 2 has the id"),
    "no size": (lambda c, f: c["images"][2].pop("height"), "image number 3 has no height"),
    "a size of zero": (image(width=0), "image 3 has width 0"),
    "no file name": (image(file_name=None), "image 3 has no file_name"),
    "a path upwards": (image(file_name="../a.jpg"), "image 3 has the file_name '../a.jpg', which leads out"),
    "an absolute path": (image(file_name="/etc/passwd"), "leads out of the image folder"),
    "a drive": (image(file_name="C:\\a.jpg"), "leads out of the image folder"),
    "no box": (lambda c, f: c["annotations"][1].pop("bbox"), "annotation 2 has no bbox"),
    "a short box": (annotation(bbox=[1, 2, 3]), r"annotation 2 has the bbox \[1, 2, 3\]"),
    "a box of texts": (annotation(bbox=["1", 2, 3, 4]), "annotation 2 has the bbox"),
    "a box of nan": (annotation(bbox=[1, float("nan"), 3, 4]), "annotation 2 has the non-finite bbox"),
    "an area of text": (
        annotation(area="big"),
        "annotation 2 has the area 'big'; it must be a finite number",
    ),
    "an area of nan": (annotation(area=float("nan")), "annotation 2 has the area nan"),
    "an area beyond numbers": (annotation(area=10**400), "annotation 2 has the area 1000"),
    "a crowd of text": (annotation(iscrowd="0"), "annotation 2 has iscrowd '0'; it must be 0 or 1"),
    "a huge box": (annotation(bbox=[0, 0, 1e300, 1]), r"annotation 2 has the huge bbox \[0, 0, 1e\+300, 1\]"),
    "a box beyond numbers": (annotation(bbox=[0, 0, 10**400, 1]), "annotation 2 has the huge bbox"),
    "a number that is no id": (annotation(image_id=1e300), "annotation 2 has the image_id 1e.300"),
    "a path with a zero byte": (image(file_name="a\0.jpg"), r"the file_name 'a.x00.jpg', which is no name"),
    "a path with half a character": (image(file_name="\ud800.jpg"), "which is no name"),
    "a category named by a list": (lambda c, f: c["categories"][0].update(name=[[]]), "has the name"),
    "no images": (lambda c, f: c.pop("images"), "not in COCO format: it has no `images`"),
    "no categories": (lambda c, f: c.pop("categories"), "not in COCO format: it has no `categories`"),
    "empty categories": (lambda c, f: c.update(categories=[]), "lists no categories"),
    "annotations that are a map": (lambda c, f: c.update(annotations={}), "`annotations` is not a list"),
    "an empty file": (lambda c, f: c.update(images=[], annotations=[]), "no usable image"),
}

SKIPPABLE = {
    "missing-image": (remove_image, r"image .*000003.jpg \(id 3 in .*\) not found"),
    "truncated-image": (truncate_image, r"image .*000003.jpg cannot be decoded: .*truncated.*id 3 in"),
    "box-outside": (
        annotation(bbox=[3, 4, 500, 5]),
        r"annotation 2 \(image \d\) has the box \[3, 4, 503, 9\]",
    ),
    "box-no-area": (annotation(bbox=[3, 4, 0, 5]), r"annotation 2 .* box of no area: width 0, height 5"),
    "unknown-category": (annotation(category_id=77), "annotation 2 .* has category 77"),
    "unknown-image": (annotation(image_id=77), "annotation 2 is of image 77"),
    "duplicate-annotation": (duplicate("annotations"), "annotation 2 occurs twice"),
}


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", FATAL)
def test_fatal(broken, name):
    change, message = FATAL[name]
    with pytest.raises(DataError, match=message) as error:
        broken(change)
    assert "instances.json" in one_line(error)


@pytest.mark.parametrize("kind", SKIPPABLE)
def test_skippable(broken, kind):
    change, message = SKIPPABLE[kind]
    with pytest.raises(DataError, match=message) as error:
        broken(change)
    assert "instances.json" in one_line(error) and f"pass --data.skip {kind} " in str(error.value)


@pytest.mark.parametrize("kind", SKIPPABLE)
def test_skipped_and_counted(broken, kind):
    whole = broken()
    change, _ = SKIPPABLE[kind]
    dataset = broken(change, skip=(kind,))
    assert len(dataset.report) == 1 and "skipped 1 " in dataset.report[0] and f"[{kind}]" in dataset.report[0]
    lost_image = kind.endswith("-image") and kind != "unknown-image"
    assert len(dataset) == len(whole) - lost_image
    if not lost_image:
        dropped = kind not in ("box-outside", "duplicate-annotation")
        assert len(dataset.annotation_ids) == len(whole.annotation_ids) - dropped


def test_a_box_wholly_outside_is_dropped_and_one_partly_outside_is_clipped(broken):
    def change(content, folder):
        content["annotations"][1]["bbox"] = [-50, 0, 20, 20]
        content["annotations"][2]["bbox"] = [-50, 0, 60, 20]

    with pytest.raises(DataError, match=r"annotation 2 .* \(and 1 more\); correct this"):
        broken(change)
    dataset = broken(change, skip=("box-outside",))
    assert "skipped 2" in dataset.report[0]
    assert 2 not in dataset.annotation_ids
    assert dataset.packed_boxes[dataset.annotation_ids == 3].tolist() == [[0, 0, 10, 20]]


def test_a_file_that_is_no_image_counts_as_undecodable(broken):
    with pytest.raises(DataError, match=r"000003.jpg cannot be decoded: not a known image format"):
        broken(text_as_image)


def test_all_images_skipped(broken):
    def change(content, folder):
        for path in folder.iterdir():
            path.unlink()

    with pytest.raises(DataError, match="no usable image"):
        broken(change, skip=("missing-image",))


def test_invalid_json_says_where(broken):
    with pytest.raises(DataError, match=r"not valid json: .* at line 2 column 3") as error:
        broken(text='{"images":\n  oops}')
    one_line(error)


@pytest.mark.parametrize("text", ["[1, 2]", "3", "[" * 100000])
def test_json_that_is_not_coco(broken, text):
    with pytest.raises(DataError, match=r"instances.json is not"):
        broken(text=text)


def test_missing_files_give_the_hint(tmp_path, tiny_coco):
    with pytest.raises(DataError, match=r"annotation file .*nothing.json not found: look elsewhere"):
        read_coco(tmp_path / "nothing.json", tmp_path, hint="look elsewhere")
    annotations = tiny_coco / "annotations/instances_val.json"
    with pytest.raises(DataError, match=r"image folder .*nowhere not found: look elsewhere"):
        read_coco(annotations, tmp_path / "nowhere", hint="look elsewhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"images": ' + "9" * 5000 + "}", "is not valid json: Exceeds the limit"),
        ("\ufeff{}", "is not valid json: Unexpected UTF-8 BOM|has no `images`"),
    ],
)
def test_what_no_tool_writes_is_one_line(broken, text, message):
    with pytest.raises(DataError, match=message) as error:
        broken(text=text)
    assert len(one_line(error)) < 400


def test_a_box_thinner_than_its_numbers_can_say_has_no_area(broken):
    """Its sides would meet when the image is resized, and the logarithm of its width would be infinite."""
    with pytest.raises(DataError, match=r"annotation 2 .* box of no area"):
        broken(annotation(bbox=[20, 5, 1e-6, 10]))


def test_names_of_files_cannot_break_a_line(broken):
    with pytest.raises(DataError, match=r"image .*a b.x1b.31m\.jpg \(id 3 in") as error:
        broken(image(file_name="a\nb\x1b[31m.jpg"))
    assert str(error.value).isprintable()
