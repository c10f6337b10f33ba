"""Proposals of Sparse R-CNN: learned ones, and mixtures of experts."""

import pytest
import torch
from torch import Tensor

from drcnn.dynamics import LearnedProposalsConfig
from drcnn.errors import ConfigError


def pyramid(images: int = 2, channels: int = 8, size: tuple[int, int] = (24, 40)) -> list[Tensor]:
    """Random levels P2 to P5 whose sides halve, rounded up."""
    levels = []
    for _ in range(4):
        levels.append(torch.randn(images, channels, *size))
        size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    return levels


def test_learned_proposals_start_as_whole_images_with_normal_features():
    torch.manual_seed(0)
    proposals = LearnedProposalsConfig(count=400).build(32)
    assert {n: p.shape for n, p in proposals.named_parameters()} == {"boxes": (400, 4), "features": (400, 32)}
    boxes, objects = proposals(pyramid(3))
    assert boxes.shape == (3, 400, 4) and objects.shape == (3, 400, 32)
    assert (boxes == torch.tensor([0.5, 0.5, 1, 1])).all()
    assert objects.mean().abs() < 0.03 and objects.std() == pytest.approx(1, abs=0.03)
    assert torch.equal(objects[0], objects[2])
    proposals.update()
    assert proposals.metrics() == {}


def test_proposals_need_a_count():
    with pytest.raises(ConfigError, match=r"proposals.count must be at least 1, got 0"):
        LearnedProposalsConfig(count=0).build(8)
