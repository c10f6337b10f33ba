"""Charts of errors: their kinds, confusions of classes, and how far scores can be trusted."""

from typing import Any

import numpy as np

from drcnn.engine.report.page import Panel, Section, chart, numbers, run_colour, table
from drcnn.engine.report.precision import Analyses
from drcnn.engine.tide import KINDS, MISSED

MEANINGS = {
    "classification": "place right (IoU ≥ 0.5), class wrong",
    "localisation": "class right, place wrong (IoU 0.1 to 0.5)",
    "both": "class wrong and place wrong",
    "duplicate": "object was already found with a higher score",
    "background": "no object there (IoU ≤ 0.1)",
    "missed": "object that no detection comes near",
}
ANNOTATED = 15
"""Up to this number of classes a confusion matrix has its numbers written in."""
SHADES = [[0.0, "rgba(59,125,221,0.0)"], [1.0, "rgba(59,125,221,0.75)"]]


def errors_section(analyses: Analyses) -> Section:
    """Kinds of errors and what each costs."""
    meanings = "; ".join(f"{kind}: {text}" for kind, text in MEANINGS.items())
    intro = (
        "Errors at IoU 0.5 after TIDE (Bolya et al., 2020). dAP is the AP50, in points, that would be won if "
        f"all errors of that kind, and no others, were repaired. {meanings[0].upper()}{meanings[1:]}."
    )
    return Section(
        "errors", "Kinds of errors", [_costs(analyses), _cost_table(analyses), _by_class(analyses)], intro
    )


def _costs(analyses: Analyses) -> Panel:
    traces = []
    for number, run, analysis in analyses:
        errors = analysis.errors
        values = [*errors.cost.values(), errors.false_positive, errors.false_negative]
        traces.append(
            {
                "type": "bar",
                "x": [*errors.cost, "false positives", "false negatives"],
                "y": numbers([100 * value for value in values]),
                "name": run,
                "marker": {"color": run_colour(number)},
                "meta": {"run": number},
                "hovertemplate": "%{x}: %{y:.2f}",
            }
        )
    figure = chart(traces, barmode="group", yaxis={"title": {"text": "dAP, points"}}, bargap=0.35)
    return Panel("chart", "What each kind of error costs", {"": figure}, wide=True, height=320)


def _cost_table(analyses: Analyses) -> Panel:
    rows: list[tuple[int, list[Any]]] = []
    for number, run, analysis in analyses:
        errors = analysis.errors
        costs = [errors.ap, *errors.cost.values(), errors.false_positive, errors.false_negative]
        rows.append((number, [run, "dAP", *(100 * cost for cost in costs)]))
        rows.append((number, [run, "errors", None, *map(str, errors.counts.values()), None, None]))
    note = (
        "A false positive is any wrong detection, a false negative any object not found; repairing these two "
        "raises precision or recall alone."
    )
    heads = ["run", "", "AP50", *KINDS, MISSED, "false positives", "false negatives"]
    content = table(heads, rows, digits=2, heat=list(range(3, len(heads))))
    return Panel("table", "Costs and counts", {"": content}, note=note, wide=True)


def _by_class(analyses: Analyses) -> Panel:
    variants = {}
    for place, (number, _, analysis) in enumerate(analyses):
        errors = analysis.errors
        rows = [
            (
                number,
                [name, _points(errors.class_ap[k]), *(_points(errors.class_cost[kind][k]) for kind in kinds)],
            )
            for kinds in [(*KINDS, MISSED)]
            for k, name in enumerate(analysis.names)
        ]
        heads = ["class", "AP50", *KINDS, MISSED]
        heat = list(range(2, len(heads)))
        variants[str(place)] = table(heads, rows, heat=heat, search=len(rows) > 15)
    selects = [("Run", [run for _, run, _ in analyses])]
    note = "AP50 of the class that each kind costs it, in points."
    return Panel("table", "dAP by class", variants, selects, note, wide=True)


def _points(value: float) -> float | None:
    return 100 * float(value) if np.isfinite(value) else None


def confusion_section(analyses: Analyses) -> Section:
    """Which classes are taken for which."""
    variants: dict[str, Any] = {}
    for place, (_, _, analysis) in enumerate(analyses):
        matrix = analysis.confusion
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        shares[-1] = 0.0  # nothing is right about detections of background: they are counted, not shaded
        names = [*analysis.names, "background"]
        few = len(names) <= ANNOTATED
        trace = {
            "type": "heatmap",
            "z": [numbers(row, 3) for row in shares],
            "x": names,
            "y": names,
            "text": [[f"{count:,}" if count else "" for count in row] for row in matrix.tolist()],
            "texttemplate": "%{text}" if few else None,
            "hovertemplate": "ground truth %{y}, given %{x}: %{text} (%{z:.1%} of the row)<extra></extra>",
            "colorscale": SHADES,
            "zmin": 0,
            "zmax": 1,
            "xgap": 1,
            "ygap": 1,
            "showscale": False,
        }
        variants[str(place)] = chart(
            [trace],
            xaxis={"title": {"text": "given class"}, "type": "category", "tickangle": 0 if few else -90},
            yaxis={"title": {"text": "ground truth"}, "autorange": "reversed", "type": "category"},
        )
    scores = "; ".join(f"{run} {analysis.sweep.best:.2f}" for _, run, analysis in analyses)
    note = (
        "Objects by class (row) and the class they were given (column), paired by IoU ≥ 0.5 alone; shaded by "
        "share of the row. Last column: not found. Last row: found where nothing is. Detections from the "
        f"score of the best F1: {scores}."
    )
    classes = max(len(analysis.names) for _, _, analysis in analyses)
    selects = [("Run", [run for _, run, _ in analyses])]
    height = min(900, max(360, 120 + 22 * classes))
    panels = [Panel("chart", "Confusion matrix", variants, selects, note, height=height)]
    return Section("confusion", "Confusions and calibration", [*panels, *_calibration(analyses)])


def _calibration(analyses: Analyses) -> list[Panel]:
    diagonal = {
        "type": "scatter",
        "mode": "lines",
        "x": [0, 1],
        "y": [0, 1],
        "line": {"color": "rgba(128,128,128,0.6)", "dash": "dot", "width": 1},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    traces: list[dict[str, Any]] = [diagonal]
    for number, run, analysis in analyses:
        found = analysis.calibration
        filled = found.counts > 0
        sizes = 6 + 14 * np.sqrt(found.counts[filled] / max(1, found.counts.max()))
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": numbers(found.scores[filled], 3),
                "y": numbers(found.precisions[filled], 3),
                "text": [f"{count:,} detections" for count in found.counts[filled].tolist()],
                "hovertemplate": "score %{x:.2f}, correct %{y:.0%}, %{text}",
                "name": run,
                "line": {"color": run_colour(number)},
                "marker": {"color": run_colour(number), "size": numbers(sizes, 3)},
                "meta": {"run": number},
            }
        )
    errors = "; ".join(f"{run} {analysis.calibration.error:.3f}" for _, run, analysis in analyses)
    note = (
        "Share of the detections of a score that are correct at IoU 0.5; on the diagonal scores are "
        "probabilities, below it they promise too much. The more detections, the larger the mark. Expected "
        f"calibration error: {errors}."
    )
    figure = chart(
        traces,
        xaxis={"range": [0, 1.03], "title": {"text": "score"}},
        yaxis={"range": [0, 1.03], "title": {"text": "share correct"}},
    )
    return [Panel("chart", "Calibration", {"": figure}, note=note, height=400)]
