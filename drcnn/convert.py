"""``python -m drcnn.convert IN OUT``: turns weights of any known system into one safetensors file."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from drcnn.arguments import parse
from drcnn.command import command
from drcnn.config import Config, apply_overrides, print_field_help
from drcnn.errors import ConfigError
from drcnn.loading import read_state, restore, restore_config, save_detector

PROGRAM = "drcnn convert"
DESCRIPTION = """Reads a detector of torchvision, MMDetection, Detectron2, maskrcnn-benchmark, the Dynamic
R-CNN author or drcnn, and writes it as a safetensors file that drcnn loads alone. Every field of the
recognised config is a flag as well.

Examples:
  drcnn convert faster_rcnn_r50_fpn_1x_coco.pth faster.safetensors
  drcnn convert theirs.pth mine.safetensors --model.rpn.nms 0.85
  drcnn predict mine.safetensors photos/"""


@dataclass(frozen=True)
class ConvertArguments:
    """Flags of the verb."""

    weights: Positional[Annotated[str, arg(metavar="IN")]]
    """Weights file, checkpoint or run folder; what kind it is is told by its content."""
    out: Positional[Annotated[str, arg(metavar="OUT")]]
    """File to write; its name ends in .safetensors."""
    overwrite: bool = False
    """Replace OUT if it is there."""
    half: bool = False
    """Store floating-point tensors in 16 bits, in half the space and less exact."""


@command
def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    if "-h" in argv or "--help" in argv:
        return show_help(argv)
    arguments, overrides = parse(ConvertArguments, argv, PROGRAM, DESCRIPTION, rest=True)
    out = Path(arguments.out)
    if out.suffix != ".safetensors":
        raise ConfigError(f"OUT must end in .safetensors, got {out}")
    if out.exists() and not arguments.overwrite:
        raise ConfigError(f"{out} exists; pass --overwrite to replace it, or another name")
    file, state = read_state(arguments.weights)
    config = apply_overrides(restore_config(state, str(file)), overrides)
    restore(state, config, str(file), device="cpu")  # every tensor has its place, or the error names it
    save_detector(out, state, config, half=arguments.half)
    for line in describe(state, config):
        print(line)
    print(f"written: {out} ({out.stat().st_size / 2**20:.0f} MiB)")
    return 0


def describe(state: dict[str, Any], config: Config) -> list[str]:
    """Says what was recognised."""
    model = config.model
    names = state["categories"]
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    lines = [
        f"source: {state.get('source', 'drcnn')}",
        f"detector: {type(model).__name__.removesuffix('Config')} of {model.num_classes} classes ({shown}) "
        f"on {getattr(model.backbone, 'name', type(model.backbone).__name__)}",
    ]
    return lines + [f"note: {note}" for note in state.get("notes", [])]


def show_help(argv: list[str]) -> int:
    """Prints the flags of the verb and the fields of the config, with those of IN if it is given."""
    with contextlib.suppress(SystemExit):
        parse(ConvertArguments, ["--help"], PROGRAM, DESCRIPTION)
    config = None
    if not argv[0].startswith("-"):
        file, state = read_state(argv[0])
        config = restore_config(state, str(file))
    print("\nFields of the recognised config, as flags (give IN before --help to see its values):")
    print_field_help(config, PROGRAM)
    return 0


if __name__ == "__main__":
    sys.exit(main())
