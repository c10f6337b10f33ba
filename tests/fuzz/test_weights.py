"""Damaged checkpoints and weights: each is loaded with finite values, or refused in one line."""

import argparse
import io
import pickle
import warnings
import zipfile
from collections import OrderedDict
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from drcnn import presets
from drcnn.config import Config, to_dict
from drcnn.data import DataConfig, SplitConfig
from drcnn.engine.checkpoint import load_checkpoint
from drcnn.loading import read_state, restore_config
from drcnn.models import FCOSConfig, FPNConfig, ResNetConfig, RetinaNetConfig
from drcnn.weights import load_weights, recognise, unwrap

PIECES = (
    b"\0",
    b"\x80\x02}",
    b".",
    b"R",
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"{",
)


class Net(nn.Module):
    """A model of a few hundred parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Linear(4, 5)


def plain_config() -> dict:
    split = SplitConfig("images", "annotations.json")
    return to_dict(Config(presets.light_faster_rcnn(2), DataConfig("data", split, split)))


def checkpoint(tensors: dict) -> dict:
    return {
        "format": 1,
        "drcnn_version": "0.1.0",
        "step": 7,
        "model": tensors,
        "ema": None,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "rng": {"seed": 0},
        "config": plain_config(),
        "categories": ["a", "b"],
        "category_ids": [1, 7],
    }


def saved(content: object, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def members(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def splice(data: bytes, other: bytes, random: Random, damage) -> bytes:
    """A zip file with members changed, left out, doubled, renamed, or taken from another file."""
    parts = members(data)
    for _ in range(random.choice((1, 2, 3))):
        at = random.randrange(len(parts))
        name, content = parts[at]
        kind = random.randrange(6)
        if kind == 0:
            parts[at] = (name, damage(random).bytes(content, PIECES))
        elif kind == 1 and len(parts) > 1:
            del parts[at]
        elif kind == 2:
            parts.append((name, content[::-1]))
        elif kind == 3:
            parts[at] = (name + random.choice(("x", "/", "\\..\\x", "/../../x")), content)
        elif kind == 4:
            parts[at] = (name, random.choice(members(other))[1])
        else:
            parts[at] = (name, parts[random.randrange(len(parts))][1])
    file = io.BytesIO()
    packing = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(file, "w", packing) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names that occur twice
        for name, content in parts:
            archive.writestr(name, content)
    return file.getvalue()


def files() -> dict[str, bytes]:
    """The same model in every format that is read."""
    tensors = Net().state_dict()
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    meta = argparse.Namespace(lr=np.float64(0.1))
    stored = {"format": "pt", "drcnn": str(plain_config()).replace("'", '"')}
    return {
        "checkpoint": saved(checkpoint(tensors)),
        "zip": saved({"state_dict": OrderedDict(tensors), "meta": meta}),
        "legacy": saved({"model": tensors, "meta": meta}, _use_new_zipfile_serialization=False),
        "pickle": pickle.dumps({"model": arrays, "__author__": "x"}),
        "safetensors": to_safetensors(tensors, stored),
    }


def assert_finite(model: nn.Module) -> None:
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values() if t.is_floating_point())


@pytest.mark.parametrize("part", range(3))
def test_files(fuzz, damage, tmp_path, part):
    """All that reads a file of weights: as weights, as a detector, as the checkpoint of a run."""
    originals = files()
    path = tmp_path / "weights.pth"

    def case(random: Random) -> None:
        kind, other = random.choice(list(originals)), random.choice(("checkpoint", "zip"))
        data = originals[kind]
        if kind in ("checkpoint", "zip") and random.random() < 0.5:
            data = splice(data, originals[other], random, damage)
        else:
            data = damage(random).bytes(data, PIECES)
        path.write_bytes(data)
        reader = random.randrange(3)
        if reader == 0:
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # torch's, on its way to an error
            load_checkpoint(path)
        elif reader == 1:
            _, state = read_state(path)
            config = restore_config(state, str(path))
            assert isinstance(config, Config)
        else:
            model = Net()
            load_weights(model, path)
            assert_finite(model)

    fuzz(f"weights{part}", 400, case)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["weights.pth"]


def test_stored_configs(fuzz, damage):
    """Configs in a checkpoint, of which nothing may be run and which may name nothing but configs."""
    plain = plain_config()

    def case(random: Random) -> None:
        state = {"config": damage(random).tree(plain)}
        restore_config(state, "x.pt")

    fuzz("config", 300, case)


def test_tensors_of_detectors(fuzz):
    """Names and shapes of whole detectors with some missing, renamed or of another shape or kind."""
    backbone, pyramid = ResNetConfig("resnet18", norm="gn"), FPNConfig(32, first_level=3, top="convs_on_p5")
    configs = (
        presets.light_faster_rcnn(2),
        RetinaNetConfig(2, backbone, pyramid),
        FCOSConfig(2, backbone, pyramid),
    )
    states = []
    for config in configs:
        with torch.device("meta"):
            shapes = {name: t.shape for name, t in config.build().state_dict().items()}
        # One number in memory for each tensor: only names and shapes count here.
        states.append({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()})

    def case(random: Random) -> None:
        tensors = dict(random.choice(states))
        for _ in range(random.choice((1, 1, 3, 20))):
            name = random.choice([n for n in tensors if "backbone" not in n] or list(tensors))
            tensor = tensors[name]
            kind = random.randrange(6)
            if kind == 0:
                del tensors[name]
            elif kind == 1:
                tensors[random.choice(("module.", "x", "neck.", "roi_head.")) + name] = tensors.pop(name)
            elif kind == 2:
                tensors[name] = tensor.new_zeros(
                    random.choice(((), (0,), (0, 1), (3,), (1, 2, 3, 4), (7, 7)))
                )
            elif kind == 3:
                dtype = random.choice((torch.int64, torch.float16, torch.complex64))
                tensors[name] = torch.zeros((), dtype=dtype).expand(tensor.shape)
            elif kind == 4:
                tensors[name] = random.choice(list(tensors.values()))
            else:
                tensors[name] = torch.zeros(3).to_sparse()
        recognise(unwrap(tensors, "x.pth"))

    fuzz("detector", 300, case)
