"""Fuzzing: seeded damage to the files that users bring.

Every case ends in success, with finite values, or in an error of one line; never in another exception, a
warning, a hang or a great reservation of memory. A case that fails prints its name, and runs alone as

    DRCNN_FUZZ=coco:1234 pytest tests/fuzz

DRCNN_FUZZ_TIMES=20 runs twenty times as many cases, with new seeds.
"""

import copy
import os
import resource
import signal
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest

from drcnn.errors import DrcnnError

CPU_SECONDS, SECONDS, MEBIBYTES = 10, 120, 512
"""What one case may take; the time on the clock is for waits, on a machine that may be busy."""

NAN, INF = float("nan"), float("inf")
ODD = (
    *(None, True, False, 0, 1, -1, 7, 0.5, -0.5, 1e-300, 1e-7, 1e308, -1e308, NAN, INF, -INF),
    *(2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, 1.0, 1e300),
    *("", " ", "1", "nan", "a\nb", "a\0b", "\x1b[31m", "é💥", "\ud800", "a" * 5000, "a/" * 500),
    *("../x.png", "/etc/passwd", "C:\\x.png", "images/../../x.png", ".", "/"),
    *([], {}, [[]], [1, 2], [NAN] * 8, {"a": 1}),
)
PIECES = (
    *(b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"\r", b'"', b"\\", b"[" * 5000),
    *(b"{" * 5000, b"9" * 5000, b"1e999", b"NaN", b"Infinity", b"-", b"<", b"&", b"../", b" ", b"\xc3\xa9"),
)


class Damage:
    """Draws damage to a tree of plain types, and to bytes."""

    def __init__(self, random: Random) -> None:
        self.random = random

    def tree(self, content: Any) -> Any:
        """A copy with one or a few values changed, removed, doubled, moved or buried."""
        content = {"": copy.deepcopy(content)}
        for _ in range(self.random.choice((1, 1, 1, 2, 3, 6))):
            container, key = self._spot(content)
            self.random.choice((self._odd, self._odd, self._number, self._remove, self._double, self._move))(
                content, container, key
            )
        return content.get("")

    def _spot(self, content: Any) -> tuple[Any, Any]:
        """A container and a key in it; each way down is equally likely at each step."""
        container, key = content, ""
        while isinstance(container[key], list | dict) and container[key] and self.random.random() < 0.85:
            container = container[key]
            key = self.random.choice(
                list(range(len(container)) if isinstance(container, list) else container)
            )
        return container, key

    def _odd(self, content: Any, container: Any, key: Any) -> None:
        value = copy.deepcopy(self.random.choice(ODD))
        if self.random.random() < 0.1:
            for _ in range(self.random.choice((1, 3, 300))):
                value = [value] if self.random.random() < 0.5 else {"a": value}
        container[key] = value

    def _number(self, content: Any, container: Any, key: Any) -> None:
        value = container[key]
        if isinstance(value, int | float):
            factor = self.random.choice((-1, 0, 0.5, 2, 1e-9, 1e3, 1e12))
            container[key] = value * factor + self.random.choice((0, 1, -1, 0.5))
        elif isinstance(value, str):
            at = self.random.randrange(len(value) + 1)
            container[key] = (
                value[:at] + str(self.random.choice(("", "\0", "\n", "..", "/", "~", "é"))) + value[at:]
            )
        else:
            self._odd(content, container, key)

    def _remove(self, content: Any, container: Any, key: Any) -> None:
        del container[key]
        content.setdefault("", {})

    def _double(self, content: Any, container: Any, key: Any) -> None:
        for _ in range(self.random.choice((1, 1, 60))):
            value = copy.deepcopy(container[key])
            if isinstance(container, list):
                container.insert(self.random.randrange(len(container) + 1), value)
            else:
                container[f"{key}2"] = value

    def _move(self, content: Any, container: Any, key: Any) -> None:
        other, there = self._spot(content)
        container[key] = copy.deepcopy(other[there])

    def bytes(self, data: bytes, pieces: tuple[bytes, ...] = PIECES) -> bytes:
        """A copy cut short, with bits flipped, or with pieces put in, taken out or moved."""
        random = self.random
        for _ in range(random.choice((1, 1, 2, 4))):
            at, length = random.randrange(len(data) + 1), random.choice((1, 2, 8, 200))
            kind = random.randrange(6)
            if kind == 0:
                data = data[:at]
            elif kind == 1:
                changed = bytearray(data)
                for _ in range(length if changed else 0):
                    changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
                data = bytes(changed)
            elif kind == 2:
                data = data[:at] + random.choice(pieces) + data[at:]
            elif kind == 3:
                data = data[:at] + data[at + length :]
            elif kind == 4:
                data = data[:at] + random.randbytes(length) + data[at + length :]
            else:
                start = random.randrange(len(data) + 1)
                data = data[:at] + data[start : start + length] + data[at:]
        return data


class Fuzzer:
    """Runs cases and counts how they end."""

    def __init__(self, node: pytest.Item) -> None:
        self._node = node

    def __call__(self, kind: str, cases: int, case: Callable[[Random], object]) -> None:
        """Runs ``case(random)`` with ``cases`` seeds; it may raise an error of one line, and no other.

        Failures are collected: the test fails with the names of all cases that failed.
        """
        alone = os.environ.get("DRCNN_FUZZ")
        if alone:
            wanted, _, seed = alone.partition(":")
            if wanted != kind:
                pytest.skip(f"DRCNN_FUZZ={alone} is no case of this test")
            case(Random(f"{kind}:{seed}"))
            return
        cases *= int(os.environ.get("DRCNN_FUZZ_TIMES", "1"))
        refused, failures = 0, []
        for seed in range(cases):
            try:
                with _limits():
                    case(Random(f"{kind}:{seed}"))
            except DrcnnError as error:
                refused += 1
                text = str(error)
                if not text or not text.isprintable() or len(text) > 2100:
                    failures.append(f"{kind}:{seed} ended in an error that is no short line: {text[:300]!r}")
            except (Exception, Overtime) as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                said = f"{type(error).__name__}: {error}"[:300]
                failures.append(f"{kind}:{seed} ended in {said} ({where.filename}:{where.lineno})")
        self._node.user_properties.append(("fuzz", (kind, cases, refused, len(failures))))
        if failures:
            pytest.fail(
                "\n".join([f"{len(failures)} of {cases} cases failed", *failures[:20]]), pytrace=False
            )


class Overtime(BaseException):
    """A case took too long; no ``except Exception`` on the way may take it."""


@contextmanager
def _limits():
    """Turns warnings, hangs and great reservations of memory into failures."""

    def stop(*_: object) -> None:
        raise Overtime(f"still running after {CPU_SECONDS} s of work or {SECONDS} s")

    before = [(number, signal.signal(number, stop)) for number in (signal.SIGALRM, signal.SIGPROF)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before:
            signal.signal(number, handler)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) // 1024
    assert grown < MEBIBYTES, f"the case took {grown} MiB of memory"


@pytest.fixture
def fuzz(request) -> Fuzzer:
    """Function that runs cases: ``fuzz(kind, cases, case)``."""
    return Fuzzer(request.node)


@pytest.fixture(scope="session")
def damage() -> type[Damage]:
    """Class whose objects draw damage."""
    return Damage
