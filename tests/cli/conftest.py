"""A run folder as training leaves it, with random weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drcnn import __version__, presets
from drcnn.config import Config, to_dict
from drcnn.data import load_split
from drcnn.engine.checkpoint import save_checkpoint
from drcnn.engine.metrics import evaluate_results
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


@pytest.fixture
def reported_run(tiny_data, tiny_content, make_results, tmp_path):
    """Function that makes a run folder with a log of training, an evaluation and results that are made up."""

    def make(name: str, seed: int = 0, **more: float) -> Path:
        folder = tmp_path / "runs" / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "best.pt").touch()
        content, _ = tiny_content("val")
        results = make_results(content, seed)
        metrics = {"split": "val", "step": 100, **evaluate_results(content, results).to_dict()}
        config = Config(presets.light_faster_rcnn(4), tiny_data, train=TrainConfig(seed=seed))
        (folder / "eval").mkdir()
        for file, value in (
            ("config.json", to_dict(config)),
            ("metrics_val.json", metrics),
            ("eval/results_val.json", results),
        ):
            (folder / file).write_text(json.dumps(value))
        (folder / "log.txt").write_text(
            f"command: drcnn train configs/x.py --out {name}\ndevice: cpu\nstep 1\n"
        )
        with (folder / "metrics.jsonl").open("w") as log:
            for step in range(10, 101, 10):
                losses = {"loss": 3 / step, "loss_box": 1 / step, "loss_classification": 2 / step}
                shares = {f"loss_share_{size}": [0.2, 0.3] * 5 for size in ("small", "medium", "large")}
                scale = {"scale_ratio": [0.2, 0.1] * 5, "scale_collage": [0.0, 1.0] * 5, **shares}
                record = {
                    "step": step,
                    "lr": 0.02,
                    **losses,
                    "iou_threshold": 0.4,
                    "beta": 1.0,
                    **scale,
                    **more,
                }
                log.write(json.dumps(record) + "\n")
            log.write(json.dumps({"step": 100, "split": "val", **metrics["summary"]}) + "\n")
        return folder

    return make
