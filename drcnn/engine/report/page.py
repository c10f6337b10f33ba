"""The report's page: what it shows as data, and the one file that draws it.

Charts are plotly figures; plotly.js stands in the page once. The page asks for nothing from any network: its
content security policy forbids it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

COLOURS = ("#3b7ddd", "#d9622b", "#12936a", "#b357a8", "#a37b12", "#1c95b8", "#7d8590", "#c9405a")
"""One for each run; each stands out on white and on black."""


@dataclass(frozen=True)
class Panel:
    """A chart or a table, perhaps in several variants that selects choose among.

    Attributes:
        kind: what it is.
        title: its heading.
        variants: the content by the places of the chosen options, such as "0" or "1,0"; "" without selects.
        selects: label and options of each select.
        note: what to know to read it.
        wide: takes the whole width.
        height: of a chart, in pixels.
    """

    kind: Literal["chart", "table"]
    title: str
    variants: Mapping[str, Any]
    selects: Sequence[tuple[str, Sequence[str]]] = ()
    note: str = ""
    wide: bool = False
    height: int = 260


@dataclass(frozen=True)
class Section:
    """A heading with panels below; ``gallery`` holds pictures, see :mod:`drcnn.engine.report.gallery`."""

    name: str
    title: str
    panels: Sequence[Panel] = ()
    intro: str = ""
    gallery: dict[str, Any] | None = field(default=None, repr=False)


def chart(traces: Sequence[dict], **layout: Any) -> dict[str, Any]:
    """Checks a figure with plotly and returns what plotly.js draws."""
    figure = Figure({"data": list(traces), "layout": layout}).to_plotly_json()
    figure["layout"].pop("template", None)  # the page brings its own, for light and for dark
    return figure


def table(
    columns: Sequence[str],
    rows: Sequence[tuple[int | None, Sequence[Any]]],
    digits: int | None = 1,
    **look: Any,
) -> dict[str, Any]:
    """Describes a table.

    Args:
        columns: their headings.
        rows: the number of the run that a row belongs to, or None, and its cells: text, numbers or None.
        digits: of numbers that are not whole.
        look: ``heat``: columns that are shaded by value; ``search``: whether to offer a search.
    """
    cells = [{"run": run, "cells": list(row)} for run, row in rows]
    return {"columns": list(columns), "rows": cells, "digits": digits, **look}


def numbers(values: Sequence[float] | np.ndarray, digits: int = 5) -> list[float | None]:
    """Numbers for the page, as short as they can be read; None for those that are not finite."""
    return [float(f"{v:.{digits}g}") if np.isfinite(v) else None for v in np.asarray(values, float).tolist()]


def write_page(
    file: Path, title: str, subtitle: str, runs: Sequence[str], sections: Sequence[Section]
) -> int:
    """Writes the page.

    Args:
        file: where to.
        title: its heading.
        subtitle: the line below.
        runs: names of the runs, in the order of the numbers that panels call them by.
        sections: what it shows.

    Returns:
        Its size in bytes.

    Raises:
        OSError: it cannot be written.
    """
    content = {
        "runs": [{"name": name, "colour": run_colour(i)} for i, name in enumerate(runs)],
        "sections": [asdict(section) for section in sections],
    }
    folder = resources.files(__package__)
    parts = {
        "title": _escape(title),
        "subtitle": _escape(subtitle),
        "style": (folder / "page.css").read_text(encoding="utf-8"),
        "script": (folder / "page.js").read_text(encoding="utf-8"),
        "plotly": get_plotlyjs(),
        # A "<" could end the script that holds the data.
        "content": json.dumps(content, separators=(",", ":"), allow_nan=False, default=_plain).replace(
            "<", "\\u003c"
        ),
    }
    text = (folder / "page.html").read_text(encoding="utf-8")
    pieces = text.split("%%")  # text and names of parts in turn: parts may hold anything
    page = "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces)).encode()
    file.write_bytes(page)
    return len(page)


def run_colour(index: int) -> str:
    """The colour of a run."""
    return COLOURS[index % len(COLOURS)]


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written to the page")
