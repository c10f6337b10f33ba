"""``drcnn.load``: from a run folder or a checkpoint to a detector that takes images."""

import os
from typing import Literal

import torch

from drcnn.config import Config, from_dict
from drcnn.engine.checkpoint import find_checkpoint, load_checkpoint
from drcnn.engine.distributed import pick_device
from drcnn.engine.predictor import Predictor
from drcnn.errors import WeightsError
from drcnn.weights import load_weights


def load(
    path: str | os.PathLike,
    device: torch.device | str = "auto",
    amp: Literal["off", "bf16", "fp16"] = "off",
) -> Predictor:
    """Loads a trained detector.

    Args:
        path: run folder (its best checkpoint, else its last) or checkpoint file.
        device: "auto" takes a GPU if there is one.
        amp: autocast type of the forward.

    Returns:
        A callable that takes images and gives results.

    Raises:
        WeightsError: there is no checkpoint, it is damaged, or it does not fit this version of drcnn.
    """
    file = find_checkpoint(path)
    state = load_checkpoint(file)
    return restore(state, restore_config(state, str(file)), str(file), device=device, amp=amp)


def restore_config(state: dict, source: str) -> Config:
    """Rebuilds the config that is stored in a checkpoint's state; ``source`` names it in an error."""
    config = from_dict(state["config"])
    if not isinstance(config, Config):
        raise WeightsError(f"{source} holds no config of a run; train again or load its weights by a config")
    return config


def restore(
    state: dict,
    config: Config,
    source: str,
    *,
    device: torch.device | str = "auto",
    amp: Literal["off", "bf16", "fp16"] = "off",
) -> Predictor:
    """Builds the detector of ``config`` with the weights of a checkpoint's state.

    Args:
        state: content of a checkpoint.
        config: its config, perhaps with some fields changed.
        source: what to call the checkpoint in an error.
        device: where to put the model.
        amp: autocast type of the forward.

    Raises:
        WeightsError: the weights do not fit the model of ``config``.
    """
    model = config.model.build()
    load_weights(model, state["model"], source=source)
    model.to(pick_device(str(device))).eval()
    return Predictor(model, config.data, state["categories"], state["category_ids"], amp=amp)
