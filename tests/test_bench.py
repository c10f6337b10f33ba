"""``pytest bench/ --benchmark``: the table, the CSV file, and the refusal to report wrong results."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BENCH = """
import pytest
import torch

@pytest.mark.parametrize("name", ["reference", "right", "wrong"])
def test_double(compare, name):
    x = torch.arange(1000.0)
    functions = {"reference": lambda: [x * 2], "right": lambda: [x + x], "wrong": lambda: [x * 2.001]}
    compare("double", "1000", name, "cpu", functions[name], functions["reference"], nbytes=2 * x.nbytes)
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """A run of three implementations, one of which is wrong."""
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    folder = tmp_path_factory.mktemp("bench")
    shutil.copy(ROOT / "bench" / "conftest.py", folder)
    (folder / "bench_double.py").write_text(BENCH)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench_double.py",
        "--benchmark",
        "-o",
        "python_files=bench_*.py",
    ]
    # pytest-benchmark does not measure in the workers of pytest-xdist, and this is a run of its own.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    result = subprocess.run(
        command,
        cwd=folder,
        env=environment | {"DRCNN_BENCH_RESULTS": str(folder / "results")},
        capture_output=True,
        text=True,
        check=False,
    )
    return result, folder


def test_wrong_results_are_refused(outcome):
    result, folder = outcome
    assert result.returncode == 1
    assert "REFUSED, differs from the reference: double, 1000, wrong on cpu" in result.stdout
    assert "wrong differs from the reference and is not timed" in result.stdout
    assert "wrong" not in "".join(path.read_text() for path in (folder / "results").glob("*.csv"))


def test_rows_are_printed_and_appended(outcome):
    result, folder = outcome
    assert "speed-up" in result.stdout and "1.00x" in result.stdout
    (path,) = (folder / "results").glob("*.csv")
    rows = list(csv.DictReader(path.open()))
    assert [row["implementation"] for row in rows] == ["reference", "right"]
    for row in rows:
        assert 0 < float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"])
        assert row["commit"] and row["device"] and float(row["gbytes"]) == 8e-6
    assert float(rows[0]["speedup"]) == 1


def test_without_the_flag_they_skip_with_a_reason(outcome):
    _, folder = outcome
    command = [sys.executable, "-m", "pytest", "-rs", "bench_double.py", "-o", "python_files=bench_*.py"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert "3 skipped" in result.stdout and "benchmarks run with --benchmark" in result.stdout
