"""Reading all splits of a data set for a check: what stops a run is noted, and the reading goes on."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from drcnn.data.audit.findings import KINDS, Notes
from drcnn.data.problems import Problems, SkipKind
from drcnn.data.source import Source
from drcnn.errors import DataError

_KIND_OF = {"truncated-image": "unreadable-image", "malformed-object": "malformed-annotation"}
_WHERE = re.compile(
    r"(?P<file>.+?): (?P<place>(?:object|line|annotation) \d+(?: \(.*?\))?)[: ] ?(?P<what>.*)", re.DOTALL
)
_FILE = re.compile(r"(?:annotation file|label file|image) (?P<file>.+?) (?P<what>(?:not|cannot|is not) .*)")


@dataclass
class SplitContent:
    """The content of one split as a COCO file would hold it, unchecked.

    Attributes:
        name (str): name of the split.
        source (Source): where it was read from.
        data (dict): ``images``, ``categories``, ``annotations``: whatever the file holds.
        folder (Path): folder that the file names are relative to.
        notes (Notes): what was found.
    """

    name: str
    source: Source
    data: dict[str, Any]
    folder: Path
    notes: Notes

    @cached_property
    def _root(self) -> str:
        return str(self.folder.resolve())

    def file(self, name: str) -> str:
        """The path of an image file, by which the same file is known in all splits."""
        return os.path.join(self._root, os.path.normpath(name))

    def records(self, key: str) -> list[Any]:
        """The list under ``key``; empty if there is none."""
        found = self.data.get(key)
        return found if isinstance(found, list) else []

    def origin(self, record: dict[str, Any], number: int) -> dict[str, str]:
        """The file and place of an annotation, as arguments of :meth:`Notes.add`."""
        file, _, place = str(record.get("_origin", "")).partition(": ")
        if place:
            return {"file": file, "place": place}
        own = record.get("id")
        return {"place": f"annotation {own}" if type(own) is int else f"annotation number {number + 1}"}


class _Collected(Problems):
    """Notes what would stop a run."""

    def __init__(self, notes: Notes) -> None:
        super().__init__(get_args(SkipKind))
        self._notes = notes

    def add(self, kind: SkipKind, count: int, first: str, others: Sequence[str] = ()) -> None:
        """Notes every case that has a message of its own."""
        kind = _KIND_OF.get(kind, kind)
        for text in (first, *others):
            match = _WHERE.match(text) or _FILE.match(text)
            found = match.groupdict() if match else {"file": "", "what": text}
            what = found["what"].removesuffix(f"; {KINDS[kind].action}")
            self._notes.add(kind, what, found.get("place", ""), file=found["file"])


def read_contents(sources: Mapping[str, Source]) -> list[SplitContent]:
    """Reads the splits; one that cannot be read at all is empty and has an error in its notes."""
    contents = []
    for name, source in sources.items():
        notes = Notes(name, str(source.name))
        try:
            data, folder = source.reader(_Collected(notes))
        except DataError as error:
            notes.add("unreadable-annotations", str(error).removeprefix(f"{source.name}: "))
            data, folder = {}, Path()
        else:
            for key in ("images", "categories", "annotations"):
                if not isinstance(data.get(key, []), list) or (key not in data and key != "annotations"):
                    notes.add("unreadable-annotations", f"`{key}` is not a list, so this is no COCO file")
        contents.append(SplitContent(name, source, data, folder, notes))
    return contents
