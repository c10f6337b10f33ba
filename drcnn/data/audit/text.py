"""Showing a check of data on a terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from drcnn.data.audit.checks import Audit
from drcnn.data.audit.findings import KINDS, Finding
from drcnn.data.audit.repair import Repair
from drcnn.data.audit.statistics import Distribution, SplitStatistics

_MOST_CLASSES = 20  # that are shown one by one


def show(audit: Audit, limit: int) -> RenderableType:
    """Returns statistics, findings by kind and advice, for ``rich``.

    Args:
        audit (Audit): the check.
        limit (int): findings of each kind that are shown.
    """
    parts: list[RenderableType] = []
    if audit.splits:
        parts += [_statistics(audit), "", _classes(audit.splits), ""]
    for severity in ("error", "warning"):
        for kind in KINDS:
            found = [f for f in audit.findings if (f.kind, f.severity) == (kind, severity)]
            if found:
                parts += [_kind(found, limit), ""]
    parts += [f"advice: {text}" for text in audit.advice]
    if not audit.decoded:
        parts.append("the image files were not read: neither their pixels and sizes nor copies are checked")
    return Group(*parts)


def headline(audit: Audit) -> str:
    """Returns one line with the numbers of errors and warnings."""
    counts = []
    for word, findings in (("error", audit.errors), ("warning", audit.warnings)):
        kinds = len({finding.kind for finding in findings})
        text = f"{len(findings)} {word}{'' if len(findings) == 1 else 's'}" if findings else f"no {word}s"
        counts.append(text + (f" of {kinds} kinds" if kinds > 1 else ""))
    return ", ".join(counts)


def show_repairs(repairs: Sequence[Repair], limit: int) -> str:
    """Returns what was done, at most ``limit`` lines of each kind of finding, marked up for ``rich``."""
    lines = []
    for kind in KINDS:
        done = [repair for repair in repairs if repair.finding.kind == kind and repair.done]
        lines += [f"  {escape(repair.text())}" for repair in done[:limit]]
        if len(done) > limit:
            lines.append(f"  and {len(done) - limit} more repairs of {kind}")
    return "\n".join(lines)


def _statistics(audit: Audit) -> Table:
    title = (
        f"At the network input of short side {audit.short_side}, at most {audit.max_size} px; "
        "median (5th to 95th percentile)"
    )
    table = Table(title=title, title_justify="left", title_style="", show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in audit.splits:
        table.add_column(name, justify="right", no_wrap=True)
    splits = list(audit.splits.values())
    rows = {
        "images": [f"{s.images}" for s in splits],
        "without an object": [f"{s.empty_images}" for s in splits],
        "objects": [f"{s.objects}" for s in splits],
        "crowd regions": [f"{s.crowd}" for s in splits],
        "objects per image": [_range(s.per_image, ".0f") for s in splits],
        "√area, px": [_range(s.sizes, ".0f") for s in splits],
        "under 32/96/over": [f"{s.small:.0%}/{s.medium:.0%}/{s.large:.0%}" for s in splits],
        "height / width": [_range(s.aspect_ratios, ".2f") for s in splits],
    }
    if audit.anchors is not None:
        rows["best anchor IoU"] = [_range(s.best_iou, ".2f") for s in splits]
        rows["IoU under 0.5"] = [f"{s.without_anchor:.1%}" for s in splits]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _range(values: Distribution | None, form: str) -> str:
    if values is None or not values.summary:
        return "-"
    low, middle, high = (format(values.summary[key], form) for key in ("p5", "median", "p95"))
    return f"{middle} ({low}-{high})"


def _classes(splits: dict[str, SplitStatistics]) -> Table | str:
    names = list(dict.fromkeys(name for split in splits.values() for name in split.per_class))
    if len(names) > _MOST_CLASSES:
        present = {name: sum(map(bool, split.per_class.values())) for name, split in splits.items()}
        return "\n".join(f"{name}: objects of {n} of {len(names)} classes" for name, n in present.items())
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("objects of class")
    for name in splits:
        table.add_column(name, justify="right")
    for name in names:
        table.add_row(escape(name), *(str(split.per_class.get(name, 0)) for split in splits.values()))
    return table


def _kind(found: Sequence[Finding], limit: int) -> str:
    kind, severity = KINDS[found[0].kind], found[0].severity
    colour = "red" if severity == "error" else "yellow"
    lines = [f"[bold {colour}]{severity}[/] {found[0].kind}: {len(found)} {kind.title}; {kind.action}"]
    lines += [f"  {escape(finding.split)}: {escape(finding.text())}" for finding in found[:limit]]
    if len(found) > limit:
        lines.append(f"  and {len(found) - limit} more")
    return "\n".join(lines)
