"""Trains several configs with several seeds and tabulates what they reach.

    python bench/study.py configs/bccd_baseline.py configs/bccd_dst.py --seeds 0 1 --jobs 2 \
        --csv bench/results/scale_bccd.csv --data.root ../shared/data/bccd --optim.iterations 300

Runs go to ``--runs``, one folder for each config and seed. A finished run is not repeated and a broken one
continues, so the command can be given again. The numbers are of the test split, or of val if there is none.
Other flags set fields of all configs.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from conftest import commit, device_name

NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
EVERY_STEP = ("scale_collage",)
LAST = ("positives_per_gt_0", "positives_per_gt_5")
"""Values of metrics.jsonl that are averaged over the last quarter of a run's records."""


def main() -> None:
    """Trains what is missing, writes the CSV file and prints a table in markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("configs", nargs="+", help="files in configs/")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="seeds of each config")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--csv", type=Path, required=True, help="file to write, a row for each run")
    arguments, flags = parser.parse_known_args()
    tasks = [(Path(file), seed) for seed in arguments.seeds for file in arguments.configs]
    start, rows = time.monotonic(), {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        waiting = {pool.submit(train, *task, arguments, flags): task for task in tasks}
        for done in as_completed(waiting):
            rows[waiting[done]] = row = done.result()
            hours = (time.monotonic() - start) / 3600
            left = hours / len(rows) * (len(tasks) - len(rows))
            print(f"{len(rows)}/{len(tasks)}  {row['config']} seed {row['seed']}: AP {row['AP']:.3f}", end="")
            print(f"  {60 * hours:.0f} min, about {60 * left:.0f} min left", flush=True)
    ordered = [rows[task] for task in tasks]
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in ordered for key in row)))
        writer.writeheader()
        writer.writerows(ordered)
    print(table(ordered))


def train(config: Path, seed: int, arguments: argparse.Namespace, flags: list[str]) -> dict:
    """Trains one config with one seed, unless that was done before, and returns its row."""
    run = arguments.runs / f"{config.stem}_seed{seed}"
    if not (run / "metrics_val.json").is_file():
        command = [sys.executable, "-m", "drcnn.train", str(config), "--out", str(run)]
        command += ["--train.seed", str(seed), "--train.threads", str(arguments.threads), *flags]
        command += ["--resume"] if (run / "checkpoints" / "last.pt").is_file() else ["--overwrite"]
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
        run.parent.mkdir(parents=True, exist_ok=True)
        where = {"device": device_name("cpu"), "torch": torch.__version__, "commit": commit()}
        with run.with_suffix(".out").open("w") as output:
            code = subprocess.run(command, stdout=output, stderr=output, env=environment).returncode
        if code:
            sys.exit(f"{run} ended with exit code {code}; see {run.with_suffix('.out')}")
        run.with_suffix(".json").write_text(json.dumps(where))
    row = read_run(run) | {"config": config.stem, "seed": seed, "flags": " ".join(flags)}
    return row | json.loads(run.with_suffix(".json").read_text())


def read_run(run: Path) -> dict:
    """Reads the numbers of a finished run."""
    files = [run / f"metrics_{split}.json" for split in ("test", "val")]
    metrics = json.loads(next(file for file in files if file.is_file()).read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "split" not in record]
    found = {"config": "", "seed": 0, "split": metrics["split"], "best_step": metrics["step"]}
    found |= {name: round(metrics["summary"][name], 4) for name in NUMBERS}
    for name in EVERY_STEP:
        if name in steps[-1]:
            found[name] = round(statistics.mean(v for record in steps for v in record[name]), 4)
    for name in LAST:
        if name in steps[-1]:
            late = steps[-max(1, len(steps) // 4) :]
            found[name] = round(statistics.mean(record[name] for record in late), 3)
    found["iterations"] = steps[-1]["step"]
    found["seconds_per_iteration"] = round(statistics.median(r["time_per_step"] for r in steps), 3)
    return found


def table(rows: list[dict]) -> str:
    """Writes a table in markdown: the mean over the seeds, and half of their range."""
    names = [*NUMBERS, *EVERY_STEP, *LAST, "seconds_per_iteration"]
    names = [name for name in names if any(name in row for row in rows)]
    lines = ["| config | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for config in dict.fromkeys(row["config"] for row in rows):
        cells = []
        for name in names:
            values = [row[name] for row in rows if row["config"] == config and name in row]
            spread = (
                f" ± {(max(values) - min(values)) / 2:.3f}" if name in NUMBERS and len(values) > 1 else ""
            )
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        lines.append(f"| `{config}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
