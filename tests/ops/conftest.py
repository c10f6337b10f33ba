"""Runs the tests of an operator on its backends, and makes boxes to test with.

A module that names its operator in ``OPERATOR`` gets each test with the arguments ``backend, device`` once
for every backend and device, and each with ``kernel, device`` once for native and Triton. What cannot run
here skips with the reason.
"""

import os
import subprocess
import sys

import pytest
import torch

from drcnn.ops import backend_status


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    operator = getattr(metafunc.module, "OPERATOR", None)
    for argument, names in (("backend", ("reference", "native", "triton")), ("kernel", ("native", "triton"))):
        if operator is not None and argument in metafunc.fixturenames:
            cases = [_case(operator, name, device) for name in names for device in ("cpu", "cuda")]
            metafunc.parametrize((argument, "device"), cases)


def _unavailable(operator: str, backend: str, device: str) -> str | None:
    """Why the backend cannot run the operator on the device, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    status = {(choice.op, choice.device_type): choice for choice in backend_status()}
    return status[operator, device].unavailable.get(backend)


def _case(operator: str, backend: str, device: str):
    reason = _unavailable(operator, backend, device)
    marks = [pytest.mark.skipif(reason is not None, reason=str(reason))]
    marks += [pytest.mark.triton] if backend == "triton" else []
    marks += [pytest.mark.gpu] if device == "cuda" else []
    return pytest.param(backend, device, id=f"{backend}-{device}", marks=marks)


@pytest.fixture
def native_on_cpu(request):
    """Skips, with the reason, where the module's ``OPERATOR`` has no native kernel for the CPU."""
    reason = _unavailable(request.module.OPERATOR, "native", "cpu")
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def random_boxes():
    """``random_boxes(*shape, size=100.0, seed=0)``: boxes [*shape, 4] of which many overlap."""

    def make(*shape: int, size: float = 100.0, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        corners = torch.rand(*shape, 2, generator=generator) * size
        sides = torch.rand(*shape, 2, generator=generator) * size * 0.6 + 1
        return torch.cat([corners, corners + sides], dim=-1)

    return make


@pytest.fixture
def nasty_boxes(random_boxes):
    """``nasty_boxes(count, seed=0)``: NaN, inf, negative sizes, points, duplicates, huge, tiny, usual."""
    nan, inf = float("nan"), float("inf")
    nasty = [
        [nan, 0, 10, 10],
        [0, 0, 10, nan],
        [nan] * 4,
        [0, 0, inf, inf],
        [-inf, -inf, inf, inf],
        [inf] * 4,
        [0, 0, inf, 10],
        [9, 9, 3, 3],
        [3, 9, 9, 3],
        [5, 5, 5, 5],
        [5, 0, 5, 9],
        [0, 0, 0, 0],
        [-20, -20, -5, -5],
        [0, 0, 1e20, 1e20],
        [0, 0, 1e-30, 1e-30],
        [-0.0, 0, 10, 10],
    ]

    def make(count: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        boxes = torch.cat([torch.tensor(nasty), random_boxes(max(count, 24), size=12.0, seed=seed).round()])
        return boxes[torch.randperm(len(boxes), generator=generator)[:count]]

    return make


@pytest.fixture
def assert_same_bits():
    """``assert_same_bits(backend, actual, expected)``: equal values, NaN in equal places, equal dtypes."""

    def check(backend: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        is_interpreted = backend == "triton" and actual.device.type == "cpu"
        # Triton's interpreter truncates to bfloat16 where a GPU rounds: one unit in the last place.
        tolerance = 2**-7 if is_interpreted and actual.dtype == torch.bfloat16 else 0
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0, equal_nan=True)

    return check


@pytest.fixture
def poisoned_memory(monkeypatch):
    """New memory is full of NaN or of the largest integer, so that an element that a kernel skips shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def thread_counts():
    """``thread_counts(function)``: the results of a function with 1, 2 and 3 threads."""
    before = torch.get_num_threads()

    def run(function):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(function())
        return results

    yield run
    torch.set_num_threads(before)


@pytest.fixture
def never_waits():
    """``never_waits(function)``: runs it on the GPU, where waiting for the device is an error."""

    def run(function):
        function()
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return run


@pytest.fixture
def in_the_interpreter():
    """``in_the_interpreter(file, *flags)``: runs a module's Triton tests in Triton's interpreter.

    More flags of pytest may select among them.

    Triton reads TRITON_INTERPRET when it is imported, hence the process of its own.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this run interprets Triton already")
    pytest.importorskip("triton", reason="triton is not installed")

    def run(file: str, *flags: str) -> None:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-m",
            "triton and not gpu",
            "-p",
            "no:cacheprovider",
        ]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        result = subprocess.run(
            [*command, *flags, file], env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
        assert " passed" in result.stdout

    return run
