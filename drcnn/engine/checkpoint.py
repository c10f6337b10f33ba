"""The state of a run in one file: written atomically with a checksum, plain types, no code when it is loaded.

Keys: ``format`` (1), ``drcnn_version``, ``step`` (iterations done), ``position`` (batches of the stream that
they took; ``step`` where it is absent), ``ranks`` (their number), ``model``, ``ema`` (averaged weights by the
names of ``model``, or None), ``optimizer``, ``scaler``, ``rng`` (the seed: data order, augmentation and
sampling are pure functions of it, the position or the step, the slot and the rank, so no generator's state is
needed), ``window`` (what was measured since the last line), ``rank_sums`` (its sums on each rank), ``best``,
``since_best`` (evaluations since then), ``evaluated`` (the step of the last evaluation on val that is
recorded: one that is due at ``step`` and is not done comes first when the run continues), ``config`` (plain
nested dictionaries), ``categories`` (names), ``category_ids`` (of the data).
"""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from drcnn.engine.plain_config import complete
from drcnn.engine.writing import changing, replacing
from drcnn.errors import ConfigError, WeightsError
from drcnn.weights.checksum import ChecksumWriter, verify_checksum

FORMAT = 1
KEYS = ("format", "step", "model", "config", "categories", "category_ids")
CONTINUED = ("optimizer", "scaler", "window", "best")
"""What a run needs besides to continue."""

FREE_TO_CHANGE = (
    "data.root",
    "data.workers",
    "model.backbone.weights",
    "train.weights",
    "train.partial_weights",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_last",
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
    with replacing(Path(path)) as file:
        writer = ChecksumWriter(file)
        try:
            torch.save(state, writer)
        except RuntimeError as error:
            raise writer.failure or error from None  # torch does not pass on why a write failed
        writer.finish()


def save_run(run: Path, names: Iterable[str], state: dict[str, Any], keep_last: int = 1) -> None:
    """Writes the state of a run under each name, one after the other, into its folder of checkpoints.

    With ``keep_last`` more than 1 also as ``step_XXXXXXXX.pt``; the newest so many of them stay. It is a file
    of its own, so that damage to one does not reach the other. One of a later step than that of ``state`` is
    from a course that the run went back on, and goes.

    Raises:
        TrainingError: if a file cannot be written or removed.
    """
    folder = run / "checkpoints"
    for name in names:
        save_checkpoint(folder / name, state)
    if keep_last > 1:
        own = folder / f"step_{state['step']:08d}.pt"
        save_checkpoint(own, state)
        files = _step_files(folder)
        newest = files.index(own)
        for path in files[:newest] + files[newest + keep_last :]:
            with changing(path):
                path.unlink()


def _step_files(folder: Path) -> list[Path]:
    """The ``step_XXXXXXXX.pt`` of a folder, the newest first."""
    files = [path for path in folder.glob("step_*.pt") if path.stem[5:].isdecimal()]
    return sorted(files, key=lambda path: int(path.stem[5:]), reverse=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint that :func:`save_checkpoint` wrote, onto the CPU, without executing code.

    Its checksum is verified first; a file of an earlier drcnn has none.

    Raises:
        WeightsError: if the file is missing, torn, damaged, not a checkpoint of drcnn, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"checkpoint {path} does not exist; pass a file such as RUN/checkpoints/last.pt")
    try:
        verify_checksum(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"checkpoint {path} is torn or holds more than plain tensors and numbers; use another checkpoint"
        ) from error
    except Exception as error:  # what a damaged file makes its reader raise has no bounds
        size = path.stat().st_size
        raise WeightsError(f"checkpoint {path} is torn or none ({size} bytes); use another one") from error
    return check_state(state, path)


class Newest(NamedTuple):
    """The checkpoint that a run continues from.

    Attributes:
        path: the file.
        state: what it holds.
        notes: lines for the log, of files that were passed over and why, and of the one taken instead.
    """

    path: Path
    state: dict[str, Any]
    notes: list[str]


def newest_intact(run: str | Path) -> Newest:
    """Finds the checkpoint from which a run continues: ``last.pt``, or the newest other one if that is torn.

    The others are ``step_XXXXXXXX.pt`` and ``best.pt``, which hold as much.

    Raises:
        WeightsError: if there is none that is whole; the line names each file and what is wrong with it.
    """
    folder = Path(run) / "checkpoints"
    passed_over: list[str] = []
    for path in (folder / "last.pt", *_step_files(folder)):
        found = _try(path, passed_over)
        if found is not None:
            break
    if found is None or path.name != "last.pt":
        best = _try(folder / "best.pt", passed_over) if (folder / "best.pt").is_file() else None
        if best is not None and (found is None or best["step"] > found["step"]):
            path, found = folder / "best.pt", best
    if found is None:
        raise WeightsError(f"{run} cannot be continued: {'; '.join(passed_over)}")
    notes = [f"passed over: {line}" for line in passed_over]
    return Newest(path, found, notes + [f"continued from {path}"] * bool(notes))


def matching_best(run: Path, state: dict[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """Gives the record of a run's best weights that ``best.pt`` bears out, and what there is to say about it.

    They differ where ``last.pt`` was torn or put back: the file is then of a later step than the state. Its
    own record is taken. That of a torn file is lost, unless the state is of the same step and writes it anew.

    Args:
        run: the run folder.
        state: what the run continues from.
    """
    best, path = state["best"], run / "checkpoints" / "best.pt"
    if best is None or best["step"] == state["step"]:
        return best, []
    try:
        found = load_checkpoint(path)
    except WeightsError as error:
        return None, [f"the weights of step {best['step']}, the best so far, are lost: {error}"]
    if found["step"] == best["step"]:
        return best, []
    return found.get("best"), [
        f"{path} is of step {found['step']}, not {best['step']}; its AP is to be beaten"
    ]


def _try(path: Path, passed_over: list[str]) -> dict[str, Any] | None:
    try:
        state = load_checkpoint(path)
        missing = [name for name in CONTINUED if name not in state]
        if missing:
            raise WeightsError(f"checkpoint {path} cannot continue a run: it has no {', '.join(missing)}")
    except WeightsError as error:
        passed_over.append(str(error))
        return None
    return state


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
