"""``python -m drcnn.plot RUN [RUN ...]``: draws what runs logged, several over each other."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from drcnn.arguments import parse
from drcnn.command import command
from drcnn.engine.curves import metrics_file, read_histories
from drcnn.errors import ConfigError

PROGRAM = "drcnn plot"
DESCRIPTION = """Draws what runs logged in metrics.jsonl: losses, learning rate, T_now and beta_now, the share
of the loss by size of object with the collages, AP. Several runs are drawn over each other.
Needs matplotlib: pip install 'drcnn[plot]'.

Examples:
  drcnn plot runs/mine
  drcnn plot runs/faster runs/dynamic --out compared"""


@dataclass(frozen=True)
class PlotArguments:
    """Flags of the verb."""

    runs: Positional[Annotated[tuple[str, ...], arg(metavar="RUN...")]]
    """Run folders, also of runs that still go on, or their metrics.jsonl."""
    out: str = ""
    """Folder for curves.png and curves.svg; empty: RUN/plots for one run, plots for several."""
    formats: tuple[Literal["png", "svg", "pdf"], ...] = ("png", "svg")
    """Formats to write."""


@command
def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    if "-h" in argv or "--help" in argv:
        with contextlib.suppress(SystemExit):
            parse(PlotArguments, ["--help"], PROGRAM, DESCRIPTION)
        return 0
    arguments = parse(PlotArguments, argv, PROGRAM, DESCRIPTION)
    if not arguments.runs:
        raise ConfigError("no run given; pass the folders of one or more runs")
    if not arguments.formats:
        raise ConfigError("--formats needs at least one of png, svg and pdf")
    histories = read_histories(arguments.runs)
    try:
        from drcnn.engine.charts import save_charts
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ConfigError("drcnn plot needs matplotlib; install it with: pip install 'drcnn[plot]'") from None
    for note in (note for history in histories for note in history.notes):
        print(f"note: {note}")
    alone = metrics_file(arguments.runs[0]).parent / "plots" if len(histories) == 1 else Path("plots")
    out = Path(arguments.out) if arguments.out else alone
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = save_charts(histories, out, dict.fromkeys(arguments.formats))
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror or error}; pass another --out") from None
    print(f"written: {', '.join(map(str, files))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
