"""Training and evaluation on VOC and YOLO data through the command line."""

import json

import pytest

from drcnn.cli import main as drcnn

CONFIG = """
from dataclasses import replace

from drcnn import presets
from drcnn.config import Config
from drcnn.data import AugmentationConfig, DataConfig, SplitConfig

train, val = {splits}
sizes = dict(short_sides=(64,), max_size=96, test_short_side=64, test_max_size=96, pad_step=32)
model = presets.light_faster_rcnn(4)
config = Config(
    replace(model, box_head=replace(model.box_head, detections=10, score_threshold=0.0)),
    DataConfig({root!r}, SplitConfig(annotations=train), SplitConfig(annotations=val), workers=0, **sizes),
    presets.short_schedule(20),
)
"""


@pytest.fixture
def config_of(tmp_path, tiny_content, write_voc, write_yolo):
    """Function that writes the tiny data set in a format, and a config that names it."""

    def write(format):
        writer = {"voc": write_voc, "yolo": write_yolo}[format]
        for split in ("train", "val"):
            content, images = tiny_content(split)
            if format == "voc":  # an image of train has a difficult object alone and is not trained on
                content["annotations"][0]["iscrowd"] = 1
            folder = tmp_path / split if format == "voc" else tmp_path  # the splits have equal file names
            writer(content, images, folder, split)
        if format == "voc":
            train, val = (f"{s}/VOC2007/ImageSets/Main/{s}.txt" for s in ("train", "val"))
            splits = ((train, val), val)
        else:
            splits = ("data.yaml", "data.yaml")
        path = tmp_path / f"{format}.py"
        path.write_text(CONFIG.format(splits=splits, root=str(tmp_path)))
        return str(path)

    return write


@pytest.mark.parametrize("format", ["voc", "yolo"])
def test_train_and_eval(config_of, tmp_path, format, capsys):
    run = tmp_path / "run"
    flags = ["--data.batch-size", "4", "--train.pictures", "1", "--optim.iterations", "2"]
    assert drcnn(["train", config_of(format), "--out", str(run), *flags]) == 0
    out = capsys.readouterr().out
    trained = json.loads((run / "metrics_val.json").read_text())
    assert f"train {17 if format == 'voc' else 12}, val 6 images, 4 classes" in out
    assert ("VOC07" in out) == ("VOC07" in trained["summary"]) == (format == "voc")
    assert len(list((run / "predictions").iterdir())) == 1
    assert drcnn(["eval", str(run)]) == 0
    evaluated = json.loads((run / "eval" / "metrics_val.json").read_text())
    assert evaluated["num_images"] == 6 and evaluated["num_detections"] == 60
    assert evaluated["summary"] == pytest.approx(trained["summary"], abs=0.05)  # group norm sees the padding
    assert evaluated["voc_per_class"].keys() == ({"VOC07", "VOC12"} if format == "voc" else set())


def test_the_number_of_classes_is_checked(config_of, tmp_path, capsys):
    assert (
        drcnn(["train", config_of("voc"), "--out", str(tmp_path / "run"), "--model.num-classes", "20"]) == 2
    )
    error = capsys.readouterr().err
    assert (
        "has 4 classes but the model has 20; pass --model.num-classes 4" in error and error.count("\n") == 1
    )
