"""``python -m drcnn.train CONFIG [--field value ...]``: trains a detector."""

import contextlib
import dataclasses
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drcnn.arguments import parse
from drcnn.command import command
from drcnn.config import Config, load_config, print_field_help, to_dict
from drcnn.engine import distributed
from drcnn.engine.batch_size import find_share, with_earlier_batch, with_share
from drcnn.engine.optim import describe_lr, describe_schedule
from drcnn.engine.signals import RunStopped
from drcnn.engine.summary import build_model, describe_backends, describe_model
from drcnn.engine.trainer import Trainer
from drcnn.engine.writing import replacing
from drcnn.errors import ConfigError
from drcnn.structures import ImageBatch

PROGRAM = "drcnn train"
DESCRIPTION = """usage: drcnn train CONFIG [flags]
Trains the detector that CONFIG, a file in configs/, describes.

Examples:
  drcnn train configs/quickstart.py                           needs no data
  drcnn train configs/r101_fpn_2x.py --data.root data/coco --train.amp bf16
  drcnn train configs/r101_fpn_2x.py --resume
  torchrun --nproc-per-node 8 -m drcnn.train configs/r101_fpn_2x.py"""
OWN_FILES = ("config.json", "metrics.jsonl", "log.txt", "metrics_val.json", "metrics_test.json", "trace.json")
OWN_FOLDERS = ("checkpoints", "predictions", "tensorboard", "wandb")


@dataclass(frozen=True)
class TrainArguments:
    """Flags of the verb itself; every field of the config is a flag as well."""

    out: str = ""
    """Run folder; runs/<name of CONFIG> if empty."""
    resume: bool = False
    """Continue the run in the run folder from its checkpoints/last.pt, or from the newest that is whole."""
    overwrite: bool = False
    """Start anew in a run folder that holds checkpoints, and delete what the earlier run wrote."""
    profile: int = 0
    """Trace so many iterations, after the first few, to trace.json in the run folder."""
    dry_run: bool = False
    """Print the resolved config, the parameter count, the schedule and one forward's shapes; read no data."""


@command
def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code: 0, 2 for an error to fix, 128 + the signal when stopped."""
    if "-h" in argv or "--help" in argv:
        return show_help(argv)
    if not argv or argv[0].startswith("-"):
        raise ConfigError(f"no config file given; {known_configs()}")
    path, rest = Path(argv[0]), argv[1:]
    arguments, overrides = parse(TrainArguments, rest, PROGRAM, DESCRIPTION, rest=True)
    config = load_config(path, overrides)
    if arguments.dry_run:
        dry_run(config)
        return 0
    if arguments.resume and arguments.overwrite:
        raise ConfigError("--resume continues a run and --overwrite deletes it; pass one of them")
    run = Path(arguments.out) if arguments.out else Path("runs") / path.stem
    if arguments.resume and config.train.auto_batch:
        config, share = with_earlier_batch(config, run), 0
    else:
        share = find_share(config)
    device = distributed.rank_device(config.train.device)
    with distributed.process_group(device, config.train.rank_timeout):
        config, said = with_share(config, share) if share else (config, [])
        prepare_run_folder(run, config, resume=arguments.resume, overwrite=arguments.overwrite)
        spoken = shlex.join(["drcnn", "train", *argv])
        settings = {"resume": arguments.resume, "command": spoken, "profile": arguments.profile}
        trainer = Trainer(config, to_dict(config), run, **settings, notes=said)
        try:
            trainer.fit()
        except RunStopped as stopped:
            if distributed.is_main():
                print(stopped, file=sys.stderr)
            return stopped.exit_code
    return 0


def show_help(argv: list[str]) -> int:
    """Prints the flags of the verb and every field of the config, with CONFIG's values if it is given."""
    with contextlib.suppress(SystemExit):
        parse(TrainArguments, ["--help"], PROGRAM, DESCRIPTION)
    config = None if argv[0].startswith("-") else load_config(argv[0])
    print("\nFields of the config, as flags (give CONFIG before --help to see its values):")
    print_field_help(config, PROGRAM)
    return 0


def known_configs() -> str:
    """Lists the files in ``configs/``."""
    for folder in (Path("configs"), Path(__file__).parents[1] / "configs"):
        names = sorted(str(p) for p in folder.glob("*.py"))
        if names:
            return f"there are {', '.join(names)}"
    return "pass the path of a file that defines `config`"


def prepare_run_folder(run: Path, config: Config, *, resume: bool, overwrite: bool) -> None:
    """Makes or checks the run folder and writes ``config.json``; every rank waits until that is done.

    Raises:
        ConfigError: if the folder holds another run, or none to resume, or cannot be written.
    """
    if distributed.is_main():
        last, begun = run / "checkpoints" / "last.pt", any((run / "checkpoints").glob("*.pt"))
        if resume and not begun:
            raise ConfigError(
                f"there is nothing to resume: {last} does not exist; leave out --resume or fix --out"
            )
        if begun and not (resume or overwrite):
            raise ConfigError(
                f"{run} already holds checkpoints; pass --resume to continue, --out FOLDER for another run, "
                "or --overwrite to delete them"
            )
        try:
            if not resume:
                for folder in OWN_FOLDERS:
                    shutil.rmtree(run / folder, ignore_errors=True)
                for name in OWN_FILES:
                    (run / name).unlink(missing_ok=True)
            run.mkdir(parents=True, exist_ok=True)
            with replacing(run / "config.json") as file:
                file.write(json.dumps(to_dict(config), indent=1).encode() + b"\n")
        except OSError as error:
            raise ConfigError(
                f"cannot write the run folder {run}: {error.strerror}; pass another --out"
            ) from None
    distributed.barrier()


def dry_run(config: Config) -> None:
    """Prints what a run would do, from the config alone."""
    print_fields(config)
    model = build_model(config)
    device = distributed.rank_device(config.train.device)
    print(describe_model(config, model))
    print(f"schedule: {describe_schedule(config.optim)}")
    print(f"lr: {describe_lr(config.optim, config.data.batch_size)}")
    print(f"operators: {describe_backends(device.type)}")
    size = (256, 320)
    print(f"one forward of 2 random images of {size[0]} x {size[1]}:")
    for line in forward_shapes(model.to(device), device, size):
        print(f"  {line}")


def print_fields(config: Any, prefix: str = "") -> None:
    """Prints every field with its flag's name."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            print_fields(value, f"{name}.")
        else:
            print(f"{name} = {value}")


def forward_shapes(model: nn.Module, device: torch.device, size: tuple[int, int]) -> list[str]:
    """Runs one detection on random images and returns the shapes that each part of the model gives."""
    lines: list[str] = []

    def record(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: lines.append(f"{name}: {shapes(output)}")

    hooks = [part.register_forward_hook(record(name)) for name, part in model.named_children()]
    images = ImageBatch(
        torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, device=device),
        torch.tensor([size, size], device=device),
    )
    try:
        with torch.no_grad():
            detections = model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [f"images: {shapes(images.tensor)}", *lines, f"detections: {shapes(detections)}"]


def shapes(value: Any) -> str:
    """Writes the shapes of the tensors in a nested output."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, dict):
        return ", ".join(f"{k} {shapes(v)}" for k, v in value.items())
    if hasattr(value, "_asdict"):
        return ", ".join(f"{k} {shapes(v)}" for k, v in value._asdict().items() if v is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(shapes, value)))
    return ""


if __name__ == "__main__":
    sys.exit(main())
