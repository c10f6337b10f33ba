"""An exported ONNX file as a detector, run by onnxruntime."""

from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from drcnn.engine.exporting import INPUTS, METADATA, ExportedDetector, ExportInfo
from drcnn.errors import ConfigError, WeightsError

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def load_onnx(file: Path, device: str = "auto") -> tuple[ExportedDetector, ExportInfo]:
    """Opens a file of ``drcnn export --format onnx``.

    Args:
        file: to read.
        device: ``cpu``, ``cuda`` or ``cuda:N``, or ``auto``, a GPU if onnxruntime has one. It gets its images
            from the CPU and gives its results there.

    Returns:
        The detector, and what it needs to take images.

    Raises:
        WeightsError: if the file is missing or no ONNX file.
        ConfigError: if it was made elsewhere, or onnxruntime has no such device.
    """
    if not file.is_file():
        raise WeightsError(f"{file} does not exist; make it with drcnn export RUN --format onnx --out {file}")
    providers = _providers(device)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(file, options, providers=providers)
    except Exception as error:  # onnxruntime has a class for each kind and no common one
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(
            f"{file} is no ONNX file that onnxruntime {onnxruntime.__version__} runs: {reason}"
        ) from None
    info = ExportInfo.from_json(session.get_modelmeta().custom_metadata_map.get(METADATA), str(file))
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        feed = {name: t.cpu().contiguous().numpy() for name, t in zip(INPUTS, (images, sizes), strict=True)}
        return dict(zip(names, map(torch.from_numpy, session.run(names, feed)), strict=True))

    return ExportedDetector(run), info


def _providers(device: str) -> Sequence[str | tuple[str, dict]]:
    kind, _, index = device.partition(":")
    available = onnxruntime.get_available_providers()
    if kind == "auto":
        return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
    if kind not in _PROVIDERS or _PROVIDERS[kind] not in available:
        raise ConfigError(
            f"this onnxruntime has no device {device}, only {', '.join(available)}; install onnxruntime-gpu "
            "or pass --device cpu"
        )
    return [(_PROVIDERS[kind], {"device_id": int(index)} if index else {})]
