"""roi_align, forward and backward: 512 boxes x 256 channels, a light size, and what fills a GPU."""

import math

import pytest
import torch
import torchvision

from drcnn.ops import fpn_level, roi_align
from drcnn.ops.backend import BACKENDS

STRIDES = (4, 8, 16, 32)
SIZE = 7

pytestmark = pytest.mark.benchmark


def _roi_align_by_level(features, boxes):
    """What one writes with torchvision: each level pools its own boxes, which waits for the device."""
    levels = fpn_level(boxes, 2, 5).flatten()
    image = torch.arange(len(boxes), device=boxes.device).view(-1, 1, 1).expand(-1, boxes.shape[1], 1)
    rois = torch.cat([image.to(boxes), boxes], dim=-1).flatten(0, 1).to(features[0].dtype)
    pooled = features[0].new_zeros((len(rois), features[0].shape[1], SIZE, SIZE))
    for level, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
        own = torch.where(levels == level)[0]
        pooled[own] = torchvision.ops.roi_align(feature, rois[own], SIZE, 1 / stride, 0, True)
    return pooled.unflatten(0, boxes.shape[:2])


def _roi_align(features, boxes):
    return roi_align(features, boxes, STRIDES, SIZE)


def _inputs(images, count, channels, height, width, dtype, device, layout):
    features = [
        torch.randn(images, channels, math.ceil(height / s), math.ceil(width / s), device=device, dtype=dtype)
        .to(memory_format=layout)
        .requires_grad_()
        for s in STRIDES
    ]
    extent = torch.tensor([width, height], dtype=torch.float32)
    centre = torch.rand(images, count, 2) * extent
    # Sides from a 32nd of the image to all of it, which spread over the levels.
    side = extent.max() * torch.exp(-math.log(32.0) * torch.rand(images, count, 2))
    boxes = torch.cat([(centre - side / 2).clamp(min=0), torch.minimum(centre + side / 2, extent)], dim=-1)
    return features, boxes.to(device)


def _case(name, sizes, dtype, device, layout=torch.contiguous_format):
    on_gpu = device == "cuda"
    marks = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    layout_name = "channels-last " if layout is torch.channels_last else ""
    name = f"{name} {layout_name}{str(dtype).removeprefix('torch.')}"
    return pytest.param(
        name, sizes, dtype, device, layout, id=f"{name}-{device}", marks=marks if on_gpu else []
    )


_STEP = ("1x512x256 of 800x1344", (1, 512, 256, 800, 1344))
_LIGHT = ("4x128x64 of 256x352", (4, 128, 64, 256, 352))
_LARGE = ("16x512x256 of 800x1344", (16, 512, 256, 800, 1344))
CASES = [
    _case(*_LIGHT, torch.float32, "cpu"),
    _case(*_STEP, torch.float32, "cpu"),
    _case(*_STEP, torch.float32, "cpu", torch.channels_last),
    _case(*_STEP, torch.float32, "cuda"),
    _case(*_STEP, torch.bfloat16, "cuda", torch.channels_last),
    _case(*_LARGE, torch.float32, "cuda", torch.channels_last),
    _case(*_LARGE, torch.bfloat16, "cuda", torch.channels_last),
]


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("implementation", ["reference", "compile", "torchvision", *BACKENDS[1:]])
@pytest.mark.parametrize(("name", "sizes", "dtype", "device", "layout"), CASES)
def test_roi_align(compare, run_as, name, sizes, dtype, device, layout, implementation, direction):
    if implementation == "torchvision":
        function = _roi_align_by_level
    else:
        function = run_as("roi_align", implementation, device, _roi_align)
    reference = run_as("roi_align", "reference", device, _roi_align)
    torch.manual_seed(0)
    features, boxes = _inputs(*sizes, dtype, device, layout)
    weight = torch.randn(*boxes.shape[:2], sizes[2], SIZE, SIZE).to(device, dtype)

    def forward(run):
        def call():
            with torch.no_grad():
                return [run(features, boxes)]

        return call

    def backward(run):
        pooled = run(features, boxes)
        return lambda: torch.autograd.grad(pooled, features, weight, retain_graph=True)

    make = forward if direction == "fwd" else backward
    # At least once: the features or their gradients, and the pooled features or theirs.
    nbytes = sum(feature.nbytes for feature in features) + weight.nbytes
    compare(
        "roi_align",
        f"{direction} {name}",
        implementation,
        device,
        make(function),
        make(reference),
        nbytes,
    )
