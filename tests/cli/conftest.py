"""A run folder as training leaves it, with random weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drcnn import __version__, presets
from drcnn.config import Config, to_dict
from drcnn.data import load_split
from drcnn.engine.checkpoint import save_checkpoint
from drcnn.engine.trainer import TrainConfig


@pytest.fixture
def make_run(tiny_data, tmp_path):
    """Function that makes the run folder of an untrained detector for the four classes of ``tiny_coco``."""

    def make(model) -> Path:
        dataset = load_split(tiny_data, "val")
        config = Config(model, tiny_data, train=TrainConfig(device="cpu", threads=1))
        torch.manual_seed(0)
        state = {
            "format": 1,
            "drcnn_version": __version__,
            "step": 7,
            "model": config.model.build().state_dict(),
            "config": to_dict(config),
            "categories": list(dataset.categories),
            "category_ids": dataset.category_ids.tolist(),
        }
        save_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt", state)
        return tmp_path / "run"

    return make


@pytest.fixture
def tiny_run(make_run) -> Path:
    """Run folder of an untrained light detector for the classes of ``tiny_coco``."""
    model = presets.light_faster_rcnn(4)
    return make_run(replace(model, box_head=replace(model.box_head, detections=10)))
