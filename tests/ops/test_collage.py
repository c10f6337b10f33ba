"""collage: every backend against the reference, and all of them against a plain formula in numpy."""

import math

import numpy as np
import pytest
import torch

from drcnn.ops import collage, collage_cells, use_backend

OPERATOR = "collage"
MODES = ("nearest", "bilinear")
DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
FILL = (7.0, 1.5, 250.0)
# shapes of the components, canvas
CASES = (
    ([(6, 9)], (6, 9)),
    ([(13, 7)], (32, 20)),
    ([(16, 24)] * 4, (16, 24)),
    ([(32, 45), (45, 32), (7, 9), (61, 3)], (33, 47)),
    ([(1, 1), (2, 90), (3, 1), (40, 40)], (17, 30)),
    ([(30, 30)] * 9, (30, 30)),
    ([(9 + 3 * j, 40 - 2 * j) for j in range(9)], (31, 40)),
    ([(5, 8)] * 25, (5, 5)),
)


def _inputs(shapes, dtype=torch.uint8, device="cpu", batch=2, channels=3):
    """Images with noise in their padding; the first of a batch has none, the others any size of content."""
    images = [(torch.rand(batch, channels, *shape) * 255).to(dtype).to(device) for shape in shapes]
    sizes = []
    for height, width in shapes:
        size = torch.stack(
            [torch.randint(0, height + 1, (batch,)), torch.randint(0, width + 1, (batch,))], dim=1
        )
        size[:1] = torch.tensor([height, width])
        sizes.append(size.to(device))
    return images, sizes


def _full(shapes, batch=1):
    return [torch.tensor([shape]).expand(batch, 2) for shape in shapes]


def _run(backend, *arguments):
    with use_backend(backend):
        return collage(*arguments)


def _plain(images, sizes, height, width, mode, fill):
    """Pixel by pixel in float64, without rounding."""
    batch, channels = images[0].shape[:2]
    canvas = np.empty((batch, channels, height, width))
    canvas[:] = np.array(fill).reshape(-1, 1, 1)
    cells = collage_cells([tuple(image.shape[2:]) for image in images], height, width)
    for image, size, cell in zip(images, sizes, cells, strict=True):
        pixels = image.double().cpu().numpy()
        for b, (rows, columns) in enumerate(size.tolist()):
            for y, x in np.ndindex(cell.height, cell.width):
                own_y = (2 * y + 1) * image.shape[2] / (2 * cell.height)
                own_x = (2 * x + 1) * image.shape[3] / (2 * cell.width)
                if own_y >= rows or own_x >= columns:
                    continue
                if mode == "nearest":
                    value = pixels[b, :, math.floor(own_y), math.floor(own_x)]
                else:
                    value = _bilinear(pixels[b, :, :rows, :columns], own_y - 0.5, own_x - 0.5)
                canvas[b, :, cell.top + y, cell.left + x] = value
    return torch.from_numpy(canvas)


def _bilinear(content, y, x):
    value = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            weight = (1 - abs(y - row)) * (1 - abs(x - column))
            inside = np.clip(row, 0, content.shape[1] - 1), np.clip(column, 0, content.shape[2] - 1)
            value = value + weight * content[:, inside[0], inside[1]]
    return value


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize(("shapes", "canvas"), CASES[1:5], ids=str)
def test_value_is_the_definition(backend, device, shapes, canvas, dtype, mode):
    images, sizes = _inputs(shapes, dtype, device)
    fill = (7.0, 2.0, 250.0)
    actual = _run(backend, images, sizes, *canvas, mode, fill).double().cpu()
    expected = _plain(images, sizes, *canvas, mode, fill)
    if dtype == torch.uint8 and mode == "bilinear":
        assert (actual - expected).abs().max() <= 0.5 + 1e-3
    elif mode == "nearest":
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shapes", "canvas"), CASES, ids=str)
def test_kernel_agrees_with_reference(kernel, device, shapes, canvas, dtype, assert_same_bits):
    images, sizes = _inputs(shapes, dtype, device)
    for mode in MODES:
        arguments = (images, sizes, *canvas, mode, FILL)
        assert_same_bits(kernel, _run(kernel, *arguments), _run("reference", *arguments))


@pytest.mark.parametrize("channels", [1, 40])
def test_channels(kernel, device, channels, assert_same_bits):
    images, sizes = _inputs([(8, 12)] * 4, torch.float32, device, channels=channels)
    arguments = (images, sizes, 9, 14, "bilinear", tuple(range(channels)))
    assert_same_bits(kernel, _run(kernel, *arguments), _run("reference", *arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(kernel, device, dtype, assert_same_bits):
    def channels_last(image):
        return image.to(memory_format=torch.channels_last)

    def every_second_column(image):
        return image.repeat_interleave(2, dim=3)[..., ::2]

    def within_a_larger(image):
        return torch.nn.functional.pad(image, (1, 2, 3, 1))[:, :, 3:-1, 1:-2]

    def one_for_all(image):
        return image[:1].expand_as(image)

    images, sizes = _inputs([(10, 13)] * 4, dtype, device)
    for layout in (channels_last, every_second_column, within_a_larger, one_for_all):
        laid_out = [layout(image) for image in images]
        strided = [size.repeat(1, 2)[:, ::2].flip(1) for size in sizes]
        for mode in MODES:
            actual = _run(kernel, laid_out, strided, 11, 18, mode)
            expected = [image.contiguous() for image in laid_out], [size.contiguous() for size in strided]
            assert actual.is_contiguous()
            assert_same_bits(kernel, actual, _run("reference", *expected, 11, 18, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_component_of_the_canvas_shape_is_itself(backend, device, dtype, mode):
    (image,), _ = _inputs([(19, 23)], dtype, device)
    size = torch.tensor([[19, 23], [11, 5]], device=device)
    actual = _run(backend, [image], [size], 19, 23, mode)
    assert torch.equal(actual[0], image[0])
    assert torch.equal(actual[1, :, :11, :5], image[1, :, :11, :5])
    assert not actual[1, :, 11:].any() and not actual[1, :, :, 5:].any()


def test_half_the_size_as_torch_does_it(backend, device):
    images, _ = _inputs([(32, 48)] * 4, torch.float32, device, batch=1)
    sizes = [size.to(device) for size in _full([(32, 48)] * 4)]
    for mode, name in (("nearest", "nearest-exact"), ("bilinear", "bilinear")):
        parts = [torch.nn.functional.interpolate(image, scale_factor=0.5, mode=name) for image in images]
        expected = torch.cat([torch.cat(parts[:2], dim=3), torch.cat(parts[2:], dim=3)], dim=2)
        torch.testing.assert_close(_run(backend, images, sizes, 32, 48, mode), expected)


@pytest.mark.parametrize("mode", MODES)
def test_without_content_there_is_fill(backend, device, mode):
    images, _ = _inputs([(8, 8)] * 4, torch.uint8, device)
    for nothing in ([0, 0], [0, 8], [8, 0], [-3, 8]):
        sizes = [torch.tensor([nothing] * 2, device=device)] * 4
        actual = _run(backend, images, sizes, 9, 9, mode, (1.4, 2.5, 254.6))
        expected = torch.tensor([1, 2, 255], device=device).view(1, 3, 1, 1)
        assert actual.dtype == torch.uint8 and (actual == expected).all()


@pytest.mark.parametrize("mode", MODES)
def test_sizes_beyond_the_images_are_theirs(backend, device, mode):
    images, _ = _inputs([(8, 6)] * 4, torch.float32, device)
    results = [
        _run(backend, images, [torch.tensor([size] * 2, device=device)] * 4, 10, 11, mode)
        for size in ([8, 6], [9, 7], [2**40, 2**40])
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_padding_never_matters(backend, device, dtype):
    images, sizes = _inputs([(12, 17)] * 4, dtype, device)
    spoilt = []
    for image, size in zip(images, sizes, strict=True):
        rows = torch.arange(12, device=device).view(-1, 1) < size[:, :1].unsqueeze(-1)
        columns = torch.arange(17, device=device) < size[:, 1:].unsqueeze(-1)
        spoilt.append(torch.where((rows & columns).unsqueeze(1), image, torch.nan))
    for mode in MODES:
        actual = _run(backend, spoilt, sizes, 14, 15, mode)
        assert torch.equal(actual, _run(backend, images, sizes, 14, 15, mode))


@pytest.mark.parametrize("mode", MODES)
def test_nan_and_inf_stay_where_they_are(kernel, device, mode, assert_same_bits):
    images, sizes = _inputs([(12, 17)] * 4, torch.float32, device)
    for image in images:
        image[:, 0, 3, 4], image[:, 1, 7, 7], image[:, 2, 0, 0] = math.nan, math.inf, -math.inf
    arguments = (images, sizes, 30, 31, mode)
    actual = _run(kernel, *arguments)
    assert_same_bits(kernel, actual, _run("reference", *arguments))
    assert actual.isnan().any() and actual.isfinite().any()


def test_no_images(backend, device):
    for dtype in DTYPES:
        images = [torch.zeros(0, 3, 8, 8, dtype=dtype, device=device)] * 4
        sizes = [torch.zeros(0, 2, dtype=torch.int64, device=device)] * 4
        for mode in MODES:
            actual = _run(backend, images, sizes, 10, 12, mode)
            assert actual.shape == (0, 3, 10, 12) and actual.dtype == dtype


def test_every_pixel_is_written(kernel, device, poisoned_memory):
    for shapes, canvas in CASES:
        images, sizes = _inputs(shapes, torch.float32, device)
        for mode in MODES:
            assert torch.isfinite(_run(kernel, images, sizes, *canvas, mode)).all()


def test_inputs_stay_as_they_are(kernel, device):
    images, sizes = _inputs([(12, 17)] * 4, torch.uint8, device)
    before = [tensor.clone() for tensor in (*images, *sizes)]
    for mode in MODES:
        _run(kernel, images, sizes, 12, 17, mode)
    assert all(torch.equal(a, b) for a, b in zip((*images, *sizes), before, strict=True))


def test_a_full_canvas(kernel, device):
    if kernel == "triton" and device == "cpu":
        pytest.skip("the interpreter would take minutes for a million pixels")
    shapes = [(800, 1216), (1344, 800), (800, 1344), (640, 480)]
    images, sizes = _inputs(shapes, torch.uint8, device, batch=1)
    for mode in MODES:
        arguments = (images, sizes, 800, 1344, mode, FILL)
        assert torch.equal(_run(kernel, *arguments), _run("reference", *arguments))


def test_native_does_not_depend_on_the_number_of_threads(native_on_cpu, thread_counts):
    images, sizes = _inputs([(200, 301)] * 4, torch.float32)
    for mode in MODES:
        results = thread_counts(lambda mode=mode: _run("native", images, sizes, 250, 333, mode))
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_opcheck(kernel, device):
    operators = torch.ops.drcnn if kernel == "native" else torch.ops.drcnn_triton
    for dtype in (torch.uint8, torch.float32):
        images, sizes = _inputs([(8, 12)] * 4, dtype, device)
        cells = [number for cell in collage_cells([(8, 12)] * 4, 9, 14) for number in cell]
        for mode in (0, 1):
            arguments = (images, sizes, cells, 9, 14, mode, [1.0, 2.0, 3.0])
            torch.library.opcheck(operators.collage.default, arguments)


@pytest.mark.parametrize("mode", MODES)
def test_traces_as_one_graph(backend, device, mode):
    def stitch(images, sizes):
        return collage(images, sizes, 20, 30, mode, FILL).float() / 255

    compiled = torch.compile(stitch, fullgraph=True, backend="aot_eager")
    for shapes in ([(20, 30)] * 4, [(16, 24), (24, 16), (9, 9), (20, 31)]):
        images, sizes = _inputs(shapes, torch.uint8, device)
        with use_backend(backend):
            assert torch.equal(compiled(images, sizes), stitch(images, sizes))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["reference", "native", "triton"])
def test_never_waits_for_the_device(name, mode, never_waits):
    images, sizes = _inputs([(32, 48)] * 4, torch.uint8, "cuda")
    never_waits(lambda: _run(name, images, sizes, 32, 48, mode, FILL))


def test_cells():
    assert collage_cells([(800, 1344)], 800, 1344) == [(0, 0, 800, 1344)]
    same = collage_cells([(800, 1344)] * 4, 800, 1344)
    assert same == [(0, 0, 400, 672), (0, 672, 400, 672), (400, 0, 400, 672), (400, 672, 400, 672)]
    portrait = collage_cells([(1344, 800)] * 4, 800, 1344)
    assert [(cell.height, cell.width) for cell in portrait] == [(400, 238)] * 4  # 238.1
    nine = collage_cells([(50, 100)] * 9, 100, 200)
    assert [cell.top for cell in nine[::3]] == [0, 33, 66] and [cell.left for cell in nine[:3]] == [
        0,
        66,
        133,
    ]
    assert collage_cells([(1, 1000)], 10, 20) == [(0, 0, 1, 20)]  # 0.02 rows become one


def test_cells_fill_their_parts_with_the_aspect_kept():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 3):
        for _ in range(50):
            numbers = torch.randint(n, 300, (2 * n * n + 2,), generator=generator).tolist()
            shapes, (height, width) = list(zip(numbers[2::2], numbers[3::2], strict=True)), numbers[:2]
            for j, (cell, shape) in enumerate(zip(collage_cells(shapes, height, width), shapes, strict=True)):
                bottom, right = (j // n + 1) * height // n, (j % n + 1) * width // n
                assert (cell.top, cell.left) == (j // n * height // n, j % n * width // n)
                free = bottom - cell.top - cell.height, right - cell.left - cell.width
                assert min(free) == 0 <= max(free)
                scale = min((bottom - cell.top) / shape[0], (right - cell.left) / shape[1])
                assert abs(cell.height - max(1, shape[0] * scale)) <= 0.5 + 1e-9
                assert abs(cell.width - max(1, shape[1] * scale)) <= 0.5 + 1e-9


@pytest.mark.parametrize("count", [0, 2, 3, 5, 8, 36])
def test_components_form_a_square(count):
    images, sizes = _inputs([(8, 8)] * count)
    with pytest.raises(ValueError, match=f"1, 4, 9, 16 or 25 components, got {count}"):
        collage(images, sizes, 16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 1}, "sides in 2..32767, got 1 x 16"),
        ({"width": 40000}, "sides in 2..32767, got 16 x 40000"),
        ({"mode": "cubic"}, "mode must be one of nearest, bilinear, got 'cubic'"),
        ({"fill": (0.0,)}, "one value for each of 3 channels, got 1"),
        ({"fill": (0.0, 0.0, 256.0)}, r"in 0..255, got \[0.0, 0.0, 256.0\]"),
        ({"images": [torch.zeros(2, 3, 8)] * 4}, r"shape \[B, C, H, W\], got \[2, 3, 8\]"),
        ({"images": [torch.zeros(2, 3, 0, 8)] * 4}, "component 0 must have sides in 1..32767, got 0 x 8"),
        ({"images": [torch.zeros(b, 3, 8, 8) for b in (2, 1, 2, 2)]}, r"\[2, 3, 8, 8\], got \[1, 3, 8, 8\]"),
        ({"images": [torch.zeros(2, 3, 8, 8).double()] * 4}, "bfloat16 and float32, got torch.float64"),
        (
            {"images": [torch.zeros(2, 3, 8, 8, dtype=d) for d in DTYPES]},
            "must share one of uint8, .*, got torch.bfloat16, torch.float16, torch.float32, torch.uint8",
        ),
        ({"images": [torch.zeros(2, 3, 8, 8, requires_grad=True)] * 4}, "no gradient; detach the images"),
        ({"sizes": _full([(8, 8)] * 3, 2)}, "as many, got 4 and 3"),
        ({"sizes": _full([(8, 8)] * 4, 3)}, r"each of sizes must have shape \[2, 2\], got \[3, 2\]"),
        ({"sizes": [torch.zeros(2, 2)] * 4}, "sizes must be torch.int64, got torch.float32"),
    ],
)  # fmt: skip
def test_bad_input_gives_one_line(change, message):
    images, sizes = _inputs([(8, 8)] * 4)
    arguments = {"images": images, "sizes": sizes, "height": 16, "width": 16} | change
    with pytest.raises(ValueError, match=message) as caught:
        collage(**arguments)
    assert "\n" not in str(caught.value)


def test_images_with_gradients_are_taken_where_none_is_recorded():
    images = [torch.ones(1, 3, 8, 8, requires_grad=True)] * 4
    with torch.no_grad():
        assert (collage(images, _full([(8, 8)] * 4), 8, 8) == 1).all()


def test_triton_kernels_in_the_interpreter(in_the_interpreter):
    # Of one dtype: the interpreter is slow. `TRITON_INTERPRET=1 pytest tests/ops -k triton` runs all.
    in_the_interpreter(__file__, "-k", "agrees and uint8")
