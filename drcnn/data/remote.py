"""Images and videos behind http and https addresses, held in memory."""

import http.client
import io
import re
import time
import urllib.error
import urllib.request
from pathlib import PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from drcnn.errors import DataError

MAX_MEGABYTES = 64
"""Default limit of what is fetched from one address."""
TIMEOUT = 20.0
"""Default limit in seconds until a fetch is done."""

_CHUNK = 1 << 16
_SCHEMES = ("http", "https")
_LONGEST = 1e6  # seconds; more is more than a socket takes
_KEPT = "/%:@!$&'()*+,;=~"


class RemoteFile(io.BytesIO):
    """The content of an address; messages call it by that.

    Args:
        content: all bytes.
        url: where they came from.
    """

    def __init__(self, content: bytes, url: str) -> None:
        super().__init__(content)
        self.url = url

    def __str__(self) -> str:
        return self.url


def is_url(text: object) -> bool:
    """Tells whether something is an http or https address rather than a path."""
    return isinstance(text, str) and text.lower().startswith(tuple(f"{scheme}://" for scheme in _SCHEMES))


def url_name(url: str) -> str:
    """Returns a file name for an address: the last part of its path, in 100 characters, or ``image``."""
    path = re.split("[?#]", url.partition("://")[2])[0].partition("/")[2]
    name = PurePosixPath(re.sub(r"[\x00-\x1f]", "_", unquote(path).replace("\\", "/").rstrip("/"))).name
    stem, dot, suffix = name.rpartition(".")
    return f"{stem[:90]}{dot}{suffix[-9:]}" if stem else name[:100] or "image"


def fetch(url: str, *, max_megabytes: float = MAX_MEGABYTES, timeout: float = TIMEOUT) -> RemoteFile:
    """Fetches what is behind an address; redirections are followed.

    Args:
        url: an http or https address.
        max_megabytes: most megabytes (10**6 bytes) that are read.
        timeout: seconds that the server may be silent, and in which all must be here.

    Returns:
        A binary file in memory, which :func:`drcnn.data.load_image` takes.

    Raises:
        DataError: the address cannot be reached, answers with an error, too slowly, or with too much.
    """
    timeout = min(timeout, _LONGEST)
    limit, deadline = max_megabytes * 1e6, time.monotonic() + timeout
    try:
        request = urllib.request.Request(_encoded(url), headers={"User-Agent": "drcnn"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            if urlsplit(response.url).scheme not in _SCHEMES:
                raise DataError(f"cannot fetch {url}: it leads to {response.url}, which is no web address")
            return RemoteFile(_read(response, url, limit, deadline), url)
    except urllib.error.HTTPError as error:
        raise DataError(f"cannot fetch {url}: the server says {error.code} {error.reason}") from None
    except TimeoutError:
        raise _too_slow(url) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise _too_slow(url) from None
        said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise DataError(f"cannot fetch {url}: {said}") from None


def _encoded(url: str) -> str:
    """The address with letters and spaces as browsers send them."""
    parts = urlsplit(url)
    path, query = quote(parts.path, safe=_KEPT), quote(parts.query, safe=f"{_KEPT}?")
    return parts._replace(path=path, query=query).geturl()


def _read(response: http.client.HTTPResponse, url: str, limit: float, deadline: float) -> bytes:
    """Reads a body piece by piece, so that neither its size nor its pace can hold the program up."""
    stated = response.length  # None where the server does not say
    content = bytearray()
    while stated is None or stated <= limit:
        # Returns what has come, where read() would wait for all of it.
        piece = response.read1(_CHUNK)
        content += piece
        if len(content) > limit:
            break
        if time.monotonic() > deadline:
            raise _too_slow(url)
        if not piece:
            if stated is not None and len(content) < stated:
                raise DataError(
                    f"cannot fetch {url}: the connection ended after {len(content)} of {stated} bytes"
                )
            return bytes(content)
    raise DataError(
        f"cannot fetch {url}: it has more than the limit of {limit / 1e6:g} MB; "
        "fetch it yourself and pass the file, or raise the limit (drcnn predict: --max-megabytes)"
    )


def _too_slow(url: str) -> DataError:
    return DataError(
        f"cannot fetch {url}: it was not here in time; try again or allow more (drcnn predict: --timeout)"
    )
