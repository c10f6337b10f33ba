"""roi_align: both forms agree with each other and with torchvision."""

import pytest
import torch
import torchvision

from drcnn.ops import fpn_level, roi_align
from drcnn.ops.roi_align import roi_align_reference


def test_roi_align_passes_opcheck():
    features = [torch.randn(2, 3, 8 >> level, 8 >> level, requires_grad=True) for level in range(2)]
    rois = torch.tensor([[0.0, 1, 1, 20, 25], [1.0, 0, 0, 30, 30]])
    arguments = (features, rois, torch.tensor([0, 1]), [0.25, 0.125], 3, 2, True)
    torch.library.opcheck(torch.ops.drcnn_python.roi_align.default, arguments)


def pyramid(requires_grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = (64, 32, 16, 8)
    levels = [torch.randn(2, 5, side, side, dtype=torch.float32, generator=generator) for side in sides]
    return [level.requires_grad_(requires_grad) for level in levels]


def boxes_of_all_sizes() -> torch.Tensor:
    side = torch.tensor([4.0, 30, 90, 130, 200, 250])
    corner = torch.tensor([[3.0, 2.0], [1.5, 5.0]]).unsqueeze(1)
    return torch.cat([corner.expand(2, 6, 2), corner + side.view(1, -1, 1)], dim=-1)


@pytest.mark.parametrize(("aligned", "sampling_ratio"), [(True, 0), (True, 2), (False, 2)])
def test_roi_align_agrees_with_torchvision_by_level(aligned, sampling_ratio):
    features, boxes = pyramid(True), boxes_of_all_sizes()
    strides = (4, 8, 16, 32)
    pooled = roi_align(features, boxes, strides, 7, sampling_ratio, aligned)
    levels = fpn_level(boxes, 2, 5)
    assert levels.unique().tolist() == [0, 1, 2]
    for image in range(2):
        for r in range(6):
            level = int(levels[image, r])
            roi = torch.cat([torch.tensor([float(image)]), boxes[image, r]]).unsqueeze(0)
            expected = torchvision.ops.roi_align(
                features[level], roi, 7, 1 / strides[level], sampling_ratio, aligned
            )
            torch.testing.assert_close(pooled[image, r], expected[0])


def test_both_forms_of_roi_align_agree_forward_and_backward():
    boxes = boxes_of_all_sizes()
    image = torch.arange(2.0).repeat_interleave(6).unsqueeze(1)
    rois, levels = torch.cat([image, boxes.flatten(0, 1)], dim=1), fpn_level(boxes, 2, 5).flatten()
    first, second = pyramid(True), pyramid(True)
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    pooled = roi_align(first, boxes, (4, 8, 16, 32), 7, 2)
    expected = roi_align_reference(second, rois, levels, scales, 7, 2, True)
    torch.testing.assert_close(pooled.flatten(0, 1), expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (pooled.flatten(0, 1) * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_roi_align_of_a_box_that_is_nan_is_zero():
    torch.use_deterministic_algorithms(True)  # fills memory that nothing is written to with NaN
    try:
        boxes = torch.full((2, 3, 4), torch.nan)
        assert not roi_align(pyramid(), boxes, (4, 8, 16, 32), 7, 2).any()
    finally:
        torch.use_deterministic_algorithms(False)


def test_fpn_level_follows_the_paper():
    side = torch.tensor([1.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 2000.0, 0.0])
    boxes = torch.stack([torch.zeros(9), torch.zeros(9), side, side], dim=1)
    assert fpn_level(boxes, 2, 5).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: roi_align([torch.zeros(1, 2, 4, 4)], torch.zeros(1, 1, 4), (4, 8), 7), "as many"),
        (lambda: roi_align([torch.zeros(2, 2, 4, 4)], torch.zeros(1, 1, 4), (4,), 7), "level of features"),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
