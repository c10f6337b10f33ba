"""``python -m drcnn.eval RUN``: evaluates a trained detector, or a file of results."""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from rich.console import Console
from tyro.conf import Positional, arg

from drcnn.arguments import parse
from drcnn.command import command
from drcnn.config import Config, apply_overrides, print_field_help
from drcnn.data import CocoDataset, load_split
from drcnn.engine import distributed
from drcnn.engine.countdown import Countdown
from drcnn.engine.evaluator import Metrics, detect, evaluate, evaluate_results
from drcnn.engine.predictor import Predictor
from drcnn.engine.stages import at_each_stage, stages_table
from drcnn.errors import ConfigError, DataError
from drcnn.loading import read_state, restore, restore_config

PROGRAM = "drcnn eval"
DESCRIPTION = """Evaluates a trained detector on a split of its data, or scores a file of COCO-format results.
Every field of the run's config is a flag as well, such as --data.root FOLDER.

Examples:
  drcnn eval runs/mine --split test
  drcnn eval runs/mine --data.test-augmentation.hflip --data.test-short-side 600
  drcnn eval --results results.json --annotations instances_val.json"""

Evaluation = tuple[Metrics | None, list[dict]]
"""Numbers, if there are annotations to score against, and COCO-format results."""


@dataclass(frozen=True)
class EvalArguments:
    """Flags of the verb."""

    run: Positional[Annotated[str, arg(metavar="RUN")]] = ""
    """Run folder (its best checkpoint, else its last), checkpoint file, or weights of any known system."""
    split: Literal["val", "test", "train"] = "val"
    """Split of the data to evaluate on."""
    out: str = ""
    """Folder for metrics_SPLIT.json and results_SPLIT.json; RUN/eval if empty."""
    batch_size: int = 4
    """Images per forward, on each process."""
    stages: bool = False
    """Evaluate each stage of Cascade or Sparse R-CNN as if it were the last, and show AP by stage."""
    results: str = ""
    """Score this json file of COCO-format results instead of running a detector; needs --annotations."""
    annotations: str = ""
    """COCO-format annotations to score --results against."""
    iou_type: Literal["bbox", "segm"] = "bbox"
    """What of --results to score: boxes or masks."""


@command
def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    if "-h" in argv or "--help" in argv:
        return show_help(argv)
    arguments, overrides = parse(EvalArguments, argv, PROGRAM, DESCRIPTION, rest=True)
    if arguments.results or arguments.annotations:
        if overrides:
            raise ConfigError(f"{overrides[0]} has no meaning when a file of results is scored")
        return score_file(arguments)
    if not arguments.run:
        raise ConfigError(
            "no run given; pass a run folder, a checkpoint file, or --results and --annotations"
        )
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    file, state = read_state(arguments.run)
    config = apply_overrides(restore_config(state, str(file)), overrides)
    device = distributed.rank_device(config.train.device)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    with distributed.process_group(device, config.train.rank_timeout):
        dataset = open_split(config, arguments.split, state, file)
        predictor = restore(state, config, str(file), device=device)
        say(f"{file}: step {state['step']}, {arguments.split} split of {len(dataset)} images")
        found = run(predictor, dataset, config, arguments)
        if distributed.is_main():
            record = {"checkpoint": str(file), "step": state["step"], "split": arguments.split}
            write(out_folder(arguments, file), arguments.split, record, found)
    return 0


def show_help(argv: list[str]) -> int:
    """Prints the flags of the verb and the fields of the config, with a run's values if it is given."""
    with contextlib.suppress(SystemExit):
        parse(EvalArguments, ["--help"], PROGRAM, DESCRIPTION)
    config = None
    if not argv[0].startswith("-"):
        file, state = read_state(argv[0])
        config = restore_config(state, str(file))
    print("\nFields of the run's config, as flags (give RUN before --help to see its values):")
    print_field_help(config, PROGRAM)
    return 0


def score_file(arguments: EvalArguments) -> int:
    """Scores a file of results and prints the numbers; with ``--out`` writes them too."""
    if arguments.run:
        raise ConfigError("pass a run, or --results and --annotations, not both")
    if not (arguments.results and arguments.annotations):
        raise ConfigError("--results and --annotations go together: pass both files")
    metrics = evaluate_results(arguments.annotations, arguments.results, iou_type=arguments.iou_type)
    Console(soft_wrap=True).print(metrics.table())
    if arguments.out:
        record = {"results": arguments.results, "annotations": arguments.annotations}
        write_json(Path(arguments.out), "metrics.json", {**record, **metrics.to_dict()})
    return 0


def open_split(config: Config, split: str, state: dict, file: Path) -> CocoDataset:
    """Opens a split and checks that its classes are those that the detector was trained for."""
    if not distributed.is_main():
        distributed.barrier()  # the main rank makes synthetic data first
    dataset = load_split(config.data, split)
    if distributed.is_main():
        distributed.barrier()
    trained = list(state["categories"])
    if dataset.categories != trained:
        differing = sorted(set(dataset.categories) ^ set(trained)) or ["their order"]
        raise DataError(
            f"{dataset.annotation_file} has {len(dataset.categories)} classes, {file} was trained for "
            f"{len(trained)}; they differ in {', '.join(differing[:5])}; use data with the same categories"
        )
    for line in dataset.report:
        say(f"{split}: {line}")
    return dataset


def run(
    predictor: Predictor, dataset: CocoDataset, config: Config, arguments: EvalArguments
) -> list[Evaluation]:
    """Runs the detector, once for each of its stages if these are asked for; the last is the whole."""
    if arguments.stages and not dataset.has_annotations:
        raise ConfigError(f"--stages scores by annotations, and the {arguments.split} split has none")

    def evaluation() -> Evaluation:
        with Countdown(f"eval {arguments.split}", silent=not distributed.is_main()) as progress:
            options = dict(
                device=predictor.device,
                batch_size=arguments.batch_size,
                amp=config.train.amp,
                progress=progress,
            )
            if dataset.has_annotations:
                return evaluate(predictor.model, dataset, config.data, **options)
            return None, detect(predictor.model, dataset, config.data, **options)

    return at_each_stage(predictor.model, evaluation) if arguments.stages else [evaluation()]


def write(folder: Path, split: str, record: dict, found: list[Evaluation]) -> None:
    """Prints the tables and writes the metrics and the COCO-format results."""
    metrics, results = found[-1]
    written = [write_json(folder, f"results_{split}.json", results)]
    if metrics is None:
        say(f"the {split} split has no annotations: results are written, but not scored")
    else:
        console = Console(soft_wrap=True)
        console.print(metrics.table())
        stages = {}
        if len(found) > 1:
            by_stage = [of_stage for of_stage, _ in found]
            console.print("", stages_table(by_stage))
            stages = {"stages": [of_stage.flat() for of_stage in by_stage]}
        content = {**record, **metrics.to_dict(), **stages}
        written.append(write_json(folder, f"metrics_{split}.json", content))
    say(f"written: {', '.join(map(str, written))}")


def out_folder(arguments: EvalArguments, checkpoint: Path) -> Path:
    """``--out``, or the folder ``eval`` in the run folder that the checkpoint belongs to."""
    if arguments.out:
        return Path(arguments.out)
    folder = checkpoint.parent
    return (folder.parent if folder.name == "checkpoints" else folder) / "eval"


def write_json(folder: Path, name: str, content: object) -> Path:
    """Writes a json file, making its folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(
            json.dumps(content, indent=1 if isinstance(content, dict) else None) + "\n"
        )
    except OSError as error:
        raise ConfigError(f"cannot write {folder / name}: {error.strerror}; pass another --out") from None
    return folder / name


def say(line: str) -> None:
    """Prints a line, on the main rank only."""
    if distributed.is_main():
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
