"""What a run logged, read back from ``metrics.jsonl`` as curves over iterations."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from drcnn.engine.metrics import UNDEFINED
from drcnn.errors import ConfigError

EXACT = {
    "lr": ("Learning rate", "", 0.0),
    "iou_threshold": ("T_now, threshold of label assignment", "IoU", None),
    "beta": ("beta_now of SmoothL1", "in encoded deltas", 0.0),
    "expert_temperature": ("Temperature of the experts' softmax", "", 0.0),
}
"""What is drawn as logged: name to title, unit and least value of its axis."""
NOISY = {
    "expert_entropy": ("Entropy of the experts' weights", "1 = all alike", 0.0),
    "positives_per_gt": ("Positives per ground truth", "predictions", 0.0),
    "conflict_share": ("Conflicts of the assignment", "share of predictions", 0.0),
}
"""What is drawn with its running mean."""
LOSSES = {
    "loss": "Loss, sum of all",
    "loss_rpn_objectness": "RPN objectness loss",
    "loss_rpn_box": "RPN box loss",
    "loss_giou": "GIoU loss",
    "loss_l1": "L1 loss",
}
"""Titles of losses; others are called by their names."""
PRECISIONS = ("AP", "AP50", "AP75", "AP90")
VOC = ("VOC07", "VOC12")
SMOOTHED_FROM = 60
"""Records from which a noisy curve is drawn with its running mean."""


def loss_title(name: str) -> str:
    """What a loss is called in a chart."""
    return LOSSES.get(name) or name.removeprefix("loss_").replace("_", " ").capitalize() + " loss"


@dataclass(frozen=True)
class Curve:
    """One value over iterations.

    Attributes:
        steps (int64 array [n]): iterations, rising.
        values (float64 array [n]): NaN where the value was not finite or not defined.
    """

    steps: np.ndarray
    values: np.ndarray

    def blocks(self, size: int) -> "Curve":
        """Means of ``size`` neighbours each, at the last step of each block; the last may be shorter."""
        starts = np.arange(0, len(self.steps), max(1, size))
        known = np.isfinite(self.values)
        sums = np.add.reduceat(np.where(known, self.values, 0.0), starts)
        counts = np.add.reduceat(known.astype(np.float64), starts)
        ends = np.append(starts[1:], len(self.steps)) - 1
        with np.errstate(invalid="ignore"):
            return Curve(self.steps[ends], sums / counts)

    def smooth(self, size: int) -> "Curve":
        """Means over the ``size`` neighbours around each value, fewer at the ends; gaps stay gaps."""
        known = np.isfinite(self.values)
        window = np.ones(min(max(1, size), len(self.values)))
        sums = np.convolve(np.where(known, self.values, 0.0), window, "same")
        counts = np.convolve(known.astype(np.float64), window, "same")
        return Curve(self.steps, np.where(known, sums / np.maximum(counts, 1.0), np.nan))

    def smoothed(self) -> "Curve":
        """The running mean that a noisy curve is drawn with."""
        return self.smooth(len(self.steps) // 30 | 1)


@dataclass(frozen=True)
class History:
    """The records of a run.

    Attributes:
        name: what the run is called where several are compared.
        curves: what training logged, by its name in the records. What was logged as a list, with a value for
            each iteration, is a curve with a point for each iteration.
        evaluations: by split, the numbers of its evaluations by name; those that are never defined are left
            out.
        log_every: iterations between records of training; 0 if there is none.
        notes: what was left out of the file, and why.
    """

    name: str
    curves: dict[str, Curve]
    evaluations: dict[str, dict[str, Curve]] = field(default_factory=dict)
    log_every: int = 0
    notes: tuple[str, ...] = ()

    def stages(self, name: str) -> list[Curve]:
        """The curve ``name``, or ``name_0``, ``name_1``, ... of a detector with stages; empty without any."""
        if name in self.curves:
            return [self.curves[name]]
        numbered = {key.rpartition("_")[2]: curve for key, curve in self.curves.items() if _base(key) == name}
        return [numbered[number] for number in sorted(numbered, key=int)]

    def losses(self) -> list[str]:
        """Names of the losses without the numbers of stages, the sum first, then as they were logged."""
        names = [_base(key) for key in self.curves if key.startswith("loss_")]
        parts = [name for name in names if not name.startswith("loss_share")]
        return list(dict.fromkeys(["loss"] * ("loss" in self.curves) + parts))


def _base(name: str) -> str:
    """A name without the number of its stage."""
    stem, _, number = name.rpartition("_")
    return stem if number.isdecimal() else name


def read_histories(runs: Sequence[str]) -> list[History]:
    """Reads several runs, each once, and gives them names that differ.

    Args:
        runs: run folders, or their ``metrics.jsonl``.

    Raises:
        ConfigError: as :func:`read_history`.
    """
    files = list(dict.fromkeys(metrics_file(run).resolve() for run in runs))
    return [read_history(file, name) for file, name in zip(files, _names(files), strict=True)]


def metrics_file(run: str) -> Path:
    """The ``metrics.jsonl`` of a run.

    Raises:
        ConfigError: there is none.
    """
    path = Path(run)
    if path.is_file():
        return path
    file = path / "metrics.jsonl"
    if not path.exists():
        raise ConfigError(f"there is no run {run}; pass a folder that drcnn train has made")
    if not file.is_file():
        raise ConfigError(
            f"{run} is no run: it has no metrics.jsonl; pass a folder that drcnn train has made"
        )
    return file


def _names(files: Sequence[Path]) -> list[str]:
    """Run folders' names, with as many of the folders above as tell all of them apart."""
    folders = [file.parent if file.name == "metrics.jsonl" else file for file in files]
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(file) for file in files]


def read_history(file: Path, name: str) -> History:
    """Reads ``metrics.jsonl``.

    Args:
        file: the file; a last line that a kill cut off is left out, with a note.
        name: what to call the run.

    Raises:
        ConfigError: it cannot be read, holds no record, or something that is none.
    """
    records, notes = _records(file)
    training = [record for record in records if "split" not in record]
    splits: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if "split" in record:
            splits.setdefault(str(record["split"]), []).append(record)
    steps = [record["step"] for record in training]
    return History(
        name,
        _curves(training, skip=("step",)),
        {split: _defined(_curves(found, skip=("step", "split"))) for split, found in splits.items()},
        int(np.diff([0, *steps]).max()) if steps else 0,
        tuple(notes),
    )


def _records(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    records, notes = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if type(record["step"]) is not int:
                raise TypeError
            records.append(record)
        except (ValueError, KeyError, TypeError):
            if number == 1 or number < len(lines):
                raise ConfigError(
                    f"{file}, line {number}, is no record of a run; pass a run folder of drcnn train"
                ) from None
            notes.append(f"{file}, line {number}, is cut off, as a killed run leaves it; it is left out")
    if not records:
        raise ConfigError(f"{file} holds no record yet; the first comes after --train.log-every iterations")
    return records, notes


def _curves(records: Sequence[dict[str, Any]], skip: Sequence[str]) -> dict[str, Curve]:
    """Gathers each name's values; a list belongs to the iterations that end with its record's."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if name in skip or isinstance(value, str | dict):
                continue
            values = value if isinstance(value, list) else [value]
            steps, found = points.setdefault(name, ([], []))
            steps.extend(range(record["step"] - len(values) + 1, record["step"] + 1))
            found.extend(np.nan if v is None else float(v) for v in values)
    return {name: Curve(np.array(s, np.int64), np.array(v, np.float64)) for name, (s, v) in points.items()}


def _defined(curves: dict[str, Curve]) -> dict[str, Curve]:
    """Average precisions with gaps where no ground truth defines them."""
    found = {n: Curve(c.steps, np.where(c.values == UNDEFINED, np.nan, c.values)) for n, c in curves.items()}
    return {name: curve for name, curve in found.items() if np.isfinite(curve.values).any()}
