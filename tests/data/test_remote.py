"""Fetching from addresses: what arrives, and each way in which it does not, in one line."""

import io
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from drcnn.data import load_image
from drcnn.data.remote import _encoded, fetch, is_url, url_name
from drcnn.errors import DataError


def png() -> bytes:
    stored = io.BytesIO()
    Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)).save(stored, "png")
    return stored.getvalue()


class Handler(BaseHTTPRequestHandler):
    """One path for each way to answer."""

    def do_GET(self):
        getattr(self, self.path.partition(".")[0].strip("/"))()

    def send(self, content, length=None):
        self.send_response(200)
        if length is not False:
            self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def image(self):
        self.send(png())

    def unstated(self):
        self.send(png(), length=False)

    def moved(self):
        self.send_response(302)
        self.send_header("Location", "/image.png")
        self.end_headers()

    def away(self):
        self.send_response(302)
        self.send_header("Location", "file:///etc/hostname")
        self.end_headers()

    def page(self):
        self.send(b"<html>not an image</html>")

    def large(self):
        self.send(b"", length=10**9)

    def endless(self):
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(1 << 16))
        except OSError:
            pass

    def slow(self):
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(100):  # never silent for long, but not done in time either
                self.wfile.write(b".")
                time.sleep(0.05)
        except OSError:
            pass

    def silent(self):
        time.sleep(1.5)

    def cut(self):
        self.send(png()[:40], length=len(png()))

    def absent(self):
        self.send_error(404, "Not Found")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    """Address of a local web server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["image.png", "unstated.png", "moved.png", "image.png?size=2#x"])
def test_an_image_arrives_whole(site, path):
    file = fetch(f"{site}/{path}")
    assert str(file) == f"{site}/{path}" and file.read() == png()
    assert (load_image(file) == np.asarray(Image.open(io.BytesIO(png())))).all()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("absent.png", "404 Not Found"),
        ("large.png", "limit of 0.1 MB"),
        ("endless.png", "limit of 0.1 MB"),
        ("slow.png", "not here in time"),
        ("silent.png", "not here in time"),
        ("cut.png", "ended after 40 of"),
        ("away.png", "file:///etc/hostname"),
    ],
)
def test_what_does_not_arrive_is_one_line_with_the_address(site, path, words):
    late = words == "not here in time"
    with pytest.raises(DataError) as caught:
        fetch(f"{site}/{path}", max_megabytes=0.1, timeout=0.5 if late else 20)
    assert words in str(caught.value) and f"{site}/{path}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.png", "http://", "http://[::1", "http://127.0.0.1:x/"])
def test_addresses_that_lead_nowhere(url):
    with pytest.raises(DataError, match="cannot fetch") as caught:
        fetch(url, timeout=2)
    assert url in str(caught.value)


def test_content_that_is_no_image_is_called_by_its_address(site):
    with pytest.raises(DataError) as caught:
        load_image(fetch(f"{site}/page.png"))
    assert str(caught.value) == f"image {site}/page.png cannot be decoded: not a known image format"
    with pytest.raises(DataError, match=f"{site}/image.png is 6x4 pixels"):
        load_image(fetch(f"{site}/image.png"), max_pixels=20)


def test_names():
    assert is_url("HTTPS://example.org/a.jpg") and not is_url("photos/a.jpg") and not is_url(7)
    assert url_name("https://example.org/a/b%20c.jpg?x=1") == "b c.jpg"
    assert url_name("https://example.org/..%2F..%2Fb.jpg") == "b.jpg"
    assert url_name("https://example.org") == "image"
    assert url_name("http://[::1/b.jpg") == "b.jpg"
    assert url_name("http://h/a%00b.png") == "a_b.png"
    assert url_name(f"http://h/{300 * 'a'}.png") == 90 * "a" + ".png"
    assert url_name(f"http://h/{300 * 'a'}") == 100 * "a"


def test_letters_and_spaces_are_sent_as_browsers_send_them(site):
    assert fetch(f"{site}/image.png?name=ü b", timeout=1e12, max_megabytes=math.inf).read() == png()
    assert _encoded("http://h/ü b.png?q=ü b&c=%20") == "http://h/%C3%BC%20b.png?q=%C3%BC%20b&c=%20"
