"""``python -m drcnn.predict RUN INPUT...``: finds objects in images.

Exit code 0 when every image was read, 1 when some were not (the others are done, and the bad ones are named
at the end), 2 for an error in the arguments or the checkpoint, or when there is no image at all.
"""

import contextlib
import glob
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from tyro.conf import Positional, arg

from drcnn.arguments import parse
from drcnn.command import command, one_line
from drcnn.data import MAX_PIXELS, load_image
from drcnn.engine.countdown import Countdown
from drcnn.engine.predictor import Predictor, Result
from drcnn.errors import ConfigError, DataError
from drcnn.loading import load

PROGRAM = "drcnn predict"
DESCRIPTION = (
    "Finds objects in images, draws them with class and score, and writes COCO-format results. "
    "Exit code: 0 all done, 1 some images could not be read (they are named), 2 nothing done."
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""Files that are taken from a folder."""


@dataclass(frozen=True)
class PredictArguments:
    """Flags of the verb."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Run folder (its best checkpoint, else its last), checkpoint file, ONNX file of drcnn export, or weights
    of any known system."""
    inputs: Positional[Annotated[tuple[str, ...], arg(metavar="INPUT...")]]
    """Image files, folders (with all below them) and quoted globs such as 'photos/**/*.jpg'."""
    out: str = "predictions"
    """Folder for the pictures, results.json (COCO-format results) and images.json (names of their images)."""
    score: float = 0.5
    """Least score of an object."""
    batch_size: int = 4
    """Images that run together."""
    max_pixels: int = MAX_PIXELS
    """Most pixels of an image: larger ones are passed over, undecoded."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's choice."""


@command
def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    if "-h" in argv or "--help" in argv:
        with contextlib.suppress(SystemExit):
            parse(PredictArguments, ["--help"], PROGRAM, DESCRIPTION)
        return 0
    arguments = parse(PredictArguments, argv, PROGRAM, DESCRIPTION)
    for flag, value in (("--batch-size", arguments.batch_size), ("--threads", arguments.threads)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} must be at least 1, got {value}")
    if not 0.0 <= arguments.score <= 1.0:
        raise ConfigError(f"--score must lie between 0 and 1, got {arguments.score}")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    out = Path(arguments.out)
    files = find_images(arguments.inputs, out)
    predictor = load(arguments.run, device=arguments.device)
    try:
        out.mkdir(parents=True, exist_ok=True)
        broken = predict(predictor, files, out, arguments)
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror or error}; pass another --out") from None
    if broken:
        names = ", ".join(map(str, broken))
        print(f"{len(broken)} of {len(files)} images could not be read: {names}", file=sys.stderr)
    return 1 if broken else 0


def find_images(inputs: Sequence[str], out: Path) -> list[Path]:
    """Lists the images that files, folders and globs mean, each once, without what lies in ``out``.

    Raises:
        ConfigError: an input that matches nothing.
    """
    if not inputs:
        raise ConfigError("no input given; pass image files, folders or a quoted glob such as 'photos/*.jpg'")
    found: dict[Path, Path] = {}
    for text in inputs:
        matches = [path for path in _expand(text) if out.resolve() not in path.resolve().parents]
        if not matches:
            kind = f"folder {text} holds no image ({', '.join(SUFFIXES)})" if Path(text).is_dir() else text
            raise ConfigError(f"no image matches {text}" if kind == text else kind)
        for path in matches:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _expand(text: str) -> list[Path]:
    path = Path(text)
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return [p for p in map(Path, sorted(glob.glob(text, recursive=True))) if p.is_file()]


def predict(
    predictor: Predictor, files: Sequence[Path], out: Path, arguments: PredictArguments
) -> list[Path]:
    """Runs over the files, writes pictures and json files and returns the files that could not be read."""
    results: list[dict] = []
    images: list[dict] = []
    broken: list[Path] = []
    names = picture_names(files)
    done = 0
    with Countdown("predict") as progress:
        for batch in batches(range(len(files)), arguments.batch_size):
            loaded: dict[int, np.ndarray] = {}
            for index in batch:
                try:
                    loaded[index] = load_image(files[index], upright=True, max_pixels=arguments.max_pixels)
                except DataError as error:
                    broken.append(files[index])
                    progress.say(f"warning: {one_line(error)}; going on with the others")
            found = predictor(list(loaded.values()), score_threshold=arguments.score, batch_size=len(batch))
            for index, result in zip(loaded, found, strict=True):
                result.draw().save(out / names[index], quality=92)
                results += result.to_coco(index + 1)
                images.append(image_record(index + 1, files[index], names[index], result))
            done += len(batch)
            progress(done, len(files))
    categories = [
        {"id": number, "name": name}
        for number, name in zip(predictor.category_ids, predictor.categories, strict=True)
    ]
    (out / "results.json").write_text(json.dumps(results) + "\n")
    (out / "images.json").write_text(
        json.dumps({"images": images, "categories": categories}, indent=1) + "\n"
    )
    print(
        f"{len(results)} objects in {len(images)} images; pictures, results.json and images.json are in {out}"
    )
    return broken


def image_record(number: int, file: Path, picture: str, result: Result) -> dict:
    """The COCO image record that ``results.json`` refers to by its id."""
    height, width = result.image.shape[:2]
    return {"id": number, "file_name": str(file), "height": height, "width": width, "picture": picture}


def batches(items: range, size: int) -> Iterator[range]:
    """Cuts a range into pieces of ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def picture_names(files: Sequence[Path]) -> list[str]:
    """Gives each file's picture a name of its own: that of the file, numbered where names repeat."""
    names: list[str] = []
    taken: set[str] = set()
    for file in files:
        name, number = f"{file.stem}.jpg", 2
        while name.lower() in taken:
            name, number = f"{file.stem}_{number}.jpg", number + 1
        taken.add(name.lower())
        names.append(name)
    return names


if __name__ == "__main__":
    sys.exit(main())
