"""nms: both forms agree with each other and with torchvision."""

import pytest
import torch
import torchvision

from drcnn.ops import nms
from drcnn.ops.nms import nms_reference, nms_torchvision


def crowded(n: int, batch: int = 2, groups: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Boxes around few centres, scores with ties, groups and padding."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randint(0, 5, (batch, n, 1), generator=generator) * 40.0
    corner = centre + torch.rand(batch, n, 2, generator=generator) * 12
    boxes = torch.cat([corner, corner + 20 + torch.rand(batch, n, 2, generator=generator) * 15], dim=-1)
    scores = (torch.rand(batch, n, generator=generator) * 20).round() / 20
    group = torch.randint(0, groups, (batch, n), generator=generator)
    return boxes, scores, group, torch.rand(batch, n, generator=generator) > 0.2


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.85])
@pytest.mark.parametrize(("n", "slots"), [(1, 1), (60, 60), (200, 15), (0, 0)])
def test_both_forms_of_nms_agree(n, slots, threshold):
    inputs = crowded(n)
    index, kept = nms_reference(*inputs, threshold, slots)
    expected_index, expected_kept = nms_torchvision(*inputs, threshold, slots)
    assert torch.equal(kept, expected_kept)
    assert torch.equal(index, expected_index)


def test_nms_agrees_with_batched_nms_of_torchvision():
    boxes, scores, groups, valid = crowded(150)
    # Without ties in the scores both orders are the same.
    scores = torch.rand(scores.shape, generator=torch.Generator().manual_seed(4))
    result = nms(boxes, scores, groups, 0.5, 40, valid)
    assert result.index.shape == (2, 40)
    for image in range(2):
        own = valid[image].nonzero().squeeze(1)
        kept = torchvision.ops.batched_nms(boxes[image, own], scores[image, own], groups[image, own], 0.5)
        expected = own[kept][:40]
        assert result.index[image][result.valid[image]].tolist() == expected.tolist()


def test_nms_without_valid_boxes_keeps_nothing():
    boxes, scores, groups, valid = crowded(10)
    result = nms(boxes, scores, groups, 0.5, 5, torch.zeros_like(valid))
    assert not result.valid.any() and not result.index.any()


def test_nms_passes_opcheck():
    boxes, scores, groups, valid = crowded(20)
    torch.library.opcheck(torch.ops.drcnn_python.nms.default, (boxes, scores, groups, valid, 0.5, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nms(torch.zeros(3, 4), torch.zeros(3), torch.zeros(3), 0.5, 2), r"\[B, N, 4\]"),
        (lambda: nms(torch.zeros(1, 3, 4), torch.zeros(1, 2), torch.zeros(1, 3), 0.5, 2), "scores"),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
