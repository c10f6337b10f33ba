"""Which implementation serves an operator."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from drcnn.ops import BackendError, BackendWarning, backend, backend_status, smooth_l1, use_backend
from drcnn.ops.backend import BACKENDS, implementation, register, requested_backend, runs_on


@pytest.fixture
def echo(monkeypatch):
    """An operator with a reference and a Triton implementation, and tables that are put back."""
    monkeypatch.setattr(backend, "_implementations", dict(backend._implementations))
    monkeypatch.setattr(backend, "_resolved", {})
    register("echo", "reference")(lambda: "reference")
    register("echo", "triton")(lambda: "triton")
    return "echo"


@pytest.fixture
def auto(monkeypatch):
    """``auto``, whatever DRCNN_BACKEND says outside."""
    monkeypatch.setattr(backend._Request, "name", "auto")


def _available(monkeypatch, *names):
    """Makes exactly these backends run for operators that have them."""

    def why_not(op, name, device_type):
        if name not in backend._implementations[op]:
            return "no such kernel"
        return None if name in names else f"{name} is switched off"

    monkeypatch.setattr(backend, "_why_not", why_not)


def test_auto_on_cpu_takes_native_else_reference(echo, auto, monkeypatch):
    _available(monkeypatch, "reference", "triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert implementation(echo, "cpu")() == "reference"
    register(echo, "native")(lambda: "native")
    _available(monkeypatch, *BACKENDS)
    assert implementation(echo, "cpu")() == "native"


@pytest.mark.parametrize(
    ("names", "served_by"), [(("reference", "triton"), "triton"), (("reference",), "reference")]
)
def test_auto_on_cuda_warns_once_with_the_cause(echo, auto, monkeypatch, names, served_by):
    _available(monkeypatch, *names)
    with pytest.warns(BackendWarning, match="echo runs on CUDA .*native: no such kernel") as record:
        assert implementation(echo, "cuda")() == served_by
        assert implementation(echo, "cuda")() == served_by
    assert len(record) == 1


def test_auto_on_cuda_is_quiet_when_native_serves(echo, auto, monkeypatch):
    register(echo, "native")(lambda: "native")
    _available(monkeypatch, *BACKENDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert implementation(echo, "cuda")() == "native"


@pytest.mark.parametrize("name", ["native", "triton"])
def test_explicit_backend_that_cannot_run_says_why(echo, monkeypatch, name):
    _available(monkeypatch, "reference")
    cause = "no such kernel" if name == "native" else "triton is switched off"
    with use_backend(name), pytest.raises(BackendError, match=f"'{name}' cannot run echo on cpu: {cause}"):
        implementation(echo, "cpu")


def test_native_without_a_library_says_so(monkeypatch):
    monkeypatch.setattr(backend, "_resolved", {})
    monkeypatch.setattr(backend, "native_load_error", "drcnn._C was not built")
    with use_backend("native"), pytest.raises(BackendError, match=r"drcnn\._C was not built"):
        smooth_l1(torch.zeros(1, 4), torch.zeros(1, 4), 1.0)


def test_native_without_cuda_says_so(monkeypatch):
    monkeypatch.setattr(backend, "native_load_error", None)
    monkeypatch.setattr(backend, "native_build_info", lambda: {"cuda": "", "architectures": []})
    assert "built without CUDA" in backend._why_not("smooth_l1", "native", "cuda")


def test_native_without_code_for_the_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "not for cuda:0 of compute capability 7.5" in backend._why_no_image(["80-real", "90"])
    assert backend._why_no_image(["75-real"]) is None


def test_use_backend_nests_and_restores(auto):
    with use_backend("reference"):
        with pytest.raises(KeyError), use_backend("native"):
            assert requested_backend() == "native"
            raise KeyError
        assert requested_backend() == "reference"
    assert requested_backend() == "auto"


def test_unknown_names_are_refused(echo):
    with (
        pytest.raises(ValueError, match="one of auto, reference, native, triton, got 'cuda'"),
        use_backend("cuda"),
    ):
        pass
    with pytest.raises(ValueError, match="one of reference, native, triton"):
        register("echo", "auto")
    with pytest.raises(ValueError, match="echo already has a reference implementation"):
        register("echo", "reference")(lambda: None)
    with pytest.raises(ValueError, match="no operator is called 'ecko'"):
        backend._why_not("ecko", "reference", "cpu")


def _python(code, **environ):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environ, capture_output=True, text=True, check=False
    )


def test_environment_variable_chooses():
    code = "from drcnn.ops.backend import requested_backend; print(requested_backend())"
    assert _python(code, DRCNN_BACKEND="Reference").stdout.strip() == "reference"
    assert _python(code, DRCNN_BACKEND="").stdout.strip() == "auto"


def test_unknown_environment_variable_fails_at_the_first_operator():
    code = "import torch; from drcnn.ops import smooth_l1; smooth_l1(torch.ones(1, 4), torch.ones(1, 4), 1.0)"
    result = _python(code, DRCNN_BACKEND="fastest")
    assert result.returncode != 0
    assert "DRCNN_BACKEND must be one of auto, reference, native, triton" in result.stderr


def test_compiled_code_follows_use_backend(echo, monkeypatch):
    _available(monkeypatch, *BACKENDS)
    register("scale", "reference")(lambda x: x * 2)
    register("scale", "triton")(lambda x: x * 3)
    compiled = torch.compile(
        lambda x: implementation("scale", x.device.type)(x), fullgraph=True, backend="eager"
    )
    x = torch.ones(2)
    for name, factor in (("reference", 2), ("triton", 3), ("reference", 2)):
        with use_backend(name):
            assert compiled(x).tolist() == [factor, factor]


def test_status_covers_every_operator_and_device():
    status = backend_status()
    rows = {(choice.op, choice.device_type) for choice in status}
    assert {(op, device) for op in backend.registered_operators() for device in ("cpu", "cuda")} == rows
    for choice in status:
        assert choice.backend not in choice.unavailable
        assert all(choice.unavailable.values())


@pytest.mark.parametrize(
    ("architecture", "capability", "expected"),
    [
        ("80-real", (8, 0), True),
        ("80-real", (8, 6), True),
        ("86-real", (8, 0), False),
        ("80-real", (9, 0), False),
        ("80", (9, 0), True),
        ("90", (12, 0), True),
        ("90", (8, 9), False),
        ("80-virtual", (8, 0), True),
        ("90a-real", (9, 0), True),
        ("90a", (10, 0), False),
        ("100f-real", (10, 3), True),
        ("103f-real", (10, 0), False),
    ],
)
def test_which_code_runs_on_which_gpu(architecture, capability, expected):
    assert runs_on(architecture, *capability) is expected


@pytest.mark.skipif(backend.native_load_error is not None, reason="there is no native library")
def test_a_library_from_older_sources_is_named():
    assert backend.native_defines("smooth_l1_fwd", "smooth_l1_bwd")
    with pytest.warns(backend.BackendWarning, match="older sources and has no no_such_op; run `pip install"):
        assert not backend.native_defines("smooth_l1_fwd", "no_such_op")
