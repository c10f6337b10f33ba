"""What the report says of some runs, section by section."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from drcnn.data import CocoDataset
from drcnn.data.audit import Audit
from drcnn.engine.curves import History
from drcnn.engine.report.analysis import Analysis
from drcnn.engine.report.data import data_section
from drcnn.engine.report.gallery import gallery_section
from drcnn.engine.report.mistakes import confusion_section, errors_section
from drcnn.engine.report.page import Section
from drcnn.engine.report.precision import overview_section, precision_section
from drcnn.engine.report.settings import read_log_head, settings_section
from drcnn.engine.report.training import training_section


@dataclass(frozen=True, eq=False)
class ReportedRun:
    """A run and what is known of it.

    Attributes:
        history: what it logged; its name is the run's.
        folder: the run folder.
        config: its config as plain types.
        metrics: the content of ``metrics_SPLIT.json`` by split.
        dataset: what it was evaluated on, if it was.
        analysis: its detections on ``dataset``, judged.
    """

    history: History
    folder: Path
    config: dict = field(repr=False)
    metrics: dict[str, dict] = field(default_factory=dict)
    dataset: CocoDataset | None = None
    analysis: Analysis | None = None


def sections_of(
    runs: Sequence[ReportedRun], pictures: int = 24, side: int = 640, audits: Sequence[Audit] = ()
) -> list[Section]:
    """Lists the sections for which some run has data.

    Args:
        runs: the runs, in the order of their numbers.
        pictures: number of pictures of each data set.
        side: longest side of a picture in pixels.
        audits: checks of the runs' data.
    """
    named = [(number, run.history.name, run) for number, run in enumerate(runs)]
    sections = [
        overview_section([(number, name, run.metrics) for number, name, run in named]),
        training_section([(number, run.history) for number, _, run in named]),
    ]
    judged = [(number, name, run.analysis) for number, name, run in named if run.analysis is not None]
    if judged:
        sections += [precision_section(judged), errors_section(judged), confusion_section(judged)]
        sections.append(gallery_section(_by_data(runs), pictures, side))
    if audits:
        sections.append(data_section(audits))
    logs = [(number, name, run.config, read_log_head(run.folder / "log.txt")) for number, name, run in named]
    sections.append(settings_section(logs))
    return [section for section in sections if section is not None]


def _by_data(runs: Sequence[ReportedRun]) -> list[tuple[CocoDataset, list[tuple[int, Analysis]]]]:
    """Runs that were evaluated on the same images."""
    groups: dict[tuple, tuple[CocoDataset, list[tuple[int, Analysis]]]] = {}
    for number, run in enumerate(runs):
        if run.analysis is not None and run.dataset is not None:
            data = run.dataset
            key = (data.annotation_file, data.image_folder, len(data), tuple(data.categories))
            groups.setdefault(key, (data, []))[1].append((number, run.analysis))
    return list(groups.values())
