"""Tables of AP and curves of precision over recall."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from drcnn.engine.metrics import UNDEFINED
from drcnn.engine.report.analysis import AREAS, IOU_THRESHOLDS, Analysis
from drcnn.engine.report.page import Panel, Section, chart, numbers, run_colour, table

Analyses = Sequence[tuple[int, str, Analysis]]
"""Numbers and names of runs, and their detections judged."""
SUMMARY = ("AP", *(f"AP{iou}" for iou in IOU_THRESHOLDS), "APs", "APm", "APl", "AR100", "VOC07", "VOC12")
DASHES = {50: "solid", 75: "dash", 90: "dot"}
"""IoU thresholds whose curves are drawn."""


def overview_section(runs: Sequence[tuple[int, str, dict[str, dict]]]) -> Section | None:
    """The numbers of each run's own evaluations.

    Args:
        runs: number, name and by split the content of ``metrics_SPLIT.json``.
    """
    rows: list[tuple[int, list[Any]]] = []
    for number, name, splits in runs:
        for split, content in splits.items():
            for kind, metrics in (("boxes", content), ("masks", content.get("segm"))):
                if metrics:
                    values = [_points(metrics["summary"].get(key)) for key in SUMMARY]
                    rows.append((number, [name, split, kind, content.get("step"), *values]))
    if not rows:
        return None
    used = [i for i, _ in enumerate(SUMMARY) if any(row[4 + i] is not None for _, row in rows)]
    heads = ["run", "split", "of", "iteration", *(SUMMARY[i] for i in used)]
    cells = [(number, [*row[:4], *(row[4 + i] for i in used)]) for number, row in rows]
    content = table(heads, cells)
    note = "Of the best weights. Points, 0 to 100. AP is the mean over IoU 0.50:0.05:0.95; s, m, l: by size."
    return Section("overview", "Overview", [Panel("table", "AP", {"": content}, note=note, wide=True)])


def _points(value: float | None) -> float | None:
    return None if value is None or value == UNDEFINED else 100 * value


def precision_section(analyses: Analyses) -> Section:
    """AP by class and size, precision over recall, and over the score."""
    panels = [_class_table(analyses), _precision_recall(analyses), _sweep(analyses)]
    return Section("precision", "Average precision", panels)


def _class_table(analyses: Analyses) -> Panel:
    variants = {}
    for place, (number, _, analysis) in enumerate(analyses):
        for size, area in enumerate(AREAS):
            rows = [(number, ["all classes", int(analysis.counts.sum()), *_row(analysis, None, area)])]
            rows += [
                (number, [name, int(analysis.counts[k]), *_row(analysis, k, area)])
                for k, name in enumerate(analysis.names)
            ]
            heads = ["class", "ground truths", "AP", *(f"AP{iou}" for iou in IOU_THRESHOLDS)]
            heat = list(range(2, len(heads)))
            variants[f"{place},{size}"] = table(heads, rows, heat=heat, search=len(rows) > 15)
    selects = [("Run", [name for _, name, _ in analyses]), ("Size of object", AREAS)]
    note = "Points. Sizes are COCO's: small below 32², large from 96² pixels. Ground truths are of all sizes."
    return Panel("table", "AP by class and size", variants, selects, note, wide=True)


def _row(analysis: Analysis, label: int | None, area: str) -> list[float | None]:
    values = [analysis.ap(iou, label, area) for iou in (None, *IOU_THRESHOLDS)]
    return [None if value is None else 100 * value for value in values]


def _precision_recall(analyses: Analyses) -> Panel:
    classes = list(dict.fromkeys(name for _, _, analysis in analyses for name in analysis.names))
    variants = {}
    for place, name in enumerate([None, *classes]):
        traces = []
        for number, run, analysis in analyses:
            if name is not None and name not in analysis.names:
                continue
            label = None if name is None else analysis.names.index(name)
            for iou, dash in DASHES.items():
                values = analysis.curve(iou, label)
                if values is not None:
                    traces.append(
                        {
                            "type": "scatter",
                            "mode": "lines",
                            "x0": 0,
                            "dx": 0.01,
                            "y": numbers(values, 3),
                            "name": f"{run}, IoU {iou / 100:.2f}"
                            if len(analyses) > 1
                            else f"IoU {iou / 100:.2f}",
                            "line": {"color": run_colour(number), "dash": dash, "width": 2},
                            "meta": {"run": number},
                        }
                    )
        variants[str(place)] = chart(
            traces,
            xaxis={"range": [0, 1], "title": {"text": "recall"}},
            yaxis={"range": [0, 1.02], "title": {"text": "precision"}},
            showlegend=len(analyses) == 1,
        )
    note = "COCO's interpolated precision, at IoU 0.50 (solid), 0.75 (dashed) and 0.90 (dotted)."
    selects = [("Class", ["mean over classes", *classes])]
    return Panel("chart", "Precision and recall", variants, selects, note, height=340)


def _sweep(analyses: Analyses) -> Panel:
    traces: list[dict[str, Any]] = []
    for number, run, analysis in analyses:
        sweep = analysis.sweep
        for name, dash in (("f1", "solid"), ("precision", "dash"), ("recall", "dot")):
            text = "F1" if name == "f1" else name
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "x0": 0,
                    "dx": 1 / (len(sweep.thresholds) - 1),
                    "y": numbers(getattr(sweep, name), 3),
                    "name": f"{run}, {text}" if len(analyses) > 1 else text,
                    "line": {"color": run_colour(number), "dash": dash, "width": 2},
                    "meta": {"run": number},
                }
            )
    best = "; ".join(
        f"{run} {analysis.sweep.best:.2f} (F1 {float(np.max(analysis.sweep.f1)):.2f})"
        for _, run, analysis in analyses
    )
    figure = chart(
        traces,
        xaxis={"range": [0, 1], "title": {"text": "least score"}},
        yaxis={"range": [0, 1.02]},
        showlegend=len(analyses) == 1,
    )
    note = (
        f"At IoU 0.50, all classes together. F1 solid, precision dashed, recall dotted. Best score: {best}."
    )
    return Panel("chart", "Choosing a least score", {"": figure}, note=note, height=340)
