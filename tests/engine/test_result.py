"""What can be made of a result: a part of it, pieces of the image, tables, other libraries' objects."""

import sys
import warnings

import numpy as np
import pytest
import torch

from drcnn.engine.result import Result, class_labels
from drcnn.errors import ConfigError

NAMES = ("red cell", "white cell", "platelet")


@pytest.fixture
def result():
    """Three objects; every pixel of the image tells its own column and row."""
    rows, columns = np.mgrid[:40, :60].astype(np.uint8)
    masks = torch.zeros(3, 40, 60, dtype=torch.bool)
    masks[0, 5:10, 5:10] = True
    return Result(
        boxes=torch.tensor([[10.2, 5.0, 20.0, 15.5], [-5.0, -5, 3, 4], [59.9, 39.9, 59.95, 80]]),
        scores=torch.tensor([0.9, 0.6, 0.2]),
        labels=torch.tensor([1, 0, 1]),
        categories=NAMES,
        category_ids=(3, 5, 7),
        image=np.stack([columns, rows, rows], axis=-1),
        masks=masks,
    )


def test_filter(result):
    high = result.filter(score_threshold=0.5)
    assert high.names == ["white cell", "red cell"] and high.score_threshold == 0.5
    assert high.masks.shape == (2, 40, 60) and high.masks[0].any()
    white = result.filter(classes=["white cell"])
    assert white.scores.tolist() == pytest.approx([0.9, 0.2])
    assert len(result.filter(score_threshold=0.5, classes=["platelet", "red cell"])) == 1
    assert len(result.filter(classes=[])) == 0 and len(result.filter()) == len(result) == 3


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("White Cell", "did you mean 'white cell'"),
        ("platlet", "did you mean 'platelet'"),
        ("zebra", "the classes are red cell, white cell, platelet"),
    ],
)
def test_the_nearest_class_is_named(result, name, hint):
    with pytest.raises(ConfigError, match=f"there is no class '{name}'; {hint}"):
        result.filter(classes=[name])


def test_classes_of_one_name_are_all_found():
    assert class_labels(["a"], ["a", "b", "a"]) == [0, 2]


def test_crop(result):
    first, second, third = map(np.asarray, result.crop())
    # Columns 10 to 19 and rows 5 to 15, as the pixels say themselves.
    assert first.shape == (11, 10, 3)
    assert first[0, 0].tolist() == [10, 5, 5] and first[-1, -1].tolist() == [19, 15, 15]
    assert second.shape == (4, 3, 3) and second[0, 0].tolist() == [0, 0, 0]
    assert third.shape == (1, 1, 3) and third[0, 0].tolist() == [59, 39, 39]
    wide = np.asarray(result.crop(margin=0.5)[0])
    assert wide[0, 0].tolist() == [5, 0, 0] and wide[-1, -1].tolist() == [24, 20, 20]


def test_crops_are_copies(result):
    np.asarray(result.crop()[0]).copy().fill(0)
    picture = result.crop()[0]
    picture.paste((0, 0, 0), (0, 0, *picture.size))
    assert result.image[5, 10].tolist() == [10, 5, 5]


def test_to_rows(result):
    row = result.to_rows()[0]
    box = {"x1": pytest.approx(10.2), "y1": 5.0, "x2": 20.0, "y2": 15.5}
    assert row == {"name": "white cell", "label": 1, "category_id": 5, "score": pytest.approx(0.9)} | box


def test_to_pandas(result):
    pytest.importorskip("pandas", reason="pandas is not installed")
    frame = result.to_pandas()
    assert list(frame.columns) == ["name", "label", "category_id", "score", "x1", "y1", "x2", "y2"]
    assert frame["name"].tolist() == result.names
    assert np.allclose(frame[["x1", "y1", "x2", "y2"]], result.boxes)
    empty = result.filter(score_threshold=1.0).to_pandas()
    assert len(empty) == 0 and list(empty.columns) == list(frame.columns)


def test_to_supervision(result):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # supervision would like to have OpenCV
        pytest.importorskip("supervision", reason="supervision is not installed")
    found = result.to_supervision()
    assert np.allclose(found.xyxy, result.boxes) and np.allclose(found.confidence, result.scores)
    assert found.class_id.tolist() == [1, 0, 1]
    assert found.data["class_name"].tolist() == result.names
    assert np.array_equal(np.asarray(found.mask), result.masks.numpy())
    assert len(found[found.confidence > 0.5]) == 2
    assert len(result.filter(classes=[]).to_supervision()) == 0


@pytest.mark.parametrize("package", ["pandas", "supervision"])
def test_what_is_not_installed_is_named(result, package, monkeypatch):
    class Nowhere:
        def find_spec(self, name, path=None, target=None):
            if name == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Nowhere(), *sys.meta_path])
    with pytest.raises(ConfigError, match=rf"to_{package} needs {package}.*'drcnn\[{package}\]'"):
        getattr(result, f"to_{package}")()
