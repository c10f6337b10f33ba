"""What each stage of a detector with stages detects: its AP, were it the last one.

Sparse R-CNN refines its boxes in a row of stages, and so does Cascade R-CNN, which also averages the scores
of all stages up to the last.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.table import Table
from torch import nn

from drcnn.engine.metrics import Metrics, format_value
from drcnn.errors import ConfigError
from drcnn.models import CascadeHead, SparseHead

Result = TypeVar("Result")
_COLUMNS = ("AP", "AP50", "AP75", "AP90", "APs", "APm", "APl")


def stages_head(model: nn.Module) -> CascadeHead | SparseHead:
    """Finds the part of a detector that holds its ``stages``.

    Raises:
        ConfigError: if the detector has none.
    """
    for part in model.modules():
        if isinstance(part, CascadeHead | SparseHead):
            return part
    name = type(model).__name__
    raise ConfigError(
        f"--stages is for detectors with stages, Cascade and Sparse R-CNN; this {name} has none"
    )


@contextmanager
def first_stages(model: nn.Module, count: int) -> Iterator[None]:
    """Lets a detector detect with its first ``count`` stages alone, inside of a ``with`` block."""
    head = stages_head(model)
    stages = head.stages
    head.stages = stages[:count]
    try:
        yield
    finally:
        head.stages = stages


def at_each_stage(model: nn.Module, action: Callable[[], Result]) -> list[Result]:
    """Does something with a detector once for each of its stages, as if that were the last.

    Args:
        model (nn.Module): the detector.
        action (Callable): uses ``model`` as it then is.

    Returns:
        list: what ``action`` returned for the first stage, for the first two, and so on to all of them.

    Raises:
        ConfigError: if the detector has no stages.
    """
    found = []
    for count in range(1, len(stages_head(model).stages) + 1):
        with first_stages(model, count):
            found.append(action())
    return found


def stages_table(by_stage: Sequence[Metrics]) -> Table:
    """Shows AP by stage, a row for each; with masks, the AP of the masks comes last."""
    table = Table(show_edge=False, pad_edge=False)
    masks = all(metrics.segm is not None for metrics in by_stage)
    for name in ("stage", *_COLUMNS, *(["segm AP"] * masks)):
        table.add_column(name, justify="right", min_width=5)
    for number, metrics in enumerate(by_stage, start=1):
        values = [metrics.summary[name] for name in _COLUMNS]
        values += [metrics.segm.summary["AP"]] if masks else []
        table.add_row(str(number), *map(format_value, values))
    return table
