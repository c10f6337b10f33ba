"""Frames of video files and cameras, and videos of pictures, through PyAV (FFmpeg)."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from drcnn.data.image import MAX_PIXELS
from drcnn.data.remote import RemoteFile
from drcnn.errors import ConfigError, DataError

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
"""Endings of files that are read as videos."""

_CAMERAS = {"linux": ("/dev/video{}", "v4l2"), "darwin": ("{}", "avfoundation")}
"""File and FFmpeg input format of a camera on each platform."""
_TIME_BASE = Fraction(1, 30_000)
"""Unit of written times: 24, 25, 29.97, 30, 50 and 60 frames a second are whole numbers of it."""


class Frame(NamedTuple):
    """A picture of a video.

    Attributes:
        image (np.ndarray[H, W, 3]): uint8 RGB, upright.
        index (int): number of the frame, from 0.
        seconds (float): when it is shown, from the beginning of the video.
    """

    image: np.ndarray
    index: int
    seconds: float


class VideoReader:
    """The frames of a video, to be iterated over once, in a ``with`` block.

    Args:
        source: file, or the content of an address.
        name: what to call it in messages; ``video SOURCE`` by default.
        format: FFmpeg's input format; told by the content by default.
        max_pixels: most pixels of a frame.

    Attributes:
        name (str): what it is called in messages.
        rate (Fraction): frames per second.
        frames (int | None): how many there are, as the file says or by its duration; None if it is not known.

    Raises:
        ConfigError: PyAV is not installed.
        DataError: it cannot be read, or its frames are too large.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | RemoteFile,
        *,
        name: str = "",
        format: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        av = require_pyav()
        self.name = name or f"video {source}"
        self._max_pixels = max_pixels
        with _one_line_errors(av, self.name):
            self._container = av.open(
                source if isinstance(source, RemoteFile) else os.fspath(source), format=format
            )
            if not self._container.streams.video:
                raise DataError(f"{self.name} holds no pictures")
            stream = self._stream = self._container.streams.video[0]
            stream.thread_type = "AUTO"
            self._check(stream.codec_context.width, stream.codec_context.height)
            self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
            self.frames = stream.frames or self._estimate(av)

    def _estimate(self, av: ModuleType) -> int | None:
        duration = self._container.duration
        return max(1, round(duration / av.time_base * self.rate)) if duration and duration > 0 else None

    def _check(self, width: int, height: int) -> None:
        if width * height > self._max_pixels:
            raise DataError(
                f"{self.name} is {width}x{height} pixels (width x height), more than the limit of "
                f"{self._max_pixels}; raise --max-pixels if you trust the file"
            )

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        """Decodes the frames.

        Raises:
            DataError: the video is damaged from here on, or its frames become too large.
        """
        start: float | None = None
        decoded = self._container.decode(self._stream)
        index = 0
        while True:
            with _one_line_errors(require_pyav(), f"{self.name}, after {index} frames,"):
                frame = next(decoded, None)
                if frame is None:
                    break
                self._check(frame.width, frame.height)
                image = _upright(frame)
            seconds = frame.time if frame.time is not None else float(index / self.rate)
            start = seconds if start is None else start
            yield Frame(image, index, seconds - start)
            index += 1
        if not index:
            raise DataError(f"{self.name} holds no pictures")


def open_camera(number: int, *, max_pixels: int = MAX_PIXELS) -> VideoReader:
    """Opens a camera of this machine.

    Args:
        number: 0 for the first.
        max_pixels: most pixels of a frame.

    Raises:
        ConfigError: PyAV is not installed, or it knows no cameras on this platform.
        DataError: there is no such camera, or it cannot be read.
    """
    if sys.platform not in _CAMERAS:
        raise ConfigError("cameras are read on Linux and macOS; record a video and pass the file")
    file, format = _CAMERAS[sys.platform]
    return VideoReader(file.format(number), name=f"camera {number}", format=format, max_pixels=max_pixels)


class VideoWriter:
    """Writes pictures as an mp4 video (H.264 where FFmpeg has it, else MPEG-4), in a ``with`` block.

    All pictures get the size of the first one, with even sides, as the formats want them.

    Args:
        path: file to write; made with the first picture.
        rate: usual number of frames per second.

    Raises:
        ConfigError: PyAV is not installed.
        DataError: the pictures cannot be a video, as when they are too wide.
    """

    def __init__(self, path: str | os.PathLike[str], rate: Fraction) -> None:
        self._av = require_pyav()
        self.path = Path(path)
        self._rate = rate
        self._container: Any = None
        self._stream: Any = None
        self._last = -1

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, picture: Image.Image, seconds: float) -> None:
        """Appends a picture that is shown from ``seconds`` on; times that do not grow are moved on."""
        with _one_line_errors(self._av, f"video {self.path}", "written"):
            self._write(picture, seconds)

    def _write(self, picture: Image.Image, seconds: float) -> None:
        if self._container is None:
            self._open(picture)
        size = (self._stream.width, self._stream.height)
        if picture.size != size:
            near = all(0 <= given - wanted <= 1 for given, wanted in zip(picture.size, size, strict=True))
            picture = picture.crop((0, 0, *size)) if near else picture.resize(size)
        frame = self._av.VideoFrame.from_ndarray(np.asarray(picture.convert("RGB")), format="rgb24")
        self._last = max(self._last + 1, round(seconds / _TIME_BASE))
        frame.pts, frame.time_base = self._last, _TIME_BASE
        self._container.mux(self._stream.encode(frame))

    def _open(self, picture: Image.Image) -> None:
        h264 = "libx264" in self._av.codecs_available
        self._container = self._av.open(os.fspath(self.path), "w", format="mp4")
        options = {"crf": "20", "preset": "veryfast"} if h264 else {"qscale": "3"}
        rate = self._rate.limit_denominator(1001)
        self._stream = self._container.add_stream("libx264" if h264 else "mpeg4", rate=rate, options=options)
        self._stream.width, self._stream.height = (max(2, side // 2 * 2) for side in picture.size)
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = _TIME_BASE

    def close(self) -> None:
        """Completes the file."""
        if self._container is not None:
            container, self._container = self._container, None
            with _one_line_errors(self._av, f"video {self.path}", "written"), container:
                container.mux(self._stream.encode(None))


def _upright(frame: Any) -> np.ndarray:
    """The pixels of a frame, turned as the camera that took it says (90 degrees at a time)."""
    image = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # counter-clockwise, as in numpy
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


@contextmanager
def _one_line_errors(av: ModuleType, name: str, done: str = "read") -> Iterator[None]:
    try:
        yield
    except av.error.FFmpegError as error:
        if done == "written" and isinstance(error, OSError):  # a full disk
            raise
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{name} cannot be {done}: {said}") from None


def require_pyav() -> ModuleType:
    """Imports PyAV.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise
        raise ConfigError(
            "videos and cameras need PyAV; install it with: pip install 'drcnn[video]'"
        ) from None
    return av
