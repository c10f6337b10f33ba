"""roi_align says which argument does not fit, and its native operator reads nothing out of bounds."""

import pytest
import torch

from drcnn.ops import roi_align

OPERATOR = "roi_align"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(1, 4)}, r"boxes must have shape \[B, R, 4\]"),
        ({"boxes": torch.zeros(1, 2, 4, dtype=torch.int64)}, "boxes must be floating point"),
        ({"strides": (4, 8)}, "as many"),
        ({"strides": (6,)}, "consecutive powers of two"),
        ({"features": [], "strides": ()}, "1 to 8 levels"),
        ({"features": [torch.zeros(2, 2, 4, 4)]}, "each level of features must have shape"),
        ({"features": [torch.zeros(1, 2, 4)]}, "each level of features must have shape"),
        ({"features": [torch.zeros(1, 2, 0, 4)]}, "at least one cell"),
        ({"features": [torch.zeros(1, 2, 4, 4, dtype=torch.int64)]}, "features must share"),
        ({"features": [torch.zeros(1, 2, 4, 4, device="meta")]}, "on the boxes' device"),
        ({"output_size": 0}, r"output_size must be in 1\.\.1024"),
        ({"sampling_ratio": -1}, r"sampling_ratio in 0\.\.1024"),
    ],
)
def test_says_what_does_not_fit(change, message):
    arguments = {"features": [torch.zeros(1, 2, 4, 4)], "boxes": torch.zeros(1, 1, 4), "strides": (4,)}
    with pytest.raises(ValueError, match=message):
        roi_align(**arguments | {"output_size": 7} | change)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, [], "expected 1 to 8 levels"),
        (0, [torch.zeros(2, 2, 4, 4)], r"must have shape \[B, C, H, W\]"),
        (0, [torch.zeros(1, 2, 0, 4)], "at least one cell"),
        (1, torch.zeros(1, 1, 5), r"boxes must have shape \[B, R, 4\]"),
        (1, torch.zeros(1, 1, 4).double(), "boxes must be float32"),
        (2, torch.zeros(1, 2, dtype=torch.int64), r"levels must have shape \[B, R\]"),
        (2, torch.zeros(1, 1), "levels must be int64"),
        (3, [4, 8], "as many"),
        (4, 0, "output_size must be in"),
        (5, -1, "sampling_ratio must be in"),
    ],
)
def test_native_operator_itself_reads_nothing_that_does_not_fit(native_on_cpu, place, value, message):
    """torch.ops.drcnn can be called without the public function, and must not read out of bounds then."""
    arguments = [[torch.zeros(1, 2, 4, 4)], torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64)]
    arguments += [[4], 7, 0, True, False]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drcnn.roi_align_fwd(*arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drcnn.roi_align_bwd(torch.zeros(1, 1, 2, 7, 7), *arguments)
