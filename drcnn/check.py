"""``python -m drcnn.check DATA``: finds what is wrong with data, describes them, and writes a repaired copy.

Exit code 0: no error, though perhaps warnings. Exit code 1: there are errors, and with ``--fix`` the repaired
copy has some too. Exit code 2: nothing could be checked.
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from drcnn.arguments import parse
from drcnn.command import command
from drcnn.config import Config, load_config
from drcnn.data import make_synthetic
from drcnn.data.audit import AnchorGrid, Audit, audit, config_sources, find_sources, model_anchors
from drcnn.data.audit.repair import check_new, repair
from drcnn.data.audit.text import headline, show, show_repairs
from drcnn.data.source import Source
from drcnn.engine.countdown import Countdown
from drcnn.errors import ConfigError

PROGRAM = "drcnn check"
DESCRIPTION = """Finds what is wrong with a data set, each problem with file and id, and describes it.

Examples:
  drcnn check configs/bccd.py --data.root /data/bccd   all splits of a config; its fields are flags
  drcnn check annotations/instances_train.json         one COCO file; its images are looked for nearby
  drcnn check /data/mine                               a folder of COCO, VOC or YOLO data
  drcnn check /data/mine --fix /data/mine_fixed        writes a repaired copy as COCO files

Exit code: 0 no error, 1 errors (with --fix: of the repaired copy), 2 nothing could be checked."""


@dataclass(frozen=True)
class CheckArguments:
    """Flags of the verb."""

    data: Positional[Annotated[str, arg(metavar="DATA")]] = ""
    """A config from configs/ (all its splits), a COCO json, a YOLO yaml, or a folder of COCO, VOC or YOLO
    data; the format is told by the content."""
    image_folder: str = ""
    """Folder of the images, where it is not near the annotations."""
    images: bool = True
    """Read and decode every image file; --no-images looks only whether they exist."""
    masks: bool = False
    """Demand a usable mask of every annotation, as training with masks does; a config says it itself."""
    short_side: int | None = None
    """Length in pixels of the shorter image side at the network input; None: the config's, else 800."""
    max_size: int | None = None
    """Greatest length in pixels of the longer side; None: the config's, else 1333."""
    limit: int = 5
    """Problems of each kind to print; --json has all."""
    json: str = ""
    """File to write all problems and statistics to; - prints them and nothing else."""
    fix: str = ""
    """Folder to write a repaired copy to: COCO files, links to the images, and repairs.json."""
    threads: int | None = None
    """Threads that decode images; None takes one for each processor."""


@command
def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    if "-h" in argv or "--help" in argv:
        with contextlib.suppress(SystemExit):
            parse(CheckArguments, ["--help"], PROGRAM, DESCRIPTION)
        return 0
    arguments, overrides = parse(CheckArguments, argv, PROGRAM, DESCRIPTION, rest=True)
    for name, least in (("short_side", 1), ("max_size", 1), ("threads", 1), ("limit", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not arguments.data:
        raise ConfigError("no data given; pass a config, a COCO json, a VOC folder or a YOLO yaml")
    if arguments.fix:
        check_new(Path(arguments.fix))
    found, masks = check(arguments, overrides)
    quiet = arguments.json == "-"
    write_json(arguments.json, found)
    console = Console(soft_wrap=True)
    if not quiet:
        console.print(show(found, arguments.limit))
        print(f"{arguments.data}: {headline(found)}")
    if arguments.fix:
        repairs, found = repair(found, Path(arguments.fix), masks=masks)
        done = sum(bool(repaired.done) for repaired in repairs)
        if not quiet:
            console.print(show_repairs(repairs, arguments.limit))
            print(f"{arguments.fix}: {done} repairs, listed in repairs.json; {headline(found)}")
    return 1 if found.errors else 0


def check(arguments: CheckArguments, overrides: list[str]) -> tuple[Audit, bool]:
    """Checks what the arguments name; also returns whether masks are demanded."""
    path = Path(arguments.data)
    sources, options = (
        from_config(path, overrides) if path.suffix == ".py" else from_files(arguments, overrides)
    )
    if arguments.short_side is not None:
        options["short_side"] = arguments.short_side
    if arguments.max_size is not None:
        options["max_size"] = arguments.max_size
    options["masks"] |= arguments.masks
    with Countdown("check", silent=not arguments.images) as progress:
        found = audit(
            sources,
            name=arguments.data,
            decode=arguments.images,
            threads=arguments.threads,
            progress=progress,
            **options,
        )
    return found, options["masks"]


def from_config(path: Path, overrides: list[str]) -> tuple[dict[str, Source], dict]:
    """The splits of a config, its resize and its anchors."""
    return of_config(load_config(path, overrides))


def of_config(config: Config) -> tuple[dict[str, Source], dict]:
    """What :func:`drcnn.data.audit.audit` takes for the data and the detector of a config."""
    data = config.data
    if data.synthetic is not None and not Path(data.root).exists():
        make_synthetic(data.root, data.synthetic)
    middle = sorted(data.short_sides)[len(data.short_sides) // 2]
    options = {
        "short_side": middle,
        "max_size": data.max_size,
        "max_pixels": data.max_pixels,
        "anchors": model_anchors(config.model),
        "masks": data.masks,
    }
    return config_sources(data), options


def from_files(arguments: CheckArguments, overrides: list[str]) -> tuple[dict[str, Source], dict]:
    """The splits that a file or folder holds, with COCO's usual resize and anchors."""
    if overrides:
        raise ConfigError(f"unknown argument {overrides[0]}; fields of a config are flags of a config alone")
    images = Path(arguments.image_folder) if arguments.image_folder else None
    found = find_sources(Path(arguments.data), images)
    for file in found.left_out:
        print(
            f"note: {file} names no split and is left out; pass it to check it",
            file=sys.stderr,
        )
    return found.sources, {"anchors": AnchorGrid(), "masks": False}


def write_json(file: str, found: Audit) -> None:
    """Writes a check as json to a file, or to stdout for "-"."""
    if not file:
        return
    text = json.dumps(found.to_dict(), indent=1)
    if file == "-":
        print(text)
        return
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(text + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}; pass another --json") from None


if __name__ == "__main__":
    sys.exit(main())
