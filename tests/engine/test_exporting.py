"""What is exported finds what the detector finds: torch.export, AOTInductor, ONNX through onnxruntime."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from drcnn import presets, sparse_presets
from drcnn.data import load_image
from drcnn.engine.exporting import (
    ExportedDetector,
    ExportInfo,
    least_side,
    load_package,
    load_program,
    needs,
    save_package,
    save_program,
    trace,
)
from drcnn.engine.exporting_check import Agreement, check, compare
from drcnn.errors import ConfigError, WeightsError
from drcnn.ops import nms, roi_align, soft_nms, use_backend
from drcnn.ops.backend import native_build_info
from drcnn.structures import Detections, ImageBatch

DETECTORS = {
    "faster": lambda: presets.light_faster_rcnn(3),
    "dynamic": lambda: presets.dynamic(presets.light_faster_rcnn(3)),
    "mask": lambda: presets.light_mask_rcnn(3),
    "retinanet": lambda: presets.light_retinanet(3),
    "fcos": lambda: presets.light_fcos(3),
    "sparse": lambda: _few_stages(sparse_presets.light_sparse_rcnn(3, proposals=60)),
}


def _few_stages(config):
    return replace(config, head=replace(config.head, stages=2))


@pytest.fixture(scope="module", params=DETECTORS)
def traced(request):
    """A light detector with random weights, whose scores spread over the whole range, and its program."""
    torch.manual_seed(0)
    model = DETECTORS[request.param]().build().eval()
    for name, layer in model.named_modules():
        if name.endswith(("classifier", "objectness", "mask_head.logits")):
            layer.weight.data *= 30
    with use_backend("reference"):
        return model, trace(model)


@pytest.fixture
def photos(tiny_coco):
    files = sorted((tiny_coco / "images" / "val").iterdir())[:3]
    return [load_image(file) for file in files]


@pytest.fixture
def sizes(tiny_data):
    """Resizes so that the network sees two sizes, 192 to 288 px and half of that."""
    return replace(tiny_data, test_short_side=192, test_max_size=288)


def info_of(model, data):
    return ExportInfo.of(model, data, ("a", "b", "c"), (1, 2, 90))


def assert_same(agreement, least):
    assert agreement.detections >= least, agreement
    assert agreement.unmatched == 0, agreement
    assert agreement.boxes <= 0.05 and agreement.scores <= 1e-3 and agreement.masks <= 1e-3, agreement
    assert agreement.holds


def test_a_program_finds_the_same(traced, photos, sizes):
    detector, program = traced
    exported = ExportedDetector(program.module().__call__)
    assert_same(check(detector, exported, photos, sizes, least_side(detector)), least=12 * 10)


def test_onnx_finds_the_same(traced, photos, sizes, tmp_path):
    exporting, running = onnx_modules()
    detector, program = traced
    file, info = tmp_path / "detector.onnx", info_of(detector, sizes)
    exporting.save_onnx(program, file, info)
    exported, found = running.load_onnx(file, "cpu")
    assert found == info
    assert_same(check(detector, exported, photos, sizes, least_side(detector)), least=12 * 10)
    small = ImageBatch(torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8), torch.tensor([[32, 60]]))
    with torch.no_grad():  # a program of torch has a least size, ONNX has none
        assert compare(detector(small), exported(small)).holds


def onnx_modules():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"needs {name}, which the extra `export` installs")
    from drcnn.engine import exporting_onnx, onnx_detector

    return exporting_onnx, onnx_detector


def test_the_data_config_comes_back(tiny_data):
    model = DETECTORS["fcos"]().build()
    info = info_of(model, tiny_data)
    assert ExportInfo.from_json(info.to_json(), "f") == info
    data = info.data_config()
    for field in ("test_short_side", "test_max_size", "pad_multiple", "pad_step"):
        assert getattr(data, field) == getattr(tiny_data, field)
    assert info.least_side == 160 and info.category_ids == (1, 2, 90)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"categories": 1}', '{"categories": [], "x": 1}'])
def test_metadata_of_others_are_refused(text):
    with pytest.raises(ConfigError, match=r"f\.onnx does not say how images are resized"):
        ExportInfo.from_json(text, "f.onnx")


def test_a_program_runs_without_drcnn(photos, sizes, tmp_path):
    if native_build_info() is None:
        pytest.skip("needs the native operators")
    torch.manual_seed(0)
    model = DETECTORS["faster"]().build().eval()
    program = trace(model)
    library = native_build_info()["library"]
    assert needs(program) == [f"torch.ops.load_library({library.rpartition('/')[2]!r})"]
    save_program(program, tmp_path / "detector.pt2", info_of(model, sizes))
    images = torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8)
    inputs = images, torch.tensor([[90, 128]])
    with torch.no_grad():
        expected = model(ImageBatch(*inputs))
    torch.save({"inputs": inputs, "boxes": expected.boxes}, tmp_path / "expected.pt")
    script = """
import json, sys, torch
folder, library = sys.argv[1:]
sys.modules["drcnn"] = None
torch.ops.load_library(library)
extra = {"drcnn": ""}
program = torch.export.load(f"{folder}/detector.pt2", extra_files=extra).module()
expected = torch.load(f"{folder}/expected.pt")
found = program(*expected["inputs"])
difference = (found["boxes"] - expected["boxes"]).abs().max()
assert difference < 1e-3, difference  # other threads add up in another order
print(json.loads(extra["drcnn"])["categories"])
"""
    command = [sys.executable, "-c", script, str(tmp_path), library]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['a', 'b', 'c']"


class Nms(nn.Module):
    def forward(self, boxes, scores, groups, valid):
        return nms(boxes, scores, groups, 0.5, 40, valid)


class Pool(nn.Module):
    def __init__(self, ratio, aligned):
        super().__init__()
        self.ratio, self.aligned = ratio, aligned

    def forward(self, fine, coarse, boxes):
        return roi_align([fine, coarse], boxes, (8, 16), 3, self.ratio, self.aligned)


def through_onnx(module, inputs):
    """What onnxruntime makes of a module of one operator."""
    exporting, _ = onnx_modules()
    import onnxruntime

    with use_backend("reference"):
        program = torch.export.export(module, inputs)
    session = onnxruntime.InferenceSession(exporting.translate(program).model_proto.SerializeToString())
    names = [value.name for value in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


def test_nms_in_onnx():
    corner = torch.rand(3, 200, 2) * 60
    boxes = torch.cat([corner, corner + 5 + torch.rand(3, 200, 2) * 40], dim=-1)
    boxes[:, 20:40] = boxes[:, :20]
    scores = torch.randint(-9, 9, (3, 200)) / 9  # many ties, and negative as logits are
    groups = torch.randint(0, 4, (3, 200))
    valid = torch.rand(3, 200) < 0.8
    valid[2, 3:] = False  # fewer boxes than slots
    valid[1] = groups[1] == 2
    expected = Nms()(boxes, scores, groups, valid)
    index, found = through_onnx(Nms(), (boxes, scores, groups, valid))
    assert expected.valid.sum() > 50 and not expected.valid.all()
    assert torch.equal(found, expected.valid) and torch.equal(index, expected.index)


@pytest.mark.parametrize("ratio, aligned", [(0, True), (2, True), (0, False), (2, False)])
def test_roi_align_in_onnx(ratio, aligned):
    fine, coarse = torch.randn(2, 5, 30, 40), torch.randn(2, 5, 15, 20)
    corner = torch.rand(2, 50, 2) * 250 - 20
    boxes = torch.cat([corner, corner + torch.rand(2, 50, 2) ** 2 * 400], dim=-1)
    boxes[:, 0] = 0
    boxes[:, 1, 2:] = boxes[:, 1, :2]
    boxes[0, 2] = torch.nan
    expected = Pool(ratio, aligned)(fine, coarse, boxes)
    (found,) = through_onnx(Pool(ratio, aligned), (fine, coarse, boxes))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not expected[0, 2].any() and expected.any()


class SoftNms(nn.Module):
    def forward(self, boxes, scores, groups):
        return soft_nms(boxes, scores, groups, 0.5, 40)


def test_soft_nms_has_no_onnx(tmp_path, tiny_data):
    exporting, _ = onnx_modules()
    inputs = torch.rand(1, 9, 4), torch.rand(1, 9), torch.zeros(1, 9, dtype=torch.int64)
    with use_backend("reference"):
        program = torch.export.export(SoftNms(), inputs)
    info = info_of(DETECTORS["fcos"]().build(), tiny_data)
    with pytest.raises(ConfigError, match="ONNX has no Soft-NMS"):
        exporting.save_onnx(program, tmp_path / "x.onnx", info)


def test_files_that_are_no_onnx(tmp_path):
    _, running = onnx_modules()
    with pytest.raises(WeightsError, match="does not exist"):
        running.load_onnx(tmp_path / "none.onnx", "cpu")
    (tmp_path / "bad.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(WeightsError, match="is no ONNX file that onnxruntime"):
        running.load_onnx(tmp_path / "bad.onnx", "cpu")
    with pytest.raises(ConfigError, match="no device tpu"):
        running.load_onnx(tmp_path / "bad.onnx", "tpu")


def detections(*rows):
    """One image of detections, each (x, score, label)."""
    x, scores, labels = (torch.tensor([column]) for column in zip(*rows, strict=True))
    boxes = torch.stack([x, x, x + 10.0, x + 10.0], dim=-1)
    return Detections(boxes, scores, labels, torch.ones_like(labels, dtype=torch.bool))


def test_agreement():
    first = detections((5.0, 0.9, 1), (50.0, 0.8, 0), (50.0, 0.7, 1))
    assert compare(first, first) == Agreement(3)
    swapped = detections((50.01, 0.8004, 0), (5.0, 0.9, 1), (50.0, 0.7, 1))
    near = compare(first, swapped)
    assert near.holds and near.boxes == pytest.approx(0.01, abs=1e-5)
    assert near.scores == pytest.approx(4e-4, rel=1e-3)
    assert not compare(first, detections((5.1, 0.9, 1), (50.0, 0.8, 0), (50.0, 0.7, 1))).holds
    other = compare(first, detections((5.0, 0.9, 0), (50.0, 0.8, 0)))
    assert other.unmatched == 3 and not other.holds and "3 without a counterpart" in str(other)
    total = near + other
    assert total.detections == 6 and total.unmatched == 3 and total.boxes == near.boxes


def test_a_package_finds_the_same(photos, sizes, tmp_path):
    torch.manual_seed(0)
    model = DETECTORS["faster"]().build().eval()
    file, info = tmp_path / "detector.pt2", info_of(model, sizes)
    save_package(trace(model), file, info)
    exported = load_package(file)
    assert_same(check(model, exported, photos, sizes, least_side(model)), least=12 * 40)


@pytest.mark.gpu
@pytest.mark.parametrize("save, load", [(save_program, load_program), (save_package, load_package)])
def test_files_made_on_a_gpu_find_the_same(save, load, photos, sizes, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    model = DETECTORS["mask"]().build().eval().cuda()
    file = tmp_path / "detector.pt2"
    save(trace(model), file, info_of(model, sizes))
    assert_same(check(model, load(file), photos, sizes, least_side(model)), least=12 * 40)
