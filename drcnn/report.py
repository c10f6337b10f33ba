"""``python -m drcnn.report RUN [RUN ...]``: one page about runs, that needs nothing besides itself."""

import contextlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tyro.conf import Positional, arg

from drcnn.arguments import parse
from drcnn.check import of_config
from drcnn.command import command, one_line
from drcnn.config import Config, from_dict
from drcnn.data import CocoDataset, load_split
from drcnn.data.audit import Audit, audit, model_anchors
from drcnn.engine.checkpoint import find_checkpoint
from drcnn.engine.countdown import Countdown
from drcnn.engine.curves import History, metrics_file, read_histories
from drcnn.engine.evaluator import detect
from drcnn.errors import ConfigError, DataError, WeightsError
from drcnn.loading import read_state, restore

PROGRAM = "drcnn report"
DESCRIPTION = (
    "Writes one html page about runs, for any browser, without a network: curves, AP by class and size, "
    "precision and recall, kinds of errors (TIDE), confusion matrix, calibration, the best and worst images, "
    "settings that differ. Several runs are shown over each other. "
    "Needs plotly: pip install 'drcnn[report]'.\n\n"
    "Examples:\n"
    "  drcnn report runs/bccd\n"
    "  drcnn report runs/faster runs/dynamic --split test --out compared.html\n"
    "  drcnn report runs/bccd --check\n"
    "  drcnn report runs/* --no-analysis"
)


@dataclass(frozen=True)
class ReportArguments:
    """Flags of the verb."""

    runs: Positional[Annotated[tuple[str, ...], arg(metavar="RUN...")]]
    """Run folders, also of runs that still go on."""
    out: str = ""
    """File to write; empty: RUN/report.html for one run, report.html for several."""
    split: Literal["val", "test"] = "val"
    """Split whose detections are analysed."""
    analysis: bool = True
    """Analyse detections. They are read from RUN/eval/results_SPLIT.json, which drcnn eval writes; without
    that file, or when the weights are newer, the best weights are evaluated and the file is written."""
    images: int = 24
    """Number of images to show: a half of the worst, a quarter of the best, the rest by kind of error."""
    image_side: int = 640
    """Longest side of an image in the page, in pixels."""
    iou_type: Literal["bbox", "segm"] = "bbox"
    """What to compare: boxes or masks."""
    check: bool = False
    """Check the runs' data too, as drcnn check does: findings, and how their objects look to the detector."""
    data_root: str = ""
    """Folder of the data, if it is not where the runs found it."""
    batch_size: int = 4
    """Images per forward, where a run is evaluated."""
    device: str = "auto"
    """Where to evaluate: auto (CUDA where there is one), cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's choice."""


@command
def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    if "-h" in argv or "--help" in argv:
        with contextlib.suppress(SystemExit):
            parse(ReportArguments, ["--help"], PROGRAM, DESCRIPTION)
        return 0
    arguments = parse(ReportArguments, argv, PROGRAM, DESCRIPTION)
    check(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    histories = read_histories(arguments.runs)
    folders = list(dict.fromkeys(metrics_file(run).resolve().parent for run in arguments.runs))
    try:
        from drcnn.engine.report import sections_of, write_page
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "plotly":
            raise
        raise ConfigError("drcnn report needs plotly; install it with: pip install 'drcnn[report]'") from None
    for note in (note for history in histories for note in history.notes):
        print(f"note: {note}")
    out = Path(arguments.out or (folders[0] / "report.html" if len(folders) == 1 else "report.html"))
    runs = [read_run(h, folder, arguments) for h, folder in zip(histories, folders, strict=True)]
    audits = check_data(runs, arguments.data_root) if arguments.check else []
    sections = sections_of(runs, arguments.images, arguments.image_side, audits)
    names = [history.name for history in histories]
    title = ", ".join(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1} other runs"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        size = write_page(out, f"Report of {title}", subtitle(runs, arguments), names, sections)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror or error}; pass another --out") from None
    print(f"written: {out} ({size / 1e6:.1f} MB)")
    return 0


def check(arguments: ReportArguments) -> None:
    """Refuses values that make no sense."""
    if not arguments.runs:
        raise ConfigError("no run given; pass the folders of one or more runs")
    for name, least in (("batch_size", 1), ("images", 0), ("image_side", 64), ("threads", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def check_data(runs: list[Any], root: str) -> list[Audit]:
    """Checks each data set of the runs once, as their detectors see it."""
    owners: dict[str, list[str]] = {}
    configs: dict[str, Config] = {}
    for run in runs:
        if run.config:
            config = with_root(from_dict(run.config), root)
            seen = repr((config.data, model_anchors(config.model)))
            configs.setdefault(seen, config)
            owners.setdefault(seen, []).append(run.history.name)
    audits = []
    for seen, config in configs.items():
        sources, options = of_config(config)
        name = ", ".join(owners[seen])
        with Countdown(f"check of {name}") as progress:
            audits.append(audit(sources, name=name, progress=progress, **options))
    return audits


def with_root(config: Config, root: str) -> Config:
    """The config with its data in another folder, unless that is empty."""
    return replace(config, data=replace(config.data, root=root)) if root else config


def subtitle(runs: list[Any], arguments: ReportArguments) -> str:
    """Says what the page is about."""
    judged = [run for run in runs if run.analysis is not None]
    if not judged:
        return "training curves and settings; detections were not analysed"
    data = dict.fromkeys(f"{len(run.dataset)} images of {run.dataset.annotation_file}" for run in judged)
    kind = "boxes" if arguments.iou_type == "bbox" else "masks"
    return f"{kind} on the {arguments.split} split: {'; '.join(data)}"


def read_run(history: History, folder: Path, arguments: ReportArguments) -> Any:
    """Gathers what is known of a run, and judges its detections."""
    from drcnn.engine.report import ReportedRun, analyse

    config = read_json(folder / "config.json") or {}
    metrics = {split: read_json(folder / f"metrics_{split}.json") for split in ("val", "test")}
    run = ReportedRun(history, folder, config, {split: found for split, found in metrics.items() if found})
    if not (arguments.analysis and config):
        return run
    try:
        checkpoint = find_checkpoint(folder)
    except WeightsError as error:
        print(f"note: {history.name} is shown without an analysis of its detections: {one_line(error)}")
        return run
    typed = with_root(from_dict(config), arguments.data_root)
    try:
        dataset = load_split(typed.data, arguments.split)
        if not dataset.has_annotations:
            raise DataError(
                f"the {arguments.split} split of {history.name} has no annotations to compare with"
            )
        results = detections(history.name, folder, checkpoint, typed, dataset, arguments)
        ids = dataset.image_ids.tolist(), dataset.annotation_ids.tolist()
        found = analyse(dataset.source.content(), results, *ids, arguments.iou_type)
    except DataError as error:
        raise DataError(
            f"{one_line(error)}; --data-root FOLDER names another place, --no-analysis leaves detections out"
        ) from None
    return replace(run, dataset=dataset, analysis=found)


def detections(
    name: str,
    folder: Path,
    checkpoint: Path,
    config: Config,
    dataset: CocoDataset,
    arguments: ReportArguments,
) -> list[dict]:
    """Reads the results of an evaluation, or evaluates and writes them."""
    file = folder / "eval" / f"results_{arguments.split}.json"
    if file.is_file() and file.stat().st_mtime >= checkpoint.stat().st_mtime:
        print(f"{name}: results of {file}")
        return read_json(file)
    _, state = read_state(checkpoint)
    if dataset.categories != list(state["categories"]):
        raise DataError(f"{dataset.annotation_file} has other classes than {checkpoint} was trained for")
    predictor = restore(state, config, str(checkpoint), device=arguments.device)
    print(f"{name}: evaluating {checkpoint} on {len(dataset)} images", flush=True)
    with Countdown(f"{name} {arguments.split}") as progress:
        results = detect(
            predictor.model,
            dataset,
            config.data,
            device=predictor.device,
            batch_size=arguments.batch_size,
            amp=config.train.amp,
            progress=progress,
        )
    try:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(results) + "\n")
    except OSError as error:
        print(f"note: results are not kept, {file} cannot be written: {error.strerror}")
    return results


def read_json(file: Path) -> Any:
    """The content of a json file; None if there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not readable json: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
