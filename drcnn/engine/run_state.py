"""What a checkpoint holds of a run, and how a run continues from it."""

from typing import TYPE_CHECKING, Any

from drcnn import __version__
from drcnn.engine import distributed
from drcnn.engine.checkpoint import FORMAT, changed_settings, matching_best
from drcnn.engine.optim import load_optimizer, lr_at, set_lr

if TYPE_CHECKING:
    from drcnn.engine.trainer import Trainer


def collect_state(trainer: "Trainer") -> dict[str, Any]:
    """Returns everything that a resumed run needs; see :mod:`drcnn.engine.checkpoint` for the keys."""
    return {
        "format": FORMAT,
        "drcnn_version": __version__,
        "step": trainer.step,
        "position": trainer.position,
        "ranks": trainer.world_size,
        "model": trainer.model.state_dict(),
        "ema": None if trainer.averaged is None else trainer.averaged.module.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "rng": {"seed": trainer.config.train.seed},
        "window": trainer.window.state_dict(),
        "best": trainer.best,
        "since_best": trainer.since_best,
        "evaluated": trainer.evaluated,
        "config": trainer.plain_config,
        "categories": list(trainer.train_data.categories),
        "category_ids": [int(i) for i in trainer.train_data.category_ids],
    }


def restore_state(trainer: "Trainer", state: dict[str, Any]) -> None:
    """Continues from a checkpoint.

    Raises:
        ConfigError: if it is of another model, of other classes or of a later iteration.
    """
    iterations = trainer.config.optim.iterations
    trainer.changes = changed_settings(state, trainer.plain_config, trainer.train_data.categories, iterations)
    trainer.model.load_state_dict(state["model"])
    if trainer.averaged is not None:
        trainer.averaged.restore(state.get("ema"), int(state["step"]), trainer.model)
    load_optimizer(trainer.optimizer, state["optimizer"])
    if state["scaler"]:
        trainer.scaler.load_state_dict(state["scaler"])
    trainer.window.load_state_dict(state["window"])
    sums = state.get("rank_sums", [trainer.window.sums])
    trainer.window.sums = distributed.share_of(sums).to(trainer.device)
    ranks = state.get("ranks", trainer.world_size)
    if ranks != trainer.world_size:  # floating-point numbers are added in another order
        trainer.changes.append(f"ranks {ranks} -> {trainer.world_size}")
    trainer.step = int(state["step"])
    # As the last iteration left it, though the next one sets its own.
    lr = lr_at(trainer.config.optim, max(0, trainer.step - 1), trainer.config.data.batch_size)
    set_lr(trainer.optimizer, lr)
    trainer.since_best = int(state.get("since_best", 0))
    trainer.position = int(state.get("position", trainer.step))
    # An earlier drcnn saved last.pt after the evaluations, but for that of the last iteration.
    trainer.evaluated = int(state.get("evaluated", trainer.step if trainer.step < iterations else 0))
    trainer.saved = (trainer.step, trainer.evaluated)
    trainer.best, notes = matching_best(trainer.run, state)
    trainer.notes += notes
