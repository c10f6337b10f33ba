"""A detector with masks through the command line: train, stop, resume, evaluate, predict."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pycocotools import mask as oracle

from drcnn import presets
from drcnn.config import Config
from drcnn.engine.checkpoint import load_checkpoint
from drcnn.engine.metrics import Metrics
from drcnn.engine.trainer import TrainConfig, Trainer
from drcnn.eval import main as evaluate
from drcnn.models import (
    AnchorConfig,
    BoxHeadConfig,
    FasterRCNNConfig,
    FPNConfig,
    MaskHeadConfig,
    ResNetConfig,
    RPNConfig,
)
from drcnn.predict import main as predict
from drcnn.train import main as train

TINY = FasterRCNNConfig(
    4,
    ResNetConfig("resnet18", norm="gn", frozen_stages=3),
    FPNConfig(channels=16),
    RPNConfig(AnchorConfig(sizes=(16, 32, 64, 128, 256)), pre_nms=100, post_nms=50, test_post_nms=50),
    BoxHeadConfig(channels=32, samples=32, sampling_ratio=1, score_threshold=0.0, detections=5),
    mask_head=MaskHeadConfig(channels=8, convs=1, sampling_ratio=1),
)


@pytest.fixture
def config_file(tmp_path, tiny_data, write_config):
    def write(masks: bool) -> str:
        settings = presets.short_schedule(6), TrainConfig(log_every=1, pictures=1)
        return write_config(tmp_path / "tiny.py", Config(TINY, replace(tiny_data, masks=masks), *settings))

    return write


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_training_to_prediction(config_file, tmp_path, monkeypatch, capsys, tiny_coco):
    path, run, stopped = config_file(masks=True), tmp_path / "run", tmp_path / "stopped"
    assert train([path, "--out", str(run)]) == 0
    assert "loss_mask" in records(run)[0] and "mask " in (run / "log.txt").read_text()
    update = Trainer.update

    def stop_in_step_3(self, *arguments):
        if self.step == 2:
            self.stop.signal = signal.SIGTERM
        update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", stop_in_step_3)
        assert train([path, "--out", str(stopped)]) == 143
    assert train([path, "--out", str(stopped), "--resume"]) == 0
    one, other = (load_checkpoint(r / "checkpoints/last.pt")["model"] for r in (run, stopped))
    assert all(torch.equal(one[k].nan_to_num(-1), other[k].nan_to_num(-1)) for k in one)
    assert [r.get("loss_mask") for r in records(run)] == [r.get("loss_mask") for r in records(stopped)]

    found = json.loads((run / "metrics_val.json").read_text())
    assert found["iou_type"] == "bbox" and found["segm"]["iou_type"] == "segm"
    assert records(run)[-1].keys() >= {"AP", "segm_AP"}
    capsys.readouterr()
    assert evaluate([str(run), "--out", str(tmp_path / "eval")]) == 0
    shown = capsys.readouterr().out
    assert "bbox: " in shown and "segm: " in shown
    scored = json.loads((tmp_path / "eval/metrics_val.json").read_text())
    assert scored["summary"] == found["summary"] and scored["segm"] == found["segm"]
    results = json.loads((tmp_path / "eval/results_val.json").read_text())
    assert results and all(
        list(oracle.decode(r["segmentation"]).shape) == r["segmentation"]["size"] for r in results
    )

    out = tmp_path / "predictions"
    assert predict([str(run), str(tiny_coco / "images/val"), "--out", str(out), "--score", "0"]) == 0
    sizes = {
        i["id"]: [i["height"], i["width"]] for i in json.loads((out / "images.json").read_text())["images"]
    }
    written = json.loads((out / "results.json").read_text())
    assert written and all(r["segmentation"]["size"] == sizes[r["image_id"]] for r in written)


def test_the_best_weights_are_those_with_the_best_masks(config_file, tmp_path, monkeypatch):
    measure = Trainer.evaluate

    def scripted(self, split, dataset, step):
        metrics: Metrics = measure(self, split, dataset, step)
        if split == "val":
            metrics.summary["AP"] = step / 10
            metrics.segm.summary["AP"] = {2: 0.4, 4: 0.6, 6: 0.5}[step]
        return metrics

    monkeypatch.setattr(Trainer, "evaluate", scripted)
    out = tmp_path / "run"
    flags = ["--train.eval-every", "2", "--train.pictures", "0"]
    assert train([config_file(masks=True), "--out", str(out), *flags]) == 0
    best = load_checkpoint(out / "checkpoints/best.pt")["best"]
    assert best["step"] == 4 and best["AP"] == 0.6
    assert json.loads((out / "metrics_val.json").read_text())["segm"]["summary"]["AP"] == 0.6


def test_a_mask_head_needs_masks(config_file, tmp_path, capsys):
    assert train([config_file(masks=False), "--out", str(tmp_path / "run")]) == 2
    assert "pass --data.masks" in capsys.readouterr().err
