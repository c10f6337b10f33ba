"""Frames of videos and cameras, and videos of pictures."""

import builtins
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from drcnn.data import video
from drcnn.data.remote import RemoteFile
from drcnn.data.video import VideoReader, VideoWriter, open_camera
from drcnn.errors import ConfigError, DataError

LAVFI = "testsrc=size=64x48:rate=10:duration=1"


@pytest.fixture
def av():
    return pytest.importorskip("av", reason="PyAV is not installed")


def picture(number, size=(64, 48)):
    """Grey on the left, and on the right as bright as the number."""
    image = np.full((size[1], size[0], 3), 90, np.uint8)
    image[:, size[0] // 2 :] = 20 * number
    return Image.fromarray(image)


@pytest.fixture
def clip(av, tmp_path):
    """Eight frames, a tenth of a second apart."""
    with VideoWriter(tmp_path / "clip.mp4", Fraction(10)) as writer:
        for number in range(8):
            writer.write(picture(number), number / 10)
    return tmp_path / "clip.mp4"


def test_what_is_written_is_read(clip):
    with VideoReader(clip) as reader:
        assert reader.frames == 8 and reader.rate == 10
        frames = list(reader)
    assert [frame.index for frame in frames] == list(range(8))
    assert [frame.seconds for frame in frames] == pytest.approx([n / 10 for n in range(8)])
    for number, frame in enumerate(frames):
        assert frame.image.shape == (48, 64, 3) and frame.image.dtype == np.uint8
        assert abs(frame.image[:, 48:].mean() - 20 * number) < 6
        assert abs(frame.image[:, :16].mean() - 90) < 6


def test_what_cannot_be_a_video_is_one_line(av, tmp_path):
    with pytest.raises(DataError, match=r"video .*wide\.mp4 cannot be written: "):
        with VideoWriter(tmp_path / "wide.mp4", Fraction(10)) as writer:
            writer.write(Image.new("RGB", (20_000, 2)), 0.0)


def test_uneven_times_stay(av, tmp_path):
    times = [0.0, 0.04, 0.5, 0.5, 2.0]  # the fourth is no later than the third
    with VideoWriter(tmp_path / "clip.mp4", Fraction(30_000, 1001)) as writer:
        for number, seconds in enumerate(times):
            writer.write(picture(number), seconds)
    with VideoReader(tmp_path / "clip.mp4") as reader:
        found = [frame.seconds for frame in reader]
    assert found == pytest.approx(times, abs=1e-3) and found[3] > found[2]


@pytest.mark.parametrize("size", [(65, 49), (64, 49)])
def test_odd_sides_lose_a_pixel(av, tmp_path, size):
    with VideoWriter(tmp_path / "clip.mp4", Fraction(10)) as writer:
        writer.write(picture(3, size), 0.0)
        writer.write(picture(3, (128, 96)), 0.1)  # a size that changes on the way
    with VideoReader(tmp_path / "clip.mp4") as reader:
        assert [frame.image.shape for frame in reader] == [(48, 64, 3)] * 2


def test_a_video_of_a_telephone_is_turned_upright(clip):
    # What a camera writes that is held upright: the matrix of a turn by 90 degrees to the right.
    plain = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4")
    turned = plain.copy()
    turned[[0, 1, 3, 4]] = 0, 1 << 16, -1 << 16, 0
    content = clip.read_bytes()
    place = content.index(b"tkhd") + 44
    assert content[place : place + 36] == plain.tobytes()
    clip.write_bytes(content[:place] + turned.tobytes() + content[place + 36 :])
    with VideoReader(clip) as reader:
        image = list(reader)[7].image
    assert image.shape == (64, 48, 3)
    assert abs(image[:16].mean() - 90) < 6 and abs(image[48:].mean() - 140) < 6


def test_content_of_an_address(clip):
    with VideoReader(RemoteFile(clip.read_bytes(), "http://site/clip.mp4")) as reader:
        assert reader.name == "video http://site/clip.mp4" and len(list(reader)) == 8


def test_a_camera(av, monkeypatch):
    # FFmpeg's test picture stands in for the device.
    monkeypatch.setitem(video._CAMERAS, sys.platform, (LAVFI, "lavfi"))
    with open_camera(0) as reader:
        frames = list(reader)
    assert reader.name == "camera 0" and len(frames) == 10
    assert frames[3].image.shape == (48, 64, 3) and frames[3].seconds == pytest.approx(0.3)


def test_a_camera_that_is_not_there(av, monkeypatch):
    with pytest.raises(DataError, match="camera 97 cannot be read"):
        open_camera(97)
    monkeypatch.setattr(sys, "platform", "cpm")
    with pytest.raises(ConfigError, match="Linux and macOS"):
        open_camera(0)


def test_what_is_no_video(av, tmp_path, clip):
    (tmp_path / "text.mp4").write_text("nothing")
    with pytest.raises(DataError, match=r"text\.mp4 cannot be read"):
        VideoReader(tmp_path / "text.mp4")
    with pytest.raises(DataError, match=r"absent\.mp4 cannot be read: No such file"):
        VideoReader(tmp_path / "absent.mp4")
    with pytest.raises(DataError, match="64x48 pixels"):
        VideoReader(clip, max_pixels=100)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(DataError, match="holds no pictures"):
        VideoReader(tmp_path / "sound.wav")


def test_without_pyav_the_extra_is_named(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "av":
            raise ModuleNotFoundError("No module named 'av'", name="av")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    for make in (lambda: VideoReader("a.mp4"), lambda: open_camera(0), lambda: VideoWriter("a.mp4", 25)):
        with pytest.raises(ConfigError, match=r"pip install 'drcnn\[video\]'") as caught:
            make()
        assert "\n" not in str(caught.value)
