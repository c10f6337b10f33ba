"""The state of a run in one file: written atomically, holding plain types only, loaded with ``weights_only``.

Keys: ``format`` (1), ``drcnn_version``, ``step`` (iterations done), ``position`` (batches of the stream that
they took; ``step`` where it is absent), ``model``, ``ema`` (averaged weights by the names of ``model``, or
None), ``optimizer``, ``scaler``, ``rng`` (the seed: data order, augmentation and sampling are pure functions
of it, the position or the step, the slot and the rank, so no generator's state is needed), ``window`` (what
was measured since the last line), ``best``, ``since_best`` (evaluations since then), ``config`` (plain nested
dictionaries), ``categories`` (names), ``category_ids`` (of the data).
"""

import os
import pickle
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from drcnn.engine.plain_config import complete
from drcnn.errors import ConfigError, TrainingError, WeightsError

FORMAT = 1
KEYS = ("format", "step", "model", "config", "categories", "category_ids")

FREE_TO_CHANGE = (
    "data.root",
    "data.workers",
    "model.backbone.weights",
    "train.weights",
    "train.partial_weights",
    "train.log_every",
    "train.checkpoint_every",
    "train.eval_every",
    "train.pictures",
    "train.patience",
    "train.auto_batch",
    "train.loggers",
    "train.stall_seconds",
)
"""Settings that a resumed run may change without a word: they do not change how the weights move."""

FIXED = ("model.", "optim.optimizer")
"""Settings that a resumed run cannot change: its state would not fit."""


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes ``state`` to ``path`` so that a crash at any moment leaves the old file or the new one, whole.

    Raises:
        TrainingError: if the file cannot be written; the old one is then untouched.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when a disk is full
        kept = "; the one written before is untouched" if path.exists() else ""
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise TrainingError(
            f"cannot write the checkpoint {path}: {reason}{kept}; free space or pass another --out"
        ) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # the rename itself survives a power cut only once the folder is on disk
    finally:
        os.close(handle)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint that :func:`save_checkpoint` wrote, onto the CPU, without executing code.

    Raises:
        WeightsError: if the file is missing, torn, not a checkpoint of drcnn, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"checkpoint {path} does not exist; pass a file such as RUN/checkpoints/last.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"checkpoint {path} is torn or holds more than plain tensors and numbers; use another checkpoint"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        size = path.stat().st_size
        raise WeightsError(f"checkpoint {path} is torn or none ({size} bytes); use another one") from error
    return check_state(state, path)


def check_state(state: Any, path: Path) -> dict[str, Any]:
    """Returns the content of a checkpoint if it is one that this drcnn reads.

    Raises:
        WeightsError: if it is not a checkpoint of drcnn, or of a newer format.
    """
    missing = [k for k in KEYS if k not in state] if isinstance(state, dict) else list(KEYS)
    if missing:
        raise WeightsError(f"{path} is not a checkpoint of drcnn: it has no {', '.join(missing)}")
    if state["format"] != FORMAT:
        found = state["format"]
        raise WeightsError(f"checkpoint {path} has format {found}, this drcnn reads {FORMAT}; update drcnn")
    return state


def find_checkpoint(run_or_file: str | Path) -> Path:
    """Finds the checkpoint that a path means: the file itself, or a run's ``best.pt``, else ``last.pt``.

    Raises:
        WeightsError: if there is none.
    """
    path = Path(run_or_file)
    if path.is_file():
        return path
    if not path.exists():
        raise WeightsError(f"{path} does not exist; pass a run folder or a checkpoint file")
    for name in ("checkpoints/best.pt", "checkpoints/last.pt", "best.pt", "last.pt"):
        if (path / name).is_file():
            return path / name
    raise WeightsError(f"{path} holds no checkpoint; looked for checkpoints/best.pt and checkpoints/last.pt")


def config_differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Lists the fields in which two plain configs differ, e.g. ``{"optim.lr": (0.02, 0.01)}``."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix: (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for name in [*old, *(n for n in new if n not in old)]:
        dotted = f"{prefix}.{name}" if prefix else name
        found |= config_differences(old.get(name), new.get(name), dotted)
    return found


def changed_settings(
    state: dict[str, Any], plain_config: dict[str, Any], categories: list[str], iterations: int
) -> list[str]:
    """Checks that a run can continue from ``state`` and lists what changed, as ``name old -> new``.

    Args:
        state (dict): the checkpoint.
        plain_config (dict): the config of the run that wants to continue.
        categories (list[str]): class names of its data.
        iterations (int): its last iteration.

    Raises:
        ConfigError: if the checkpoint is of another model, optimizer or classes, or of a later iteration.
    """
    changed = config_differences(complete(state["config"]), plain_config)
    changed = {k: v for k, v in changed.items() if not k.startswith(FREE_TO_CHANGE)}
    for name, (old, new) in changed.items():
        if name.startswith(FIXED):
            raise ConfigError(f"cannot resume: the run was trained with {name} {old}, and now it is {new}")
    if list(state["categories"]) != list(categories):
        raise ConfigError(
            f"cannot resume: the run was trained on the classes {', '.join(state['categories'])}"
        )
    if state["step"] > iterations:
        raise ConfigError(
            f"cannot resume: the run is at iteration {state['step']}, after the last of {iterations}; "
            "raise --optim.iterations"
        )
    return [f"{name} {old} -> {new}" for name, (old, new) in changed.items()]
