"""``python -m drcnn.predict RUN INPUT...``: finds objects in images, videos and what a camera sees.

Exit code 0 when every input was read, 1 when some were not (the others are done, and the bad ones are named
at the end), 2 for an error in the arguments or the checkpoint, or when there is no input at all.
"""

import contextlib
import glob
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Literal

import numpy as np
import torch
from tyro.conf import Positional, arg

from drcnn.arguments import parse, split_fields
from drcnn.command import command, one_line
from drcnn.data import MAX_PIXELS, load_image
from drcnn.data.remote import MAX_MEGABYTES, TIMEOUT, RemoteFile, fetch, is_url, url_name
from drcnn.data.video import VIDEO_SUFFIXES, Frame, VideoReader, open_camera, require_pyav
from drcnn.engine.countdown import Countdown
from drcnn.engine.prediction_files import PredictionFiles
from drcnn.engine.predictor import Predictor
from drcnn.engine.result import Result, class_labels
from drcnn.errors import ConfigError, DataError
from drcnn.loading import load
from drcnn.tta import Augmentation, SoftNmsChoice

PROGRAM = "drcnn predict"
DESCRIPTION = """Finds objects in images, videos and what a camera sees; draws them, writes COCO json and CSV.

Examples:
  drcnn predict runs/mine photo.jpg photos/ 'more/**/*.png' --score 0.3 --classes WBC Platelets
  drcnn predict runs/mine https://example.org/photo.jpg --tta flip --soft-nms linear
  drcnn predict runs/mine clip.mp4 --batch-size 8 --out found
  drcnn predict runs/mine --camera 0

Every field of the run's config is a flag as well, after the inputs: --data.test-short-side 600.
Exit code: 0 all done, 1 some inputs could not be read (they are named), 2 nothing done."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""Files that are taken from a folder."""


@dataclass(frozen=True)
class PredictArguments:
    """Flags of the verb."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Run folder (its best checkpoint, else its last), checkpoint file, ONNX file of drcnn export, or weights
    of any known system."""
    inputs: Positional[Annotated[tuple[str, ...], arg(metavar="INPUT...")]]
    """Image and video files, folders (with all images below them), quoted globs such as 'photos/**/*.jpg',
    http and https addresses."""
    camera: int | None = None
    """Number of a camera of this machine, 0 for the first, instead of inputs; Ctrl-C ends it."""
    out: str = "predictions"
    """Folder for the pictures and videos, results.json (COCO-format results), images.json (names of their
    images) and results.csv."""
    score: float = 0.5
    """Least score of an object."""
    classes: tuple[str, ...] = ()
    """Names of the classes to find; none for all."""
    tta: Augmentation = "config"
    """Test-time augmentation: each image with its mirror image (flip), or at three scales with theirs."""
    soft_nms: SoftNmsChoice = "config"
    """Lower the scores of overlapping objects instead of dropping them."""
    pictures: bool = True
    """Draw pictures and videos."""
    frames: int | None = None
    """Most frames of each video, or of the camera; None for all."""
    batch_size: int = 4
    """Images that run together; of a camera always one."""
    max_pixels: int = MAX_PIXELS
    """Most pixels of an image: larger ones are passed over, undecoded."""
    max_megabytes: float = MAX_MEGABYTES
    """Most megabytes that are fetched from an address."""
    timeout: float = TIMEOUT
    """Seconds that a server may be silent, and in which its file must be here."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Autocast to 16 bits."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's choice."""


@command
def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    if "-h" in argv or "--help" in argv:
        with contextlib.suppress(SystemExit):
            parse(PredictArguments, ["--help"], PROGRAM, DESCRIPTION)
        return 0
    own, fields = split_fields(argv)
    arguments = parse(PredictArguments, own, PROGRAM, DESCRIPTION)
    check(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    out = Path(arguments.out)
    inputs = [] if arguments.camera is not None else find_inputs(arguments.inputs, out)
    predictor = load(
        arguments.run,
        device=arguments.device,
        amp=arguments.amp,
        tta=arguments.tta,
        soft_nms=arguments.soft_nms,
        overrides=fields,
    )
    class_labels(arguments.classes, predictor.categories)
    try:
        run = Prediction(predictor, arguments, out)
        with run.files:
            run.camera() if arguments.camera is not None else run.inputs(inputs)
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror or error}; pass another --out") from None
    print(
        f"{run.files.objects} objects in {run.files.images} images; results.json, images.json, results.csv "
        f"{'and pictures ' if arguments.pictures else ''}are in {out}"
    )
    if run.broken:
        names = ", ".join(run.broken)
        print(f"{len(run.broken)} of {len(inputs)} inputs could not be read: {names}", file=sys.stderr)
    return 1 if run.broken else 0


def check(arguments: PredictArguments) -> None:
    """Checks the ranges of numbers and what goes together.

    Raises:
        ConfigError: naming the flag.
    """
    counts = ("--batch-size", "--threads", "--frames")
    for flag in counts:
        value = getattr(arguments, flag[2:].replace("-", "_"))
        if value is not None and value < 1:
            raise ConfigError(f"{flag} must be at least 1, got {value}")
    for flag, value in (("--max-megabytes", arguments.max_megabytes), ("--timeout", arguments.timeout)):
        if not value > 0:
            raise ConfigError(f"{flag} must be more than 0, got {value:g}")
    if not 0.0 <= arguments.score <= 1.0:
        raise ConfigError(f"--score must lie between 0 and 1, got {arguments.score}")
    if arguments.camera is not None and arguments.inputs:
        raise ConfigError(f"--camera goes without inputs, got {arguments.inputs[0]}")


def find_inputs(inputs: Sequence[str], out: Path | None = None) -> list[Path | str]:
    """Lists what files, folders, globs and addresses mean, each once, without what lies in ``out``.

    Returns:
        Paths of files, and addresses as text.

    Raises:
        ConfigError: an input that matches nothing.
    """
    if not inputs:
        raise ConfigError(
            "no input given; pass image or video files, folders, a quoted glob such as 'photos/*.jpg', "
            "addresses, or --camera 0"
        )
    found: dict[Path | str, Path | str] = {}
    for text in inputs:
        if is_url(text):
            found.setdefault(text, text)
            continue
        present = _expand(text)
        matches = [path for path in present if out is None or out.resolve() not in path.resolve().parents]
        if not matches:
            if present:
                raise ConfigError(
                    f"{text} lies in {out}, the folder for the results, whose files are no input; "
                    "pass another --out"
                )
            if os.path.isdir(text):
                raise ConfigError(
                    f"folder {text} holds no image ({', '.join(SUFFIXES)}); pass videos by name"
                )
            raise ConfigError(f"no image or video matches {text}")
        for path in matches:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _expand(text: str) -> list[Path]:
    path = Path(text)
    try:
        if path.is_file():
            return [path]
        if path.is_dir():
            return sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        return [p for p in map(Path, sorted(glob.glob(text, recursive=True))) if p.is_file()]
    except (OSError, ValueError):  # too long for a name, or with characters that no name has
        return []


def _name(source: Path | str) -> PurePath:
    """The file name of an input, which may be an address."""
    return PurePath(url_name(source) if isinstance(source, str) else source.name)


class Prediction:
    """One run of the verb: images first, batch by batch, then each video.

    Args:
        predictor: the detector.
        arguments: the verb's.
        out: folder to write to.

    Attributes:
        files (PredictionFiles): what is written.
        broken (list[str]): inputs that could not be read.
    """

    def __init__(self, predictor: Predictor, arguments: PredictArguments, out: Path) -> None:
        self._predictor = predictor
        self._arguments = arguments
        self.files = PredictionFiles(
            out, predictor.categories, predictor.category_ids, pictures=arguments.pictures
        )
        self.broken: list[str] = []

    def inputs(self, inputs: Sequence[Path | str]) -> None:
        """Runs over files and addresses."""
        videos = [source for source in inputs if _name(source).suffix.lower() in VIDEO_SUFFIXES]
        images = [source for source in inputs if source not in videos]
        if videos:
            require_pyav()  # before the images, so that nothing is done in vain
        if images:
            self._images(images)
        for source in videos:
            self._video(source)

    def camera(self) -> None:
        """Runs until ``frames`` are done or Ctrl-C is pressed."""
        arguments = self._arguments
        reader = open_camera(arguments.camera, max_pixels=arguments.max_pixels)
        with Countdown(reader.name, "frames") as progress, contextlib.suppress(KeyboardInterrupt):
            self._frames(reader, reader, f"camera_{arguments.camera}", reader.name, 1, progress)

    def _images(self, images: Sequence[Path | str]) -> None:
        with Countdown("predict") as progress:
            readable = self._readable(images, progress)
            while batch := list(itertools.islice(readable, self._arguments.batch_size)):
                found = self._detect([image for _, image in batch])
                for (index, _), result in zip(batch, found, strict=True):
                    self.files.add_image(result, str(images[index]), _name(images[index]).stem)
                if batch[-1][0] + 1 < len(images):
                    progress(batch[-1][0] + 1, len(images))
            progress(len(images), len(images))

    def _readable(
        self, images: Sequence[Path | str], progress: Countdown
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Reads images, passing over those that cannot be read; yields their numbers and pixels."""
        for index, source in enumerate(images):
            try:
                yield (
                    index,
                    load_image(self._fetched(source), upright=True, max_pixels=self._arguments.max_pixels),
                )
            except DataError as error:
                self._complain(source, error, progress)

    def _video(self, source: Path | str) -> None:
        arguments, name = self._arguments, _name(source)
        with Countdown(name.name, "frames") as progress:
            try:
                reader = VideoReader(self._fetched(source), max_pixels=arguments.max_pixels)
            except DataError as error:
                self._complain(source, error, progress)
                return
            frames = self._until_broken(reader, source, progress)
            self._frames(reader, frames, name.stem, str(source), arguments.batch_size, progress)

    def _until_broken(self, reader: VideoReader, source: Path | str, progress: Countdown) -> Iterator[Frame]:
        """Yields the frames up to the one that cannot be read, if there is one."""
        try:
            yield from reader
        except DataError as error:
            self._complain(source, error, progress)

    def _frames(
        self,
        reader: VideoReader,
        frames: Iterable[Frame],
        stem: str,
        file: str,
        batch_size: int,
        progress: Countdown,
    ) -> None:
        limit = self._arguments.frames
        total = min((n for n in (reader.frames, limit) if n is not None), default=None)
        with reader, self.files.open_video(stem, reader.rate) or contextlib.nullcontext() as video:
            frames = itertools.islice(frames, limit)
            done = 0
            while batch := list(itertools.islice(frames, batch_size)):
                found = self._detect([frame.image for frame in batch])
                for frame, result in zip(batch, found, strict=True):
                    self.files.add_frame(result, file, frame, video)
                done += len(batch)
                # The number of frames that a file states may be wrong.
                progress(done, total if total is None else max(total, done))

    def _detect(self, images: list[np.ndarray]) -> list[Result]:
        arguments = self._arguments
        return self._predictor(
            images,
            score_threshold=arguments.score,
            classes=arguments.classes or None,
            batch_size=len(images),
        )

    def _fetched(self, source: Path | str) -> Path | RemoteFile:
        if isinstance(source, Path):
            return source
        return fetch(source, max_megabytes=self._arguments.max_megabytes, timeout=self._arguments.timeout)

    def _complain(self, source: Path | str, error: DataError, progress: Countdown) -> None:
        self.broken.append(str(source))
        progress.say(f"warning: {one_line(error)}; going on with the others")


if __name__ == "__main__":
    sys.exit(main())
