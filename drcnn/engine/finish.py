"""The end of a run: the numbers and the pictures of the weights that are best on val."""

import json

from torch import nn

from drcnn.data import CocoDataset
from drcnn.engine import distributed
from drcnn.engine.metrics import Metrics
from drcnn.engine.predictor import draw_predictions
from drcnn.engine.run_log import RunLog
from drcnn.engine.writing import changing, replacing


def write_results(
    log: RunLog, model: nn.Module, found: dict[str, Metrics], step: int, shown: CocoDataset
) -> None:
    """Shows a run's final metrics; the main rank writes them and draws predictions.

    Args:
        log (RunLog): of the run.
        model (nn.Module): the detector.
        found (dict[str, Metrics]): by split.
        step (int): iteration that the weights are of.
        shown (CocoDataset): images to draw.
    """
    for split, metrics in found.items():
        log.display.say(f"{split} split:")
        log.display.show(metrics.table())
        if distributed.is_main():
            record = {"split": split, "step": step, **metrics.to_dict()}
            with replacing(log.run / f"metrics_{split}.json") as file:
                file.write(json.dumps(record, indent=1).encode() + b"\n")
    log.watchdog.waits_for("the pictures of predictions")
    pictures = log.config.train.pictures
    if distributed.is_main() and pictures:
        folder = log.run / "predictions"
        with changing(folder):
            draw_predictions(model, shown, log.config.data, folder, pictures=pictures)
    log.display.say(f"run folder: {log.run} (checkpoints/best.pt, metrics.jsonl, predictions/)")
    distributed.barrier()
