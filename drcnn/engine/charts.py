"""Charts of runs: one panel for each thing that they logged, one colour for each run.

Colours are Okabe and Ito's, which the colour-blind tell apart ("Color universal design", 2008). Stages of a
detector are shades of its run's colour, light to dark. Nothing here opens a window: figures are made without
pyplot, and text stays text in an SVG.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from drcnn.engine.curves import EXACT, NOISY, PRECISIONS, SMOOTHED_FROM, VOC, Curve, History, loss_title
from drcnn.errors import ConfigError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
STROKES = ("-", "--", ":", "-.")
"""Runs beyond the colours take them again, with the next stroke."""
SIZES = {"small": "#DDAA33", "medium": "#BB5566", "large": "#004488"}
QUIET = "#666666"

STYLE = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#BBBBBB",
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "drcnn",
}
COLUMNS = 3
MARKERS = ("o", "^", "s", "D")


@dataclass(frozen=True)
class Panel:
    """A title, and what draws below it."""

    title: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Run:
    """A run, and how its lines look."""

    history: History
    colour: str
    stroke: str
    width: float

    def shade(self, stage: int, stages: int) -> tuple[float, ...]:
        """The colour of a stage: the last is the run's, those before are lighter."""
        return _lighter(self.colour, 0.7 * (1 - (stage + 1) / stages))


def _lighter(colour: str, share: float) -> tuple[float, ...]:
    return tuple(share + (1 - share) * part for part in to_rgb(colour))


def save_charts(histories: Sequence[History], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Draws all panels of some runs into one figure.

    Args:
        histories: the runs.
        folder: where ``curves.FORMAT`` go; it must exist.
        formats: such as png and svg.

    Returns:
        list[Path]: the files.
    """
    with matplotlib.rc_context(STYLE):
        figure = draw(histories)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # placed once, and so alike in each format
        files = [folder / f"curves.{ending}" for ending in formats]
        for file in files:
            # The same records give the same file.
            stamp = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
            figure.savefig(file, dpi=160, metadata=stamp.get(file.suffix[1:]))
    return files


def draw(histories: Sequence[History]) -> Figure:
    """Makes the figure, without its style.

    Raises:
        ConfigError: the runs hold nothing to draw.
    """
    count = len(histories)
    runs = [
        Run(
            history,
            COLOURS[i % len(COLOURS)],
            STROKES[i // len(COLOURS) % len(STROKES)],
            # Where runs agree exactly, each stays visible around the next.
            min(1.6 + 0.9 * (count - 1 - i), 4.0),
        )
        for i, history in enumerate(histories)
    ]
    panels = panels_of(runs)
    if not panels:
        names = " and ".join(history.name for history in histories)
        raise ConfigError(f"there is nothing to draw in {names}: neither losses nor evaluations")
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.7 * rows + 0.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    last = max(int(curve.steps[-1]) for run in runs for curve in _all_curves(run.history))
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        panel.draw(axes)
        axes.set_xlim(0, last * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if index >= len(panels) - columns:
            axes.set_xlabel("iteration")
    keys = any(axes.get_legend() for axes in figure.axes)
    for axes, panel in zip(figure.axes, panels, strict=True):
        axes.set_title(panel.title, pad=18 if keys else 6)  # a key is between the title and the panel
    _name_runs(figure, runs, columns)
    if any(len(curve.steps) >= SMOOTHED_FROM for run in runs for curve in run.history.stages("loss")):
        note = "thin: as logged, means since the record before; thick: their running mean"
        figure.supxlabel(note, x=0.99, ha="right", size=8, color=QUIET)
    return figure


def _all_curves(history: History) -> list[Curve]:
    evaluated = [curve for curves in history.evaluations.values() for curve in curves.values()]
    return [*history.curves.values(), *evaluated]


def _name_runs(figure: Figure, runs: Sequence[Run], columns: int) -> None:
    """One run is the title; several are a legend above all panels."""
    if len(runs) == 1:
        figure.suptitle(runs[0].history.name, x=0.01, ha="left", weight="bold")
        return
    lines = [
        Line2D([], [], color=run.colour, linestyle=run.stroke, linewidth=3, label=run.history.name)
        for run in runs
    ]
    longest = max(len(run.history.name) for run in runs)
    side_by_side = max(1, 52 * columns // (longest + 8))
    figure.legend(handles=lines, loc="outside upper left", ncols=side_by_side, fontsize=10)


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """Lists the panels for which some run has data."""
    names = dict.fromkeys(name for run in runs for name in run.history.losses())
    panels = [_noisy(runs, name, loss_title(name), "", 0.0) for name in names]
    panels += [_exact(runs, name, *labels) for name, labels in EXACT.items() if _any(runs, name)]
    panels += [_noisy(runs, name, *labels) for name, labels in NOISY.items() if _any(runs, name)]
    shared = [run for run in runs if "loss_share_small" in run.history.curves]
    panels += [_shares(run, named=len(runs) > 1) for run in shared]
    return panels + _precisions(runs)


def _any(runs: Sequence[Run], name: str) -> bool:
    return any(run.history.stages(name) for run in runs)


def _exact(runs: Sequence[Run], name: str, title: str, unit: str, least: float | None) -> Panel:
    def draw_lines(axes: Axes) -> None:
        for run in runs:
            curves = run.history.stages(name)
            for stage, curve in enumerate(curves):
                colour = run.shade(stage, len(curves))
                _line(axes, curve, color=colour, linestyle=run.stroke, linewidth=run.width)
        _finish(axes, runs, name, unit, least)

    return Panel(title, draw_lines)


def _noisy(runs: Sequence[Run], name: str, title: str, unit: str, least: float) -> Panel:
    def draw_lines(axes: Axes) -> None:
        for run in runs:
            curves = run.history.stages(name)
            for stage, curve in enumerate(curves):
                colour = run.shade(stage, len(curves))
                if len(curve.steps) >= SMOOTHED_FROM:
                    _line(axes, curve, color=_lighter(colour, 0.6), linewidth=0.7, zorder=1.5)
                    curve = curve.smoothed()
                _line(axes, curve, color=colour, linestyle=run.stroke)
        _finish(axes, runs, name, unit, least)

    return Panel(title, draw_lines)


def _line(axes: Axes, curve: Curve, **look: object) -> None:
    """A line, or a dot where there is nothing to connect."""
    axes.plot(curve.steps, curve.values, marker="o" if len(curve.steps) == 1 else None, markersize=4, **look)


def _finish(axes: Axes, runs: Sequence[Run], name: str, unit: str, least: float | None) -> None:
    """Labels the axis, gives it room and, above it, names the stages."""
    axes.set_ylabel(unit)
    low, high = axes.get_ylim()
    if least is not None:
        _rise_from(axes, least, 0.0)
    elif high - low < 0.1:  # a threshold that hardly moves looks so
        axes.set_ylim((low + high) / 2 - 0.1, (low + high) / 2 + 0.1)
    if axes.get_ylim()[1] < 0.005:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}".replace("e-0", "e-"))
    stages = max(len(run.history.stages(name)) for run in runs)
    if stages > 1:
        grey = Run(runs[0].history, "#333333", "-", 1.6)
        _key(
            axes,
            [
                Line2D([], [], color=grey.shade(s, stages), label=str(s) if s else "stage 0")
                for s in range(stages)
            ],
        )


def _rise_from(axes: Axes, least: float, room: float) -> None:
    """Starts the axis at ``least`` and ends it above the data, ``room`` from there or more."""
    height = axes.dataLim.y1 - least
    top = max(1.06 * height, room) if np.isfinite(height) else room
    axes.set_ylim(least, least + (top or 1.0))


def _key(axes: Axes, handles: Sequence[Line2D | Patch]) -> None:
    """Explains a panel's marks in the line between it and its title, where no data are."""
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.98),
        ncols=len(handles),
        fontsize=8,
        labelcolor=QUIET,
        handlelength=1.0,
        handletextpad=0.4,
        columnspacing=0.9,
        borderpad=0.2,
    )


def _shares(run: Run, *, named: bool) -> Panel:
    """Shares of the box loss by size of object, over the share of iterations that were collages."""

    def draw_shares(axes: Axes) -> None:
        curves = run.history.curves
        points = len(curves["loss_share_small"].steps)
        block = max(run.history.log_every, points // 80)
        for size, colour in SIZES.items():
            _line(axes, curves[f"loss_share_{size}"].blocks(block), color=colour)
        handles: list[Line2D | Patch] = [
            Line2D([], [], color=colour, label=size) for size, colour in SIZES.items()
        ]
        if "scale_collage" in curves and curves["scale_collage"].values.any():
            collages = curves["scale_collage"].blocks(block)
            edges = np.append(curves["scale_collage"].steps[0] - 1, collages.steps)
            axes.stairs(collages.values, edges, fill=True, color="#DDDDDD", zorder=0.5)
            handles.append(Patch(color="#DDDDDD", label="share of collages"))
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("share of the box loss")
        _key(axes, handles)

    return Panel(
        f"Loss by size of object, {run.history.name}" if named else "Loss by size of object", draw_shares
    )


def _precisions(runs: Sequence[Run]) -> list[Panel]:
    """AP of each evaluation: one run's numbers in one panel, those of several runs in a panel each."""
    panels = []
    for prefix, kind in (("", "boxes"), ("segm_", "masks")):
        groups = [PRECISIONS] if len(runs) == 1 else [(name,) for name in PRECISIONS]
        for names in [*groups, VOC]:
            shown = [n for n in names if any(_splits(run, prefix + n) for run in runs)]
            if shown:
                title = "mAP of VOC" if names == VOC else "AP" if len(shown) > 1 else shown[0]
                panels.append(_precision(runs, prefix, shown, f"{title} of {kind}"))
    return panels


def _splits(run: Run, name: str) -> dict[str, Curve]:
    """The curves of a number by split."""
    return {split: curves[name] for split, curves in run.history.evaluations.items() if name in curves}


def _precision(runs: Sequence[Run], prefix: str, names: Sequence[str], title: str) -> Panel:
    def draw_marks(axes: Axes) -> None:
        splits: dict[str, None] = {}
        for run in runs:
            for stage, name in enumerate(names):
                colour = run.shade(len(names) - 1 - stage, len(names))
                look = dict(color=colour, marker=MARKERS[stage], markersize=5, clip_on=False)
                for split, curve in _splits(run, prefix + name).items():
                    splits[split] = None
                    # Splits other than val are evaluated once, at the end, with the best weights.
                    hollow = {} if split == "val" else {"linestyle": "", "markerfacecolor": "white"}
                    axes.plot(curve.steps, curve.values, **(look | {"linestyle": run.stroke} | hollow))
        _rise_from(axes, 0.0, 0.05)
        axes.set_ylabel("AP (0 to 1)")
        look = dict(color="#333333", linestyle="", markersize=5)
        marks = zip(names, MARKERS, strict=False)
        handles = [Line2D([], [], marker=m, label=n, **look) for n, m in marks] if len(names) > 1 else []
        hollow = " and ".join(split for split in splits if split != "val")
        if hollow:
            look |= {"marker": "o", "markerfacecolor": "white"}
            handles.append(Line2D([], [], label=f"{hollow}, best weights", **look))
        if handles:
            _key(axes, handles)

    return Panel(title, draw_marks)
