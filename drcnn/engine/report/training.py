"""Charts of what runs logged while they trained."""

from collections.abc import Sequence
from typing import Any

from drcnn.engine.curves import (
    EXACT,
    NOISY,
    PRECISIONS,
    SMOOTHED_FROM,
    VOC,
    Curve,
    History,
    loss_title,
)
from drcnn.engine.report.page import Panel, Section, chart, numbers, run_colour

MOST_POINTS = 800
"""A curve with more points is drawn as means of neighbours."""
SIZES = {"small": "#c9901a", "medium": "#c2556b", "large": "#3f78c4"}
DASHES = ("solid", "dash", "dot", "dashdot")

Runs = Sequence[tuple[int, History]]
"""Histories with the numbers of their runs."""


def training_section(runs: Runs) -> Section | None:
    """The curves of some runs; None if they logged nothing that can be drawn."""
    names = dict.fromkeys(name for _, history in runs for name in history.losses())
    panels = [_lines(runs, name, loss_title(name), "", 0.0, noisy=True) for name in names]
    panels += [_lines(runs, name, *labels, noisy=False) for name, labels in EXACT.items()]
    panels += [_lines(runs, name, *labels, noisy=True) for name, labels in NOISY.items()]
    panels += [_shares(number, history, len(runs) > 1) for number, history in runs]
    panels.append(_decisions(runs))
    panels += _precisions(runs)
    shown = [panel for panel in panels if panel is not None]
    intro = (
        "As logged: means since the record before. Where there are many records, the thin line is as logged "
        "and the thick one its running mean."
    )
    return Section("training", "Training curves", shown, intro) if shown else None


def _lines(runs: Runs, name: str, title: str, unit: str, least: float | None, *, noisy: bool) -> Panel | None:
    """One value of all runs; stages are shades of the run's colour, the last the darkest."""
    traces = []
    stages = max((len(history.stages(name)) for _, history in runs), default=0)
    for number, history in runs:
        curves = history.stages(name)
        for stage, curve in enumerate(curves):
            label = f"{history.name}, stage {stage}" if len(curves) > 1 else history.name
            opacity = 0.3 + 0.7 * (stage + 1) / len(curves)
            many = noisy and len(curve.steps) >= SMOOTHED_FROM
            if many:
                traces.append(_line(number, curve, label, opacity=0.25, width=1, hoverinfo="skip"))
            mean = curve.smoothed() if many else curve
            traces.append(_line(number, mean, label, opacity=opacity))
    if not traces:
        return None
    axis = {"title": {"text": unit}} | ({"rangemode": "tozero"} if least == 0.0 else _room(traces))
    note = f"{stages} stages, from light to dark." if stages > 1 else ""
    return Panel("chart", title, {"": _chart(traces, yaxis=axis)}, note=note)


def _chart(traces: Sequence[dict], **layout: Any) -> dict[str, Any]:
    """A chart over iterations, which begin at 0."""
    last = max((trace["x"][-1] for trace in traces if trace["x"]), default=1)
    return chart(traces, xaxis={"range": [0, 1.03 * last]}, hovermode="x unified", **layout)


def _room(traces: Sequence[dict]) -> dict[str, Any]:
    """An axis on which a threshold that hardly moves looks so."""
    values = [value for trace in traces for value in trace["y"] if value is not None]
    middle = (min(values) + max(values)) / 2 if values else 0.0
    return {} if not values or max(values) - min(values) >= 0.1 else {"range": [middle - 0.1, middle + 0.1]}


def _line(number: int, curve: Curve, label: str, *, width: float = 2, **look: Any) -> dict[str, Any]:
    shown = curve.blocks(-(-len(curve.steps) // MOST_POINTS)) if len(curve.steps) > MOST_POINTS else curve
    return {
        "type": "scatter",
        "mode": "lines" if len(shown.steps) > 1 else "markers",
        "x": shown.steps.tolist(),
        "y": numbers(shown.values),
        "name": label,
        "line": {"color": run_colour(number), "width": width, **look.pop("line", {})},
        "marker": {"color": run_colour(number)},
        "meta": {"run": number},
        **look,
    }


def _shares(number: int, history: History, named: bool) -> Panel | None:
    """Shares of the box loss by size of object, over the share of iterations that were collages."""
    if "loss_share_small" not in history.curves:
        return None
    size = _block(history, "loss_share_small")
    traces = []
    collages = history.curves.get("scale_collage")
    if collages is not None and collages.values.any():
        filled = {"fill": "tozeroy", "fillcolor": "rgba(128,128,128,0.18)", "hoverinfo": "skip"}
        look = {"color": "rgba(128,128,128,0.5)", "shape": "vh"}
        traces.append(_line(number, collages.blocks(size), "collages", width=0, line=look, **filled))
    for name, colour in SIZES.items():
        curve = history.curves[f"loss_share_{name}"].blocks(size)
        traces.append(_line(number, curve, name, line={"color": colour}))
    title = f"Loss by size of object, {history.name}" if named else "Loss by size of object"
    axis = {"range": [0, 1], "tickformat": ".0%", "title": {"text": "share of the box loss"}}
    note = "Grey: share of the iterations that trained on collages." if len(traces) > len(SIZES) else ""
    return Panel("chart", title, {"": _chart(traces, yaxis=axis, showlegend=True)}, note=note)


def _block(history: History, name: str) -> int:
    """Iterations that are drawn as one point: those of a record, more in long runs."""
    return max(history.log_every, len(history.curves[name].steps) // 80)


def _decisions(runs: Runs) -> Panel | None:
    """What scale training measured and how often it chose collages."""
    traces = []
    for number, history in runs:
        for name, text, dash in (("scale_ratio", "r_t", "solid"), ("scale_collage", "collages", "dot")):
            if name in history.curves:
                curve = history.curves[name].blocks(_block(history, name))
                traces.append(_line(number, curve, f"{history.name}, {text}", line={"dash": dash}))
    if not traces:
        return None
    axis = {"range": [0, 1], "tickformat": ".0%"}
    note = (
        "Solid: r_t, the share of the loss that small objects have. Dotted: share of the iterations on "
        "collages, which follow an iteration whose r_t is below the threshold."
    )
    return Panel("chart", "DST decisions", {"": _chart(traces, yaxis=axis)}, note=note)


def _precisions(runs: Runs) -> list[Panel]:
    """AP of each evaluation: one run's numbers in one chart, those of several runs in a chart each."""
    panels = []
    for prefix, kind in (("", "boxes"), ("segm_", "masks")):
        groups = [PRECISIONS] if len(runs) == 1 else [(name,) for name in PRECISIONS]
        for names in [*groups, VOC]:
            traces = [
                trace
                for number, history in runs
                for place, name in enumerate(names)
                for trace in _evaluations(number, history, prefix, name, DASHES[place], len(names) > 1)
            ]
            if traces:
                title = "mAP of VOC" if names == VOC else "AP" if len(names) > 1 else names[0]
                axis = {"rangemode": "tozero", "title": {"text": "points"}}
                figure = _chart(traces, yaxis=axis, showlegend=len(names) > 1)
                note = "Open marks: other splits than val, once, with the best weights."
                hollow = any(t["mode"] == "markers" and "open" in str(t["marker"]) for t in traces)
                panels.append(Panel("chart", f"{title} of {kind}", {"": figure}, note=note if hollow else ""))
    return panels


def _evaluations(
    number: int, history: History, prefix: str, name: str, dash: str, named: bool
) -> list[dict[str, Any]]:
    traces = []
    for split, curves in history.evaluations.items():
        curve = curves.get(prefix + name)
        if curve is not None:
            main = split == "val"
            label = f"{name}, {split}" if named else f"{history.name}, {split}"
            trace = _line(number, Curve(curve.steps, 100 * curve.values), label, line={"dash": dash})
            symbol = "circle" if main else "circle-open"
            marker = {"color": run_colour(number), "size": 7, "symbol": symbol}
            mode = "lines+markers" if main else "markers"
            traces.append({**trace, "mode": mode, "marker": marker, "showlegend": main and named})
    return traces
