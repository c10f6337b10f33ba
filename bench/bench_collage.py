"""collage: canvases of 800 x 1344 from four components each, of that shape or of several."""

import pytest
import torch
from torch.nn.functional import interpolate

from drcnn.ops import collage, collage_cells
from drcnn.ops.backend import BACKENDS

HEIGHT, WIDTH = 800, 1344
EQUAL = ((HEIGHT, WIDTH),) * 4
MIXED = ((800, 1216), (1344, 800), (800, 1344), (1088, 800))

pytestmark = pytest.mark.benchmark


def _interpolate(images, sizes, mode):
    """What one writes with PyTorch for images without padding; the positions are rounded to float32."""
    cells = collage_cells([image.shape[2:] for image in images], HEIGHT, WIDTH)
    canvas = images[0].new_zeros((*images[0].shape[:2], HEIGHT, WIDTH))
    for image, cell in zip(images, cells, strict=True):
        shape = (cell.height, cell.width)
        if mode == "nearest":
            drawn = interpolate(image, shape, mode="nearest-exact")
        elif image.dtype == torch.uint8:
            drawn = interpolate(image.float(), shape, mode="bilinear").round()
        else:
            drawn = interpolate(image, shape, mode="bilinear")
        canvas[:, :, cell.top : cell.top + cell.height, cell.left : cell.left + cell.width] = drawn
    return canvas


def _collage(images, sizes, mode):
    return collage(images, sizes, HEIGHT, WIDTH, mode)


def _case(batch, name, shapes, dtype, device):
    marks = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    name = f"{batch}x3x{HEIGHT}x{WIDTH} {name} {str(dtype).removeprefix('torch.')}"
    return pytest.param(
        name, batch, shapes, dtype, device, id=f"{name}-{device}", marks=marks if device == "cuda" else []
    )


CASES = [
    _case(*sizes, device)
    for device in ("cpu", "cuda")
    for sizes in (
        (4, "equal", EQUAL, torch.uint8),
        (4, "mixed", MIXED, torch.uint8),
        (4, "equal", EQUAL, torch.float32),
        (16, "equal", EQUAL, torch.uint8),
    )
    if device == "cuda" or sizes[0] == 4
]


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("implementation", ["reference", "compile", "torch", *BACKENDS[1:]])
@pytest.mark.parametrize(("name", "batch", "shapes", "dtype", "device"), CASES)
def test_collage(compare, run_as, name, batch, shapes, dtype, device, implementation, mode):
    if implementation == "torch" and shapes is MIXED:
        pytest.skip("PyTorch rounds positions, so that some pixels differ")
    if implementation == "torch":
        function = _interpolate
    else:
        function = run_as("collage", implementation, device, _collage)
    reference = run_as("collage", "reference", device, _collage)
    torch.manual_seed(0)
    images = [
        torch.randint(0, 256, (batch, 3, *shape), dtype=torch.uint8).to(device, dtype) for shape in shapes
    ]
    sizes = [torch.tensor([shape] * batch, device=device) for shape in shapes]
    drawn = sum(cell.height * cell.width for cell in collage_cells(shapes, HEIGHT, WIDTH)) * batch * 3
    read = drawn if mode == "nearest" else min(4 * drawn, sum(image.numel() for image in images))
    written = batch * 3 * HEIGHT * WIDTH
    compare(
        "collage",
        f"{mode} {name}",
        implementation,
        device,
        lambda: [function(images, sizes, mode)],
        lambda: [reference(images, sizes, mode)],
        (read + written) * dtype.itemsize,
    )
