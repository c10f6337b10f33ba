"""No file runs code: what trainers leave beside weights is passed over, the rest is refused by name."""

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import subprocess
import sys
import tarfile
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from drcnn.errors import WeightsError
from drcnn.weights import read_content, read_weights

SAVERS = {
    "zip": lambda content, path: torch.save(content, path),
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
}


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def tensors() -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.arange(12.0).view(3, 4), "layer.bias": torch.arange(3)}


def arrays(kind: str) -> dict:
    """The same, as arrays in plain pickles, as Detectron2's model zoo has them."""
    return {name: t.numpy() if kind == "pickle" else t for name, t in tensors().items()}


def assert_tensors(weights) -> None:
    for name, tensor in tensors().items():
        assert torch.equal(weights.tensors[name], tensor)


@pytest.mark.parametrize("kind", SAVERS)
@pytest.mark.parametrize("depth", ["alone", "beside known objects"])
@pytest.mark.parametrize("gadget", ["open", "os.mkdir", "exec", "eval", "getattr", "subprocess"])
def test_a_pickle_that_would_make_a_file_is_refused(kind, depth, gadget, tmp_path):
    made, path = tmp_path / "made", tmp_path / "weights.pth"
    code = f"open({str(made)!r}, 'w')"
    evil = {
        "open": Calls(open, str(made), "w"),
        "os.mkdir": Calls(os.mkdir, str(made)),
        "exec": Calls(exec, code),
        "eval": Calls(eval, code),
        "getattr": Calls(Calls(getattr, Calls(__import__, "os"), "mkdir"), str(made)),
        "subprocess": Calls(subprocess.check_call, ["touch", str(made)]),
    }[gadget]
    if gadget == "getattr":
        evil = Calls(getattr, tmp_path, "mkdir")
    content = {"model": arrays(kind), "extra": evil}
    if depth != "alone":
        content["meta"] = argparse.Namespace(a=1)
    SAVERS[kind](content, path)
    with pytest.raises(WeightsError) as caught:
        read_weights(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and len(text) < 400
    assert "is refused: it" in text and "when it is loaded" in text
    assert not made.exists()
    names = {"open": "io.open", "os.mkdir": "mkdir", "subprocess": "check_call", "getattr": "attr"}
    assert names.get(gadget, f"builtins.{gadget}") in text


def fake_module(monkeypatch, name: str, **members) -> None:
    """Makes a package importable while a file is written; it is gone when the file is read."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:i]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for member, value in members.items():
        value.__module__ = name
        setattr(module, member, value)


@pytest.mark.parametrize("kind", SAVERS)
def test_objects_of_trainers_are_passed_over(kind, tmp_path):
    class ConfigDict(dict):
        pass

    class HistoryBuffer:
        def mean(self):
            pass

    HistoryBuffer.__qualname__, ConfigDict.__qualname__ = "HistoryBuffer", "ConfigDict"
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    HistoryBuffer.mean.__module__ = "mmengine.logging.history_buffer"
    buffer = HistoryBuffer()
    buffer.history = np.arange(5.0)
    buffer.statistics = collections.OrderedDict(mean=HistoryBuffer.mean)
    beside = {
        "meta": {
            "cfg": ConfigDict(a=1),
            "lr": np.float64(0.02),
            "seed": np.int64(3),
            "time": datetime.datetime(2020, 1, 2),
        },
        "message_hub": {"log_scalars": {"loss": buffer}, "path": pathlib.PurePosixPath("/x/y")},
        "counts": collections.Counter("ab"),
        "queue": collections.deque([1, 2]),
        "default": collections.defaultdict(list, a=[1]),
        "arguments": argparse.Namespace(a=1),
    }
    path = tmp_path / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        fake_module(patch, "mmengine.config.config", ConfigDict=ConfigDict)
        fake_module(patch, "mmengine.logging.history_buffer", HistoryBuffer=HistoryBuffer)
        SAVERS[kind]({"state_dict": arrays(kind), **beside}, path)
    assert "mmengine.logging.history_buffer" not in sys.modules
    weights = read_weights(path)
    assert_tensors(weights)
    assert weights.extra["meta"]["lr"] == 0.02 and weights.extra["meta"]["seed"] == 3
    assert weights.extra["counts"] == {"a": 1, "b": 1} and weights.extra["queue"] == [1, 2]
    assert type(weights.extra["arguments"]).__name__ == "Inert" and not vars(weights.extra["arguments"])


def test_arrays_of_every_kind_come_back(tmp_path):
    content = {
        "f4": np.arange(6, dtype="f4").reshape(2, 3),
        "f8 in other order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big endian": np.arange(4, dtype=">i4"),
        "f2": np.float16([1, 2]),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 4), "f4"),
        "scalar": np.float32(3),
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"{protocol}.pkl"
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        read = read_content(path)
        for name, array in content.items():
            np.testing.assert_array_equal(read[name], array)


def test_arrays_of_objects_are_no_tensors(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": np.array([{}, None], dtype=object)}}))
    with pytest.raises(WeightsError, match=r"holds an array that is no tensor"):
        read_weights(path)


def test_what_torch_would_unpack_or_run_is_refused(tmp_path):
    program, archive = tmp_path / "program.pt", tmp_path / "archive.pth"
    torch.jit.script(torch.nn.Linear(1, 1)).save(program)
    with pytest.raises(WeightsError, match="TorchScript program"):
        read_content(program)
    with tarfile.open(archive, "w") as file:
        file.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    with pytest.raises(WeightsError, match="tar archive"):
        read_content(archive)


def test_the_end_of_a_name_does_not_count(tmp_path):
    for kind, save in SAVERS.items():
        save(arrays(kind), tmp_path / "x.safetensors")
        assert_tensors(read_weights(tmp_path / "x.safetensors"))
    save_file(tensors(), tmp_path / "x.pkl")
    assert_tensors(read_weights(tmp_path / "x.pkl"))


@pytest.mark.parametrize("kind", [*SAVERS, "safetensors"])
def test_damaged_files_end_in_one_line(kind, tmp_path):
    """Two hundred truncations and changed bytes, each read or refused in one line."""
    path, good = tmp_path / "bad.pth", tmp_path / "good.pth"
    if kind == "safetensors":
        save_file(tensors(), good)
    else:
        SAVERS[kind]({"model": arrays(kind), "meta": argparse.Namespace(a=np.float64(1))}, good)
    data = good.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for i in range(200):
        if i % 4 == 0:
            damaged = data[: random.integers(len(data))]
        else:
            damaged = bytearray(data)
            for place in random.integers(len(data), size=1 + i % 8):
                damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        try:
            read_weights(path)
        except WeightsError as error:
            text = str(error)
            assert str(path) in text and "\n" not in text and len(text) < 400
            refused += 1
    assert refused >= 50
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pth", "good.pth"]
