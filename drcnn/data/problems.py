"""Bad input: what stops a run, what may be left out instead, and how it is counted and reported."""

from collections.abc import Collection, Sequence
from typing import Literal, get_args

from drcnn.errors import DataError

SkipKind = Literal[
    "missing-image",
    "truncated-image",
    "oversized-image",
    "box-outside",
    "box-no-area",
    "unknown-category",
    "unknown-image",
    "duplicate-annotation",
    "malformed-file",
    "malformed-object",
    "bad-mask",
]
"""Kinds of bad input that can be left out: if ``DataConfig.skip`` lists them they are counted, not fatal."""

_LEFT_OUT = {
    "missing-image": "images whose file is missing",
    "truncated-image": "images that cannot be decoded",
    "oversized-image": "images of more than data.max_pixels pixels",
    "box-outside": "boxes beyond the border of their image (clipped; dropped where nothing remained)",
    "box-no-area": "boxes without area",
    "unknown-category": "annotations of an unknown category",
    "unknown-image": "annotations of an unknown image",
    "duplicate-annotation": "annotations with an id that occurred before",
    "malformed-file": "images whose annotation file is missing or cannot be read",
    "malformed-object": "objects that cannot be read",
    "bad-mask": "annotations without a usable mask",
}
assert set(_LEFT_OUT) == set(get_args(SkipKind))


class Problems:
    """Raises on bad input, or counts it if its kind is to be skipped.

    Args:
        skip (Collection[SkipKind]): kinds to leave out.
    """

    def __init__(self, skip: Collection[SkipKind] = ()) -> None:
        self._skip = frozenset(skip)
        self._found: dict[SkipKind, tuple[int, str]] = {}

    def add(self, kind: SkipKind, count: int, first: str, others: Sequence[str] = ()) -> None:
        """Notes ``count`` cases of ``kind``; ``first`` describes the first one, ``others`` perhaps the rest.

        Raises:
            DataError: if ``kind`` is not to be skipped.
        """
        if kind not in self._skip:
            more = f" (and {count - 1} more)" if count > 1 else ""
            raise DataError(f"{first}{more}; correct this or pass --data.skip {kind} to leave such out")
        before, earliest = self._found.get(kind, (0, first))
        self._found[kind] = (before + count, earliest)

    def report(self) -> list[str]:
        """Returns one line for each kind that was left out, with its count and first example."""
        lines = []
        for kind, (count, first) in self._found.items():
            lines.append(f"skipped {count} {_LEFT_OUT[kind]} [{kind}]; first: {first}")
        return lines
