"""What ``drcnn check`` found in the data of the runs, and how their objects look to the detector."""

from collections.abc import Sequence
from typing import Any

from drcnn.data.audit import KINDS, Audit, Distribution, Finding, SplitStatistics
from drcnn.data.audit.text import headline
from drcnn.engine.report.page import Panel, Section, chart, numbers, table

MOST_FINDINGS = 500
"""Findings of each data set that the page lists."""
SPLIT_COLOURS = {"train": "#3f78c4", "val": "#c9901a", "test": "#c2556b"}
OTHER_COLOUR = "#7d8590"


def data_section(audits: Sequence[Audit]) -> Section:
    """Findings and statistics, with a choice where the runs had several data sets.

    Args:
        audits: the check of each data set; its name says whose it is.
    """
    panels = [
        _panel("table", "Findings", audits, _findings, wide=True),
        _panel("table", "Splits", audits, _splits, wide=True),
        _panel("table", "Objects of each class", audits, _classes, wide=True),
        _panel("chart", "Size of objects", audits, lambda a: _histogram(a, "sizes", "√area, px", log=True)),
        _panel("chart", "Height over width", audits, lambda a: _histogram(a, "aspect_ratios", "", log=True)),
        _panel("chart", "Objects in an image", audits, lambda a: _histogram(a, "per_image", "objects")),
    ]
    if any(split.best_iou for audit in audits for split in audit.splits.values()):
        panels.append(
            _panel("chart", "Best IoU over the anchors", audits, lambda a: _histogram(a, "best_iou", "IoU"))
        )
    return Section("data", "Data", panels, " ".join(map(_said, audits)))


def _said(audit: Audit) -> str:
    """Headline and advice in sentences."""
    unread = "" if audit.decoded else " The image files were not read."
    advice = "".join(f" Advice: {text}." for text in audit.advice)
    return (
        f"{audit.name}: {headline(audit)}.{unread} Sizes are those at the network's input, of short side "
        f"{audit.short_side} and at most {audit.max_size} px.{advice}"
    )


def _panel(kind: Any, title: str, audits: Sequence[Audit], content: Any, **look: Any) -> Panel:
    variants = {str(place) if audits[1:] else "": content(audit) for place, audit in enumerate(audits)}
    selects = [("Data", [audit.name for audit in audits])] if audits[1:] else []
    return Panel(kind, title, variants, selects, **look)


def _findings(audit: Audit) -> dict[str, Any]:
    rows: list[tuple[None, list[Any]]] = [
        (None, [f.severity, f.kind, f.split, f"{f.file} {f.place}".strip(), _said_of(f)])
        for f in audit.findings[:MOST_FINDINGS]
    ]
    left = len(audit.findings) - len(rows)
    if left > 0:
        rows.append((None, ["", "", "", "", f"and {left} more, which drcnn check --json lists"]))
    if not rows:
        rows.append((None, ["none", "", "", "", "nothing is wrong with the data"]))
    return table(["level", "kind", "split", "where", "what"], rows, search=True)


def _said_of(finding: Finding) -> str:
    return f"{finding.message}; {KINDS[finding.kind].action}"


def _splits(audit: Audit) -> dict[str, Any]:
    heads = ["split", "images", "without an object", "objects", "crowd regions"]
    heads += ["small, %", "medium, %", "large, %", "no anchor of IoU 0.5, %"]
    rows = [(None, [name, *_counts(split)]) for name, split in audit.splits.items()]
    return table(heads, rows)


def _counts(split: SplitStatistics) -> list[float | None]:
    missed = None if split.best_iou is None else 100 * split.without_anchor
    sizes = (100 * share for share in (split.small, split.medium, split.large))
    return [split.images, split.empty_images, split.objects, split.crowd, *sizes, missed]


def _classes(audit: Audit) -> dict[str, Any]:
    names = dict.fromkeys(name for split in audit.splits.values() for name in split.per_class)
    rows = [(None, [name, *(s.per_class.get(name) for s in audit.splits.values())]) for name in names]
    return table(["class", *audit.splits], rows, search=True)


def _histogram(audit: Audit, name: str, unit: str, *, log: bool = False) -> dict[str, Any]:
    """Shares of a quantity's values in bins, a line of steps for each split."""
    traces = []
    for split, statistics in audit.splits.items():
        found: Distribution | None = getattr(statistics, name)
        total = sum(found.counts) if found is not None else 0
        if not total:
            continue
        shares = [100 * count / total for count in found.counts]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": split,
                "x": numbers(found.edges),
                "y": numbers([*shares, shares[-1]]),
                "line": {"shape": "hv", "color": SPLIT_COLOURS.get(split, OTHER_COLOUR), "width": 2},
            }
        )
    axis = {"title": {"text": unit}} | ({"type": "log", "dtick": "D2"} if log else {})
    return chart(traces, xaxis=axis, yaxis={"rangemode": "tozero", "ticksuffix": "%"}, showlegend=True)
