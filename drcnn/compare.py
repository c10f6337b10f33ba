"""``python -m drcnn.compare RUN RUN``: AP differences of two runs, with confidence intervals over images."""

import contextlib
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional, arg

from drcnn.arguments import parse
from drcnn.command import command
from drcnn.config import apply_overrides
from drcnn.data.records import read_json
from drcnn.engine.bootstrap import Comparison, Difference, collect_matches, compare
from drcnn.engine.countdown import Countdown
from drcnn.engine.distributed import rank_device
from drcnn.engine.metrics import match_results
from drcnn.errors import ConfigError, DataError
from drcnn.eval import EvalArguments, open_split, out_folder, run, write
from drcnn.loading import read_state, restore, restore_config

PROGRAM = "drcnn compare"
DESCRIPTION = """Compares the AP of two runs on the same images: differences, second less first, with
confidence intervals by a paired bootstrap over images. An interval tells what the choice of images explains,
not what that of the seed does.

Examples:
  drcnn compare runs/baseline runs/dynamic          evaluates both, or takes what drcnn eval wrote
  drcnn compare runs/baseline runs/dynamic --split test --data.root /data/bccd
  drcnn compare a.json b.json --annotations instances_val.json    two files of COCO-format results"""


@dataclass(frozen=True)
class CompareArguments:
    """Flags of the verb."""

    runs: Positional[Annotated[tuple[str, ...], arg(metavar="RUN RUN")]] = ()
    """Two run folders, checkpoints, or json files of COCO-format results."""
    split: Literal["val", "test", "train"] = "val"
    """Split of the runs' data to compare on."""
    annotations: str = ""
    """COCO-format annotations, where both are files of results."""
    resamples: int = 1000
    """Draws of the images, with replacement."""
    seed: int = 0
    """Seed of the draws."""
    confidence: float = 0.95
    """Share of the draws that an interval holds."""
    batch_size: int = 4
    """Images per forward, where a run is evaluated."""
    again: bool = False
    """Evaluate runs anew, even where drcnn eval has left the results of this checkpoint."""
    out: str = ""
    """Json file to write the comparison to."""


class Truth(NamedTuple):
    """What results are scored against.

    Attributes:
        content (dict): COCO-format annotations.
        image_ids (list[int] | None): images to score; None for all.
        annotation_ids (list[int] | None): annotations to score against; None for all.
        source (str): where they come from.
    """

    content: dict
    image_ids: list[int] | None
    annotation_ids: list[int] | None
    source: str


@command
def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    if "-h" in argv or "--help" in argv:
        with contextlib.suppress(SystemExit):
            parse(CompareArguments, ["--help"], PROGRAM, DESCRIPTION)
        return 0
    arguments, overrides = parse(CompareArguments, argv, PROGRAM, DESCRIPTION, rest=True)
    if len(arguments.runs) != 2:
        raise ConfigError(f"pass two runs or files of results to compare, got {len(arguments.runs)}")
    for name in ("resamples", "batch_size"):
        if getattr(arguments, name) < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must be at least 1, got {getattr(arguments, name)}")
    if not 0 < arguments.confidence < 1:
        raise ConfigError(f"--confidence must lie between 0 and 1, got {arguments.confidence}")
    truth, results = gather(arguments, overrides)
    comparisons = [score(truth, results, kind, arguments) for kind in kinds(truth, results)]
    console = Console(soft_wrap=True)
    for comparison in comparisons:
        console.print(show(comparison, arguments.runs))
    if arguments.out:
        write_json(Path(arguments.out), arguments, truth, comparisons)
    return 0


def gather(arguments: CompareArguments, overrides: list[str]) -> tuple[Truth, list[list[dict]]]:
    """Reads or makes the results of both, and the annotations that they are scored against."""
    files = [Path(name) for name in arguments.runs]
    loose = [file for file in files if file.suffix == ".json"]
    if len(loose) == 2 and overrides:
        raise ConfigError(f"{overrides[0]} has no meaning when two files of results are compared")
    if (len(loose) == 2) != bool(arguments.annotations):
        raise ConfigError("--annotations FILE and two json files of results go together; a run knows its own")
    truths, results = [], []
    if arguments.annotations:
        content = read_json(Path(arguments.annotations), "check the path")
        truths.append(Truth(content, None, None, arguments.annotations))
    for name, file in zip(arguments.runs, files, strict=True):
        if file in loose:
            results.append(read_results(file))
            continue
        truth, found = of_run(name, arguments, overrides)
        truths.append(truth)
        results.append(found)
    first, last = truths[0], truths[-1]
    if (first.image_ids, first.annotation_ids) != (last.image_ids, last.annotation_ids):
        raise DataError(
            f"{first.source} and {last.source} hold other images or annotations; compare runs on the same "
            "data, such as by --data.root for both"
        )
    return first, results


def of_run(name: str, arguments: CompareArguments, overrides: list[str]) -> tuple[Truth, list[dict]]:
    """The annotations of a run's split, and its results: those that are there, else it is evaluated."""
    file, state = read_state(name)
    config = apply_overrides(restore_config(state, str(file)), overrides)
    dataset = open_split(config, arguments.split, state, file)
    if not dataset.has_annotations:
        raise DataError(
            f"{dataset.annotation_file} holds no annotations to compare on; choose another --split"
        )
    images, annotations = dataset.image_ids.tolist(), dataset.annotation_ids.tolist()
    truth = Truth(dataset.source.content(), images, annotations, str(dataset.annotation_file))
    options = EvalArguments(split=arguments.split, batch_size=arguments.batch_size)
    folder = out_folder(options, file)
    written = folder / f"results_{arguments.split}.json"
    record = {"checkpoint": str(file), "step": state["step"], "split": arguments.split}
    if not arguments.again and _is_of(folder / f"metrics_{arguments.split}.json", record):
        print(f"{file}: step {state['step']}, results in {written}", flush=True)
        return truth, read_results(written)
    print(f"{file}: step {state['step']}, evaluating {len(dataset)} images", flush=True)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    predictor = restore(state, config, str(file), device=rank_device(config.train.device))
    found = run(predictor, dataset, config, options)
    write(folder, arguments.split, record, found)
    return truth, found[-1][1]


def _is_of(metrics: Path, record: dict) -> bool:
    """Whether ``drcnn eval`` wrote this file for a checkpoint at its step."""
    try:
        content = json.loads(metrics.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and record.items() <= content.items()


def read_results(file: Path) -> list[dict]:
    """Reads a file of COCO-format results; what is in it is checked when it is scored."""
    try:
        results = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"results file {file} cannot be read: {error}; pass --again to evaluate the run"
        ) from None
    if not isinstance(results, list):
        raise DataError(f"results file {file} must hold a json list of detections")
    return results


def kinds(truth: Truth, results: list[list[dict]]) -> list[Literal["bbox", "segm"]]:
    """What can be compared: boxes, and masks if all detections and annotations have them."""
    records = [record for one in results for record in one] + truth.content.get("annotations", [])
    masks = all(results) and all(isinstance(r, dict) and r.get("segmentation") for r in records)
    return ["bbox", "segm"] if masks else ["bbox"]


def score(
    truth: Truth, results: list[list[dict]], kind: Literal["bbox", "segm"], arguments: CompareArguments
) -> Comparison:
    """Matches the results of both and compares them."""
    scored = truth.image_ids, kind, truth.annotation_ids
    both = [collect_matches(match_results(truth.content, found, *scored)) for found in results]
    with Countdown(f"compare {kind}", "resamples") as progress:
        return compare(
            *both,
            iou_type=kind,
            resamples=arguments.resamples,
            seed=arguments.seed,
            confidence=arguments.confidence,
            progress=progress,
        )


def show(comparison: Comparison, names: tuple[str, ...]) -> RenderableType:
    """Returns the differences as tables for ``rich``, those whose interval leaves out 0 with a star."""
    title = (
        f"{comparison.iou_type}: B = {names[1]} less A = {names[0]}, {comparison.images} images, "
        f"{comparison.resamples} resamples; * interval without 0"
    )
    tables = [
        _table(label, rows, comparison.confidence)
        for label, rows in (("", comparison.summary), ("AP of class", comparison.classes))
    ]
    return Group(title, *(part for table in tables for part in ("", table)), "")


def _table(label: str, rows: Iterable[Difference], confidence: float) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column(label)
    for name in ("A", "B", "B - A", f"{confidence:.0%} interval", "B better"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if math.isnan(row.difference):
            table.add_row(escape(row.name), *["n/a"] * 5)
            continue
        interval = f"{row.low:+.3f} to {row.high:+.3f}{'*' if row.clear else ' '}"
        values = (
            f"{row.first:.3f}",
            f"{row.second:.3f}",
            f"{row.difference:+.3f}",
            interval,
            f"{row.better:.0%}",
        )
        table.add_row(escape(row.name), *values)
    return table


def write_json(file: Path, arguments: CompareArguments, truth: Truth, comparisons: list[Comparison]) -> None:
    """Writes the comparison; undefined numbers are null."""
    content = {
        "first": arguments.runs[0],
        "second": arguments.runs[1],
        "annotations": truth.source,
        "seed": arguments.seed,
        **{comparison.iou_type: comparison.to_dict() for comparison in comparisons},
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(_finite(content), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}; pass another --out") from None


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    sys.exit(main())
