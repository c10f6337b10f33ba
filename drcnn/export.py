"""``python -m drcnn.export RUN --format {torch,aoti,onnx}``: writes a detector as a program of its own.

Exit code 0 when the file finds what the detector finds, 1 when it does not (it is written, and how far it is
off is printed), 2 for an error in the arguments or the checkpoint.
"""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tyro.conf import Positional, arg

from drcnn.arguments import parse
from drcnn.command import command
from drcnn.config import Config, apply_overrides
from drcnn.data import eval_views, load_image, load_split
from drcnn.engine.exporting import (
    ExportedDetector,
    ExportInfo,
    load_package,
    load_program,
    needs,
    save_package,
    save_program,
    trace,
)
from drcnn.engine.exporting_check import check
from drcnn.engine.predictor import Predictor
from drcnn.errors import ConfigError, DataError
from drcnn.loading import open_onnx, read_state, restore, restore_config
from drcnn.ops import use_backend

PROGRAM = "drcnn export"
DESCRIPTION = """Writes a trained detector, NMS inside, as a torch.export program, as an AOTInductor package
(machine code), or as ONNX; then runs the file on real images beside the detector and prints the difference.
Batch, height and width of the input vary. Fields of the config can be changed by flags, as of drcnn train.
ONNX needs: pip install 'drcnn[export]'. Exit code: 0 both find the same, 1 they do not, 2 nothing written.

Examples:
  drcnn export runs/mine --format onnx --out mine.onnx       then: drcnn predict mine.onnx photos/*.jpg
  drcnn export runs/mine --format aoti --device cuda         a package for this GPU
  drcnn export runs/mine --images a.jpg b.jpg --model.box-head.score-threshold 0.3"""

PICTURES = 3
"""Images that the file is checked on."""

_SUFFIX = {"torch": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx"}


@dataclass(frozen=True)
class ExportArguments:
    """Flags of the verb."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Run folder (its best checkpoint, else its last), checkpoint file, or weights of any known system."""
    format: Literal["torch", "aoti", "onnx"] = "torch"
    """A torch.export program, an AOTInductor package, or ONNX."""
    out: str = ""
    """File to write; empty: named after the run, with the ending of the format, in this folder."""
    images: tuple[str, ...] = ()
    """Image files to check on; empty: three of the val split of the run's data."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N: where the program will run. ONNX runs anywhere."""
    opset: int = 18
    """Version of ONNX's operators, at least 18."""


@command
def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    if "-h" in argv or "--help" in argv:
        with contextlib.suppress(SystemExit):
            parse(ExportArguments, ["--help"], PROGRAM, DESCRIPTION)
        return 0
    arguments, overrides = parse(ExportArguments, argv, PROGRAM, DESCRIPTION, rest=True)
    if arguments.opset < 18:
        raise ConfigError(f"--opset must be at least 18, got {arguments.opset}")
    out = Path(arguments.out or Path(arguments.run).resolve().stem + _SUFFIX[arguments.format])
    if arguments.format != "onnx" and out.suffix != ".pt2":
        raise ConfigError(f"a file of --format {arguments.format} is called .pt2, got --out {out}")
    if arguments.format == "onnx" and out.suffix != ".onnx":
        raise ConfigError(f"a file of --format onnx is called .onnx, got --out {out}")
    file, state = read_state(arguments.run)
    config = apply_overrides(restore_config(state, str(file)), overrides)
    device = "cpu" if arguments.format == "onnx" else arguments.device
    predictor = restore(state, config, str(file), device=device)
    images = pictures(arguments.images, config)
    if len(eval_views(config.data)) > 1:
        print("note: test-time augmentation is no part of the file, which sees each image once")
    info = ExportInfo.of(predictor.model, config.data, predictor.categories, predictor.category_ids)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_writable(out)
        exported = write(predictor, out, info, arguments)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror or error}; pass another --out") from None
    print(
        f"{out}: {out.stat().st_size / 2**20:.1f} MiB, for images uint8 [B, 3, H, W] and sizes int64 [B, 2]; "
        f"any B, H and W multiples of 32 from {info.least_side}"
    )
    agreement = check(predictor.model, exported, images, config.data, info.least_side)
    print(f"checked on {len(images)} images at two sizes, one by one and batched: {agreement}")
    if not agreement.holds:
        print("error: the file does not find what the detector finds; do not use it", file=sys.stderr)
    if not agreement.detections:
        print(
            "error: the detector finds nothing on these images, so that nothing was compared; "
            "pass --images with objects, or a lower score threshold",
            file=sys.stderr,
        )
        return 1
    return 0 if agreement.holds else 1


def check_writable(file: Path) -> None:
    """Raises OSError if a file cannot be written; what writes it later says so in words of its own."""
    new = not file.exists()
    with file.open("ab"):
        pass
    if new:
        file.unlink()


def write(predictor: Predictor, out: Path, info: ExportInfo, arguments: ExportArguments) -> ExportedDetector:
    """Writes the file and loads it again."""
    if arguments.format == "onnx":
        try:
            from drcnn.engine.exporting_onnx import save_onnx
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"--format onnx needs {error.name}; install it with: pip install 'drcnn[export]'"
            ) from None
        with use_backend("reference"):  # the operators that have a translation
            program = trace(predictor.model)
        save_onnx(program, out, info, arguments.opset)
        return open_onnx(out, "cpu")[0]
    program = trace(predictor.model)
    for line in needs(program):
        print(f"to load it where drcnn is not imported: {line}")
    if arguments.format == "torch":
        save_program(program, out, info)
        return load_program(out)
    save_package(program, out, info)
    return load_package(out)


def pictures(files: Sequence[str], config: Config) -> list[np.ndarray]:
    """Reads images to check on: the files, or some of the val split, spread evenly.

    Raises:
        ConfigError: if there are none.
        DataError: if a file cannot be read.
    """
    if files:
        return [load_image(file, upright=True, max_pixels=config.data.max_pixels) for file in files]
    try:
        dataset = load_split(config.data, "val")
    except DataError as error:
        raise ConfigError(f"no images to check on: {error}; or pass --images a.jpg b.jpg c.jpg") from None
    if not len(dataset):
        raise ConfigError("the val split holds no image to check on; pass --images a.jpg b.jpg c.jpg")
    chosen = np.linspace(0, len(dataset) - 1, min(PICTURES, len(dataset))).round().astype(int)
    return [dataset.load(int(index)) for index in chosen]


if __name__ == "__main__":
    sys.exit(main())
