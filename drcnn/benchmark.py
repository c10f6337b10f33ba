"""``python -m drcnn.benchmark [CONFIG | RUN ...]``: latency, throughput and memory, beside torchvision's."""

import contextlib
import itertools
import json
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tyro.conf import Positional, arg

from drcnn import presets
from drcnn.arguments import parse, split_fields
from drcnn.command import command
from drcnn.config import Config, apply_overrides, load_config
from drcnn.data import load_image
from drcnn.data.remote import fetch, is_url
from drcnn.engine.countdown import Countdown
from drcnn.engine.distributed import pick_device
from drcnn.engine.latency import Contender, Timing, time_in_turns
from drcnn.engine.random_weights import settle
from drcnn.engine.torchvision_twin import share_weights, torchvision_twin
from drcnn.errors import ConfigError
from drcnn.loading import read_state, restore, restore_config
from drcnn.ops import use_backend
from drcnn.predict import find_inputs
from drcnn.structures import Detections, ImageBatch

PROGRAM = "drcnn benchmark"
DESCRIPTION = """Times detectors on this device, in turns, beside torchvision's of the same sizes and weights.

Examples:
  drcnn benchmark                                    Faster and Dynamic R-CNN R-50, 800 x 1344, batch 1
  drcnn benchmark --table6                           Table 6 of the paper: Dynamic and Cascade, with masks
  drcnn benchmark runs/mine --images photos/ --batch-sizes 1 4 8 --dtypes fp32 bf16
  drcnn benchmark configs/bccd.py --size 256 352 --backends native reference --out speed.json

Every field of the configs is a flag as well, after the names: --model.box-head.sampling-ratio 2."""

TABLE_6 = {
    "Dynamic R-CNN": 13.9,
    "Cascade R-CNN": 11.2,
    "Dynamic Mask R-CNN": 11.3,
    "Cascade Mask R-CNN": 7.3,
}
"""Images per second on a GeForce RTX 2080 Ti, ResNet-50 (arXiv 2004.06002, table 6)."""

_AMP = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class BenchmarkArguments:
    """Flags of the verb."""

    detectors: Positional[Annotated[tuple[str, ...], arg(metavar="[CONFIG | RUN ...]")]] = ()
    """Config files (with random weights), run folders, checkpoints or weights of any known system; Faster and
    Dynamic R-CNN with ResNet-50 if there are none."""
    table6: bool = False
    """Dynamic against Cascade R-CNN, with and without masks, beside the figures of the paper."""
    size: tuple[int, int] = (800, 1344)
    """Height and width of the images in pixels, multiples of 32."""
    images: tuple[str, ...] = ()
    """Image files, folders and globs, stretched to the size; none for noise."""
    batch_sizes: tuple[int, ...] = (1,)
    """Images of a pass."""
    dtypes: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32",)
    """Arithmetic: fp32, or autocast to 16 bits."""
    backends: tuple[Literal["auto", "native", "triton", "reference"], ...] = ("auto",)
    """Which implementation of our operators."""
    torchvision: bool = True
    """Time torchvision's detectors too, where it has such ones."""
    rounds: int = 20
    """Timed passes of each detector in each setting."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's choice."""
    out: str = ""
    """Json file for the figures; none if empty."""


@command
def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    if "-h" in argv or "--help" in argv:
        with contextlib.suppress(SystemExit):
            parse(BenchmarkArguments, ["--help"], PROGRAM, DESCRIPTION)
        return 0
    own, fields = split_fields(argv)
    arguments = parse(BenchmarkArguments, own, PROGRAM, DESCRIPTION)
    check(arguments)
    device = pick_device(arguments.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    pixels = make_images(arguments)
    models = build(arguments, fields, pixels[:1].to(device))
    theirs = twins(models, device) if arguments.torchvision and not arguments.table6 else {}
    contenders = [
        contender
        for batch in arguments.batch_sizes
        for dtype in arguments.dtypes
        for contender in line_up(models, theirs, arguments.backends, pixels[:batch].to(device), dtype)
    ]
    where = describe(device)
    print(f"{where}, {arguments.size[0]} x {arguments.size[1]} px, {arguments.rounds} rounds in turns")
    with torch.no_grad(), Countdown("benchmark", "rounds") as progress:
        timings = time_in_turns(contenders, device, rounds=arguments.rounds, progress=progress)
    rows = [describe_timing(*pair, contenders, timings) for pair in zip(contenders, timings, strict=True)]
    show(rows, table6=arguments.table6)
    if arguments.out:
        write(Path(arguments.out), {"device": where, "arguments": asdict(arguments), "timings": rows})
    return 0


def check(arguments: BenchmarkArguments) -> None:
    """Checks the ranges of numbers and what goes together.

    Raises:
        ConfigError: naming the flag.
    """
    if any(side < 32 or side % 32 for side in arguments.size):
        raise ConfigError(f"--size must be multiples of 32, got {arguments.size[0]} {arguments.size[1]}")
    for flag in ("batch-sizes", "dtypes", "backends"):
        if not getattr(arguments, flag.replace("-", "_")):
            raise ConfigError(f"--{flag} needs at least one value")
    if min(arguments.batch_sizes) < 1 or arguments.rounds < 1:
        raise ConfigError("--batch-sizes and --rounds must be at least 1")
    if arguments.threads is not None and arguments.threads < 1:
        raise ConfigError(f"--threads must be at least 1, got {arguments.threads}")
    if arguments.table6 and arguments.detectors:
        raise ConfigError(f"--table6 goes without detectors, got {arguments.detectors[0]}")


def make_images(arguments: BenchmarkArguments) -> Tensor:
    """Makes as many images as the largest batch has: uint8 Tensor[B, 3, H, W]."""
    count, (height, width) = max(arguments.batch_sizes), arguments.size
    if not arguments.images:
        return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
    files = itertools.islice(itertools.cycle(find_inputs(arguments.images)), count)
    pictures = (
        Image.fromarray(load_image(fetch(file) if is_url(file) else file, upright=True)).resize(
            (width, height)
        )
        for file in files
    )
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])


def build(arguments: BenchmarkArguments, fields: Sequence[str], pixels: Tensor) -> dict[str, nn.Module]:
    """Makes the detectors, by name, in evaluation mode on the device of ``pixels`` (uint8 [B, 3, H, W])."""
    models: dict[str, nn.Module] = {}
    configs: dict[str, Config] = {}
    if not arguments.detectors:
        for name, model in (_table_6() if arguments.table6 else _usual()).items():
            configs[name] = apply_overrides(Config(model, presets.coco()), fields)
    for given in dict.fromkeys(arguments.detectors):
        name = Path(given).stem if Path(given).stem not in {*configs, *models} else given
        if given.endswith(".py"):
            configs[name] = load_config(given, fields)
            continue
        file, state = read_state(given)
        config = apply_overrides(restore_config(state, str(file)), fields)
        models[name] = restore(state, config, str(file), device=pixels.device).model
    for name, config in configs.items():
        models[name] = config.model.build().to(pixels.device).eval()
        settle(models[name], image_batch(pixels))
    return models


def _usual() -> dict[str, Any]:
    faster = presets.faster_rcnn()
    return {"Faster R-CNN": faster, "Dynamic R-CNN": presets.dynamic(faster)}


def _table_6() -> dict[str, Any]:
    made = (
        presets.dynamic(presets.faster_rcnn()),
        presets.cascade_rcnn(),
        presets.dynamic(presets.mask_rcnn()),
        presets.cascade_mask_rcnn(),
    )
    return dict(zip(TABLE_6, made, strict=True))


def twins(models: dict[str, nn.Module], device: torch.device) -> dict[str, nn.Module]:
    """Makes torchvision's detectors of the same sizes and weights; says which it does not have."""
    found = {}
    for name, model in models.items():
        try:
            twin = torchvision_twin(model.config)
        except ConfigError as error:
            print(f"note: {name} stands alone: {error}")
            continue
        share_weights(model, twin)
        # What ours leaves to the caller: the images have their size, and masks stay in their boxes.
        twin.transform.resize = lambda image, target=None: (image, target)
        twin.transform.postprocess = lambda result, *sizes: result
        found[name] = twin.to(device).eval()
    return found


def image_batch(pixels: Tensor) -> ImageBatch:
    """Makes a batch of images without padding (uint8 Tensor[B, 3, H, W])."""
    return ImageBatch(pixels, torch.tensor([pixels.shape[-2:]] * len(pixels), device=pixels.device))


def line_up(
    models: dict[str, nn.Module],
    theirs: dict[str, nn.Module],
    backends: Sequence[str],
    pixels: Tensor,
    dtype: str,
) -> Iterator[Contender]:
    """Yields the detectors in one batch size and dtype: ours on each backend, torchvision's once.

    Each is given what it takes, on the device: ours uint8 images, torchvision's floating-point ones.
    """
    batch, listed = image_batch(pixels), list(pixels.float() / 255)
    with_dtype = partial(_run, device_type=pixels.device.type, amp=_AMP[dtype])
    common = {"dtype": dtype, "batch": len(pixels), "count": _count}
    for name, model in models.items():
        rival = f"{name}, torchvision" if name in theirs else ""
        for backend in backends:
            run = partial(with_dtype, model, batch, backend=backend)
            yield Contender(name, backend, run=run, model=model, rival=rival, **common)
        if rival:
            run = partial(with_dtype, theirs[name], listed, backend="auto")
            yield Contender(rival, "", run=run, model=theirs[name], **common)


def _run(
    model: nn.Module, images: Any, *, device_type: str, amp: torch.dtype | None, backend: str
) -> Detections | list[dict[str, Tensor]]:
    with use_backend(backend), torch.autocast(device_type, dtype=amp, enabled=amp is not None):
        return model(images)


def _count(found: Detections | list[dict[str, Tensor]]) -> int:
    """Objects that ours or torchvision's found."""
    if isinstance(found, Detections):
        return int(found.valid.sum())
    return sum(len(result["scores"]) for result in found)


def describe(device: torch.device) -> str:
    """Says in a line what the figures are of."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.is_file() else []
    name = names[0].strip() if names else platform.processor() or platform.machine()
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads of {name}"


def describe_timing(
    contender: Contender, timing: Timing, contenders: Sequence[Contender], timings: Sequence[Timing]
) -> dict[str, Any]:
    """Makes the row of a contender; its speed is relative to its rival's, by the median."""
    row: dict[str, Any] = {
        name: getattr(contender, name) for name in ("name", "backend", "dtype", "batch", "rival")
    }
    if not timing.seconds:
        return row | {"out_of_memory": True}
    for other, measured in zip(contenders, timings, strict=True):
        same = (other.name, other.dtype, other.batch) == (contender.rival, contender.dtype, contender.batch)
        if same and measured.seconds:
            row["speed_of_rival"] = measured.quantile(0.5) / timing.quantile(0.5)
    return row | {
        "p50_ms": 1000 * timing.quantile(0.5),
        "p95_ms": 1000 * timing.quantile(0.95),
        "images_per_second": timing.images_per_second(contender.batch),
        "peak_mb": timing.peak_mb,
        "objects": timing.objects,
    }


def show(rows: Sequence[dict[str, Any]], *, table6: bool) -> None:
    """Prints the rows as a table, and with ``table6`` the paper's figures beside them."""
    table = Table(box=None, pad_edge=False)
    table.add_column("detector")
    for title in ("backend", "dtype"):
        table.add_column(title)
    numbers = ["batch", "p50 ms", "p95 ms", "images/s", "MiB", "objects", "speed"]
    for title in numbers + ["paper's images/s"] * table6:
        table.add_column(title, justify="right")
    for row in rows:
        cells = [row["name"], row["backend"], row["dtype"], str(row["batch"])]
        if "out_of_memory" in row:
            table.add_row(*cells, "out of memory")
            continue
        cells += [f"{row['p50_ms']:.1f}", f"{row['p95_ms']:.1f}", f"{row['images_per_second']:.2f}"]
        cells += [f"{row['peak_mb']:.0f}", f"{row['objects']:.0f}"]
        cells.append(f"{row['speed_of_rival']:.2f}x" if "speed_of_rival" in row else "")
        table.add_row(*cells, *[str(TABLE_6[row["name"]]) if row["name"] in TABLE_6 else ""] * table6)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    print(
        "MiB: weights and the most that a pass adds; objects: found in an image; speed: torchvision's is 1."
    )
    if table6:
        show_ratios(rows)


def show_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Prints how much faster Dynamic than Cascade R-CNN is, here and in the paper, in each setting."""
    speeds = {
        (row["name"], row["backend"], row["dtype"], row["batch"]): row["images_per_second"]
        for row in rows
        if "images_per_second" in row
    }
    for (name, *setting), speed in speeds.items():
        cascade = name.replace("Dynamic", "Cascade")
        other = speeds.get((cascade, *setting))
        if cascade != name and other:
            backend, dtype, batch = setting
            print(
                f"{name} is {speed / other:.2f} times as fast as {cascade} "
                f"({TABLE_6[name] / TABLE_6[cascade]:.2f} in the paper): {backend}, {dtype}, batch {batch}"
            )


def write(file: Path, content: dict[str, Any]) -> None:
    """Writes the figures.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror or error}; pass another --out") from None
    print(f"written: {file}")


if __name__ == "__main__":
    sys.exit(main())
