"""A trained detector as a program of its own: by torch.export, and compiled by AOTInductor.

A program takes ``images`` (uint8 [B, 3, H, W], RGB, padded at the right and at the bottom) and ``sizes``
(int64 [B, 2], height and width of each image without its padding), and returns the fields of
:class:`~drcnn.structures.Detections` by name. B, H and W vary; H and W are multiples of 32.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from drcnn import __version__
from drcnn.data import DataConfig, SplitConfig
from drcnn.errors import ConfigError
from drcnn.ops.backend import native_build_info
from drcnn.structures import Detections, ImageBatch

INPUTS = ("images", "sizes")
METADATA = "drcnn"
"""Name under which a file holds an :class:`ExportInfo` as json."""

MULTIPLE = 32
"""H and W are multiples of this number of pixels."""


@dataclass(frozen=True)
class ExportInfo:
    """What a program needs besides itself to take images as they come.

    Attributes:
        categories: name of each label 0..K-1.
        category_ids: COCO category id of each label.
        short_side: length in pixels that the shorter side of an image is resized to.
        max_size: greatest length in pixels of the longer side.
        pad_multiple: padded heights and widths are multiples of this number of pixels.
        pad_step: distance in pixels between them.
        least_side: least padded height and width that the program is made for.
        version: of drcnn.
    """

    categories: tuple[str, ...]
    category_ids: tuple[int, ...]
    short_side: int
    max_size: int
    pad_multiple: int
    pad_step: int
    least_side: int
    version: str = __version__

    @classmethod
    def of(
        cls, model: nn.Module, data: DataConfig, categories: tuple[str, ...], category_ids: tuple[int, ...]
    ) -> "ExportInfo":
        """Describes a detector and the data that it was trained for."""
        return cls(
            tuple(categories),
            tuple(category_ids),
            data.test_short_side,
            data.test_max_size,
            data.pad_multiple,
            data.pad_step,
            least_side(model),
        )

    def to_json(self) -> str:
        """Returns the text that a file holds."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | None, source: str) -> "ExportInfo":
        """Reads what :meth:`to_json` gave; ``source`` names the file in an error.

        Raises:
            ConfigError: if it is something else.
        """
        try:
            plain = json.loads(text or "")
            lists = {name: tuple(plain.pop(name)) for name in ("categories", "category_ids")}
            return cls(**lists, **plain)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(
                f"{source} does not say how images are resized and what the classes are called; make it with "
                "drcnn export"
            ) from None

    def data_config(self) -> DataConfig:
        """Returns a data config that resizes and pads as the detector expects; it has no data."""
        none = SplitConfig(annotations="none.json")
        return DataConfig(
            root="",
            train=none,
            val=none,
            test_short_side=self.short_side,
            test_max_size=self.max_size,
            pad_multiple=self.pad_multiple,
            pad_step=self.pad_step,
        )


def least_side(model: nn.Module) -> int:
    """Returns the least padded height and width of a program: the coarsest level has two cells."""
    return (model.fpn.strides[-1] // MULTIPLE + 1) * MULTIPLE


def at_least(images: ImageBatch, side: int) -> ImageBatch:
    """Pads a batch with zeros at the right and at the bottom to this height and width, if it has less."""
    height, width = images.tensor.shape[-2:]
    lacking = (0, max(0, side - width), 0, max(0, side - height))
    return images._replace(tensor=nn.functional.pad(images.tensor, lacking))


class TensorDetector(nn.Module):
    """A detector from tensors to tensors.

    Args:
        detector: takes an :class:`~drcnn.structures.ImageBatch` and returns detections.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Returns the fields of the detections by name, without masks where there are none."""
        found = self.detector(ImageBatch(images, sizes))
        return {name: field for name, field in found._asdict().items() if field is not None}


class ExportedDetector(nn.Module):
    """The other way: what a file computes, as a detector.

    Args:
        run: the program of the file.
    """

    def __init__(self, run: Callable[[Tensor, Tensor], Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.run = run
        self.eval()

    def forward(self, images: ImageBatch) -> Detections:
        """Finds objects in a batch; see :class:`~drcnn.structures.Detections`."""
        with torch.no_grad():
            return Detections(**self.run(images.tensor, images.sizes))


def trace(model: nn.Module) -> ExportedProgram:
    """Traces a detector in evaluation mode, on the device where it is, with the operators' present backend.

    Args:
        model: detector; its ``fpn.strides`` tell the least size.

    Returns:
        ExportedProgram: of inputs and outputs as in the head of this file.
    """
    device = next(model.parameters()).device
    least = least_side(model) // MULTIPLE
    # None of the numbers that vary may be 1 here, or equal to another.
    height, width = (least + 2) * MULTIPLE, (least + 3) * MULTIPLE
    images = torch.zeros((2, 3, height, width), dtype=torch.uint8, device=device)
    sizes = torch.tensor([[height, width]] * 2, device=device)
    batch, rows, columns = Dim("batch"), Dim("rows", min=least), Dim("columns", min=least)
    shapes = {"images": {0: batch, 2: MULTIPLE * rows, 3: MULTIPLE * columns}, "sizes": {0: batch}}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return torch.export.export(TensorDetector(model), (images, sizes), dynamic_shapes=shapes)
    finally:
        model.train(was_training)


def save_program(program: ExportedProgram, file: Path, info: ExportInfo) -> None:
    """Writes a torch.export program (.pt2); ``info`` is its extra file ``drcnn``."""
    torch.export.save(program, file, extra_files={METADATA: info.to_json()})


def load_program(file: Path) -> ExportedDetector:
    """Reads a file of :func:`save_program`; load only files that you trust."""
    return ExportedDetector(torch.export.load(file).module().__call__)  # a function, not a part


def save_package(program: ExportedProgram, file: Path, info: ExportInfo) -> None:
    """Compiles a program for the device that it was traced on and writes an AOTInductor package (.pt2).

    Raises:
        ConfigError: if there is no C++ compiler that works.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    options = {"aot_inductor.metadata": {METADATA: info.to_json()}}
    try:
        with torch.no_grad():
            aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)
    except (CppCompileError, InvalidCxxCompiler) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--format aoti needs a C++ compiler that works (CXX names it): {reason}"
        ) from error


def load_package(file: Path) -> ExportedDetector:
    """Loads a file of :func:`save_package`, which is machine code: load only files that you trust."""
    return ExportedDetector(torch._inductor.aoti_load_package(str(file)))


def needs(program: ExportedProgram) -> list[str]:
    """Lists what has to be loaded before a program, besides torch: lines of Python."""
    called = (node.target for node in program.graph.nodes)
    namespaces = {target.namespace for target in called if isinstance(target, torch._ops.OpOverload)}
    lines = []
    if "torchvision" in namespaces:
        lines.append("import torchvision")
    if "drcnn" in namespaces:
        lines.append(f"torch.ops.load_library({Path(native_build_info()['library']).name!r})")
    if namespaces & {"drcnn_python", "drcnn_triton"}:
        lines.append("import drcnn.ops")
    return lines
