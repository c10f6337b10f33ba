"""``pytest bench/ --benchmark``: times each operator's implementations and prints one table.

A row is kept only when the implementation agrees with the reference on the very inputs that are timed. The
rows are printed with their speed-up over the eager reference, and appended to ``bench/results/<device>.csv``
(the folder in DRCNN_BENCH_RESULTS, if that is set). A row has up to 30 rounds, or DRCNN_BENCH_ROUNDS.
"""

import csv
import datetime
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from drcnn.ops import backend_status, use_backend

RESULTS = Path(os.environ.get("DRCNN_BENCH_RESULTS") or Path(__file__).parent / "results")
ROUNDS = int(os.environ.get("DRCNN_BENCH_ROUNDS") or 30)
SECONDS_PER_ROW = 3.0
SECONDS_PER_ROUND = 2e-3

COLUMNS = (
    "date",
    "commit",
    "device",
    "threads",
    "torch",
    "op",
    "case",
    "implementation",
    "median_us",
    "p20_us",
    "p80_us",
    "speedup",
    "gbytes",
    "copy_share",
)


@dataclass(frozen=True)
class Row:
    """One timed implementation; times in seconds, data in bytes, bandwidth in bytes per second."""

    device: str
    op: str
    case: str
    implementation: str
    median: float
    p20: float
    p80: float
    data: int
    bandwidth: float

    @property
    def copy_share(self) -> float:
        return self.data / self.median / self.bandwidth


class Report:
    """The rows of this run."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.refused: list[str] = []

    def speedup(self, row: Row) -> float | None:
        for other in self.rows:
            same = (other.device, other.op, other.case) == (row.device, row.op, row.case)
            if same and other.implementation == "reference":
                return other.median / row.median
        return None


_report = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark", action="store_true", help="run the benchmarks in bench/ and print a table"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_report] = Report()
    config.option.benchmark_quiet = (
        True  # our table has what pytest-benchmark's has not: speed-up and bandwidth
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--benchmark"):
        for item in items:
            item.add_marker(pytest.mark.skip(reason="benchmarks run with --benchmark"))


@pytest.fixture(scope="session")
def copy_bandwidth() -> Callable[[str], float]:
    """Bytes per second that a copy on a device reads and writes; measured once per device."""
    measured: dict[str, float] = {}

    def bandwidth(device: str) -> float:
        if device not in measured:
            source = torch.rand((64 if device == "cpu" else 512) * 2**18, device=device)  # 64 or 512 MiB
            target = torch.empty_like(source)
            times = []
            for _ in range(10):
                _synchronize(device)
                start = time.perf_counter()
                target.copy_(source)
                _synchronize(device)
                times.append(time.perf_counter() - start)
            measured[device] = 2 * source.nbytes / statistics.median(times)
        return measured[device]

    return bandwidth


@pytest.fixture
def add_row(copy_bandwidth, request):
    """Adds a row of times, in seconds, that a benchmark took itself.

    ``add_row(op, case, implementation, device, times, nbytes)``, with ``nbytes`` as for ``compare``.
    """
    report = request.config.stash[_report]

    def add(
        op: str, case: str, implementation: str, device: str, times: Sequence[float], nbytes: int
    ) -> None:
        times = sorted(times)
        p20, p80 = (times[round(q * (len(times) - 1))] for q in (0.2, 0.8))
        row = Row(
            device=device_name(device),
            op=op,
            case=case,
            implementation=implementation,
            median=statistics.median(times),
            p20=p20,
            p80=p80,
            data=nbytes,
            bandwidth=copy_bandwidth(device),
        )
        report.rows.append(row)

    return add


@pytest.fixture
def compare(benchmark, add_row, request):
    """Times one implementation after checking that it agrees with the reference.

    ``compare(op, case, implementation, device, function, reference, nbytes)``: both functions take nothing
    and return tensors; ``nbytes`` is what the operation must at least read and write.
    """
    report = request.config.stash[_report]

    def run(
        op: str,
        case: str,
        implementation: str,
        device: str,
        function: Callable[[], Sequence[Tensor]],
        reference: Callable[[], Sequence[Tensor]],
        nbytes: int,
    ) -> None:
        try:
            torch.testing.assert_close(list(function()), list(reference()))
        except AssertionError as error:
            report.refused.append(f"{op}, {case}, {implementation} on {device}")
            pytest.fail(
                f"{implementation} differs from the reference and is not timed: {error}", pytrace=False
            )
        repeats = _repeats(function, device)
        seconds = _time(function, device, repeats)
        rounds = min(ROUNDS, max(5, int(SECONDS_PER_ROW / max(seconds * repeats, 1e-9))))
        benchmark.group = f"{op} {case} {device}"
        warm_up = min(2, ROUNDS // 2)
        benchmark.pedantic(lambda: _time(function, device, repeats), rounds=rounds, warmup_rounds=warm_up)
        times = [t / repeats for t in benchmark.stats.stats.sorted_data]
        add_row(op, case, implementation, device, times, nbytes)

    return run


@pytest.fixture
def run_as():
    """``run_as(op, implementation, device, function)``: the function, run by that implementation of ``op``.

    ``implementation`` is a backend, or ``compile`` for torch.compile of the reference. What cannot run here
    skips with the reason.
    """

    def choose(
        op: str, implementation: str, device: str, function: Callable[..., Sequence[Tensor]]
    ) -> Callable[..., Sequence[Tensor]]:
        backend = "reference" if implementation == "compile" else implementation
        status = {(choice.op, choice.device_type): choice for choice in backend_status()}[op, device]
        if backend in status.unavailable:
            pytest.skip(status.unavailable[backend])
        if implementation == "triton" and device == "cpu":
            pytest.skip("Triton's interpreter is no benchmark")
        if implementation == "compile":
            torch.compiler.reset()
            function = torch.compile(function, fullgraph=True, dynamic=False)

        def run(*args: object) -> Sequence[Tensor]:
            with use_backend(backend):
                return function(*args)

        return run

    return choose


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _time(function: Callable[[], object], device: str, repeats: int) -> float:
    """Seconds per call; on a GPU the launches of one round are queued and waited for together."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def _repeats(function: Callable[[], object], device: str) -> int:
    for _ in range(3):
        function()
    return max(1, int(SECONDS_PER_ROUND / max(_time(function, device, 3), 1e-9)))


def device_name(device: str) -> str:
    """The name of the GPU, or of the CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.is_file() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is timed, with ``+`` when files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    report = config.stash[_report]
    if report.rows:
        terminalreporter.section("benchmarks")
        for line in table(report):
            terminalreporter.write_line(line)
        for path in append(report):
            terminalreporter.write_line(f"appended to {path}")
    for line in report.refused:
        terminalreporter.write_line(f"REFUSED, differs from the reference: {line}", red=True)


def table(report: Report) -> list[str]:
    """The rows as lines of text, grouped by device, operator and case."""
    lines = [f"commit {commit()}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads"]
    titles = "".join(f"{title:>12}" for title in ("median", "p20", "p80"))
    header = f"{'implementation':<16}{titles}{'speed-up':>10}{'GB moved':>10}{'of copy':>9}"
    group = None
    groups = list(dict.fromkeys((row.device, row.op, row.case) for row in report.rows))
    for row in sorted(report.rows, key=lambda row: groups.index((row.device, row.op, row.case))):
        if (row.device, row.op, row.case) != group:
            group = (row.device, row.op, row.case)
            copy = f"copies {row.bandwidth / 1e9:.0f} GB/s"
            lines += ["", f"{row.op}, {row.case}, on {row.device} ({copy})", header]
        speedup = report.speedup(row)
        times = "".join(f"{_microseconds(t):>12}" for t in (row.median, row.p20, row.p80))
        faster = f"{speedup:.2f}x" if speedup else "-"
        lines.append(
            f"{row.implementation:<16}{times}{faster:>10}{row.data / 1e9:>10.4f}{row.copy_share:>9.1%}"
        )
    return lines


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"


def append(report: Report) -> list[Path]:
    """Appends the rows to the file of each device and returns the files."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
    shared = (now, commit())
    paths = []
    for device in dict.fromkeys(row.device for row in report.rows):
        path = RESULTS / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".csv")
        is_new = not path.exists()
        RESULTS.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if is_new:
                writer.writerow(COLUMNS)
            for row in report.rows:
                if row.device == device:
                    writer.writerow([*shared, *_cells(report, row)])
        paths.append(path)
    return paths


def _cells(report: Report, row: Row) -> list[object]:
    speedup = report.speedup(row)
    return [
        row.device,
        torch.get_num_threads(),
        torch.__version__,
        row.op,
        row.case,
        row.implementation,
        *(f"{seconds * 1e6:.2f}" for seconds in (row.median, row.p20, row.p80)),
        f"{speedup:.3f}" if speedup else "",
        f"{row.data / 1e9:.6f}",
        f"{row.copy_share:.4f}",
    ]
