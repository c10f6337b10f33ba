"""``drcnn.load``: from a run folder, a checkpoint or anyone's weights to a detector that takes images."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from drcnn.config import Config, apply_overrides, from_dict, to_dict
from drcnn.data import DataConfig, SplitConfig
from drcnn.engine.checkpoint import FORMAT, check_state, find_checkpoint
from drcnn.engine.distributed import pick_device
from drcnn.engine.ema import evaluated_weights
from drcnn.engine.predictor import Predictor
from drcnn.errors import ConfigError, DrcnnError, WeightsError
from drcnn.tta import Augmentation, SoftNmsChoice, tta_flags
from drcnn.weights import load_weights, read_content, recognise, unwrap

if TYPE_CHECKING:
    from drcnn.engine.exporting import ExportedDetector, ExportInfo

_STORED = ("format", "step", "categories", "category_ids", "source", "notes")
"""What a safetensors file keeps of a checkpoint besides the model and the config."""


def load(
    path: str | os.PathLike,
    device: torch.device | str = "auto",
    amp: Literal["off", "bf16", "fp16"] = "off",
    *,
    tta: Augmentation = "config",
    soft_nms: SoftNmsChoice = "config",
    overrides: Sequence[str] = (),
) -> Predictor:
    """Loads a trained detector.

    Args:
        path: run folder (its best checkpoint, else its last), checkpoint file, file of ``drcnn convert``,
            ONNX file of ``drcnn export``, or weights of torchvision, MMDetection, Detectron2,
            maskrcnn-benchmark or the Dynamic R-CNN author.
        device: "auto" takes a GPU if there is one.
        amp: autocast type of the forward.
        tta: test-time augmentation; see :func:`drcnn.tta.tta_flags`.
        soft_nms: Soft-NMS; see there.
        overrides: flags that set fields of the run's config, such as ``["--data.test-short-side", "600"]``.

    Returns:
        A callable that takes images and gives results.

    Raises:
        ConfigError: a flag of ``overrides`` that cannot be used; an ONNX file that cannot be run here, or
            not with these arguments.
        WeightsError: there is no checkpoint, it is damaged, or it does not fit this version of drcnn.
    """
    if Path(path).suffix.lower() == ".onnx":
        if amp != "off" or (tta, soft_nms) != ("config", "config") or overrides:
            raise ConfigError(
                f"{path} finds objects as it was exported: autocast, test-time augmentation, Soft-NMS and "
                "fields of the config belong to drcnn export, or to the run itself"
            )
        detector, info = open_onnx(Path(path), str(device))
        return Predictor(detector, info.data_config(), info.categories, info.category_ids, device="cpu")
    if Path(path).suffix.lower() == ".pt2":
        raise WeightsError(
            f"{path} is a program of its own, for torch.export.load or torch._inductor.aoti_load_package; "
            "drcnn runs the ONNX files of drcnn export, and weights"
        )
    file, state = read_state(path)
    config = restore_config(state, str(file))
    changes = [*tta_flags(config, tta, soft_nms), *overrides]
    config = apply_overrides(config, changes) if changes else config
    return restore(state, config, str(file), device=device, amp=amp)


def open_onnx(file: Path, device: str) -> tuple["ExportedDetector", "ExportInfo"]:
    """Opens an ONNX file of ``drcnn export``; see :func:`drcnn.engine.onnx_detector.load_onnx`.

    Raises:
        ConfigError: without onnxruntime, which the extra ``export`` installs.
    """
    try:
        from drcnn.engine.onnx_detector import load_onnx
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise ConfigError(f"{file} needs onnxruntime; install it with: pip install 'drcnn[export]'") from None
    return load_onnx(file, device)


def read_state(path: str | os.PathLike) -> tuple[Path, dict[str, Any]]:
    """Reads a detector from a run folder, a checkpoint, or weights of any known system.

    Returns:
        The file, and what a checkpoint holds: ``model`` (tensors by our names; the averaged weights if it
        has them), ``config`` (plain types),
        ``categories``, ``category_ids``, ``step``; for other files also ``source``, who wrote them, and
        ``notes``, what differs from there.

    Raises:
        WeightsError: there is none, it is damaged, would run code, or belongs to no known detector.
    """
    file = find_checkpoint(path)
    content = read_content(file)
    if {"format", "step", "config"} <= set(content):
        state = check_state(content, file)
        return file, state | {"model": evaluated_weights(state)}
    weights = unwrap(content, str(file))
    stored = weights.extra.get("drcnn")
    if isinstance(stored, str):
        return file, check_state(_stored(stored, file) | {"model": weights.tensors}, file)
    found = recognise(weights)
    names, ids = _categories(found.config.num_classes, found.categories)
    return file, {
        "format": FORMAT,
        "step": 0,
        "model": found.tensors,
        "config": to_dict(Config(model=found.config, data=_coco())),
        "categories": names,
        "category_ids": ids,
        "source": found.system,
        "notes": found.notes,
    }


def save_detector(
    path: str | os.PathLike, state: dict[str, Any], config: Config, *, half: bool = False
) -> None:
    """Writes a detector as one safetensors file: tensors, and in its metadata all that :func:`load` needs.

    Args:
        path: file to write.
        state: as :func:`read_state` gives it.
        config: the detector's config.
        half: store floating-point tensors in 16 bits.

    Raises:
        WeightsError: the file cannot be written.
    """
    path = Path(path)
    own = config.model.build().state_dict()
    tensors = {
        name: tensor.to(torch.float16 if half and tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in state["model"].items()
        if name in own
    }
    kept = {name: state[name] for name in _STORED if name in state}
    stored = json.dumps(kept | {"config": to_dict(config)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"format": "pt", "drcnn": stored})
    except OSError as error:
        raise WeightsError(f"cannot write {path}: {error.strerror or error}") from None


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
    _check_fit(state, config, source)
    model = config.model.build()
    # Other systems keep no state of dynamic training; a trained detector does not need it.
    load_weights(model, state["model"], source=source, dynamics="source" not in state)
    model.to(pick_device(str(device))).eval()
    return Predictor(model, config.data, state["categories"], state["category_ids"], amp=amp)


def _check_fit(state: dict, config: Config, source: str) -> None:
    """Compares the parts of a file, before memory is taken for the model that it describes."""
    names, ids = state["categories"], state["category_ids"]
    lists = isinstance(names, list | tuple) and isinstance(ids, list | tuple)
    if not (lists and len(names) == len(ids) and {type(i) for i in ids} <= {int}):
        raise WeightsError(
            f"{source} is damaged: its categories are no lists of names and ids; use another file"
        )
    if not isinstance(state["model"], Mapping):
        raise WeightsError(f"{source} is damaged: it holds no tensors by name; use another file")
    try:
        with torch.device("meta"):
            model = config.model.build()
    except DrcnnError:
        raise
    except Exception as error:  # of a config with values that no config file would get past its checks
        raise WeightsError(f"{source} is damaged: its config describes no detector ({error})") from None
    load_weights(model, state["model"], source=source, dynamics="source" not in state)


def _stored(text: str, file: Path) -> dict[str, Any]:
    """What :func:`save_detector` wrote into the metadata."""
    try:
        stored = json.loads(text)
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise WeightsError(f"{file} is damaged: its metadata are no json; convert the weights again")
    return stored


def _categories(num_classes: int, names: tuple[str, ...] | None) -> tuple[list[str], list[int]]:
    """Names and COCO ids of the classes: those that the weights hold, else COCO's 80, else numbers."""
    coco = {
        name: number
        for number, name in enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
        if name not in ("__background__", "N/A")
    }
    if num_classes == len(coco) and (names is None or set(names) == set(coco)):
        return list(names or coco), [coco[name] for name in names or coco]
    if names is None or len(names) != num_classes:
        names = tuple(f"class {number}" for number in range(num_classes))
    return list(names), list(range(1, num_classes + 1))


def _coco() -> DataConfig:
    """How all known systems resize images for COCO: short side 800, long side at most 1333."""
    return DataConfig(
        "data/coco",
        train=SplitConfig("train2017", "annotations/instances_train2017.json"),
        val=SplitConfig("val2017", "annotations/instances_val2017.json"),
        skip=("box-no-area",),
    )
