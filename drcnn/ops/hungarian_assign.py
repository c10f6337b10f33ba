"""Optimal one-to-one assignment of predictions to ground truths over a batch of images.

Source: the Hungarian method as shortest augmenting paths with potentials (Jonker and Volgenant 1987, for
rectangular problems Crouse 2016), with which DETR (arXiv 2005.12872, section 3.1) and Sparse R-CNN (arXiv
2011.12450, section 3.4) match predictions::

    minimise    sum over the pairs (n, g) of cost[n, g]
    such that   each n and each g is in at most one pair, and there are min(N, valid) pairs

Ground truths are served one after the other in O(N G) each, hence O(N G^2) in all. A column that costs more
than all others can is the sink of ground truths that are left over where there are more than predictions.

All backends compute in float64 with the same sums in the same order, and break ties alike: they return the
same pairs.

Implementations: PyTorch here, C++ and CUDA in ``csrc/hungarian_assign.{h,cpp,cu}``. The search is one chain
of short steps, each of which needs the whole image: it has no Triton kernel. They have one schema, in the
namespaces ``drcnn_python`` and ``drcnn``::

    hungarian_assign(Tensor cost, Tensor gt_valid) -> Tensor
"""

import math

import torch
from torch import Tensor

from drcnn.ops.backend import implementation, native_defines, register
from drcnn.ops.shapes import check_shape

_LARGEST = 1e150  # a cost beyond counts as infinite: no sum of finite ones overflows


def hungarian_assign(cost: Tensor, gt_valid: Tensor) -> Tensor:
    """Gives every valid ground truth one prediction of its own at the least total cost.

    Where several assignments cost the same, ground truths are served by rising index, and a search goes on
    from the prediction at the smallest distance, of equal ones from that with the lowest index. The result is
    the same on every backend. No gradient flows through it.

    NaN and +inf count as a cost so high that as few such pairs as possible are made, -inf as one so low that
    as many as possible are.

    Args:
        cost (Tensor[B, N, G]): of a pair of a prediction and a ground truth, of any float dtype.
        gt_valid (Tensor[B, G]): bool, False for padding.

    Returns:
        Tensor[B, N]: int64 index of the ground truth of each prediction, -1 for none. An image has
        min(N, valid ground truths) pairs.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message says which.
        BackendError: the backend that was asked for cannot run.
    """
    if cost.dim() != 3:
        raise ValueError(f"cost must have shape [B, N, G], got {list(cost.shape)}")
    if not cost.is_floating_point():
        raise ValueError(f"cost must be floating point, got {cost.dtype}")
    check_shape("gt_valid", gt_valid, (cost.shape[0], cost.shape[2]))
    if gt_valid.dtype != torch.bool:
        raise ValueError(f"gt_valid must be torch.bool, got {gt_valid.dtype}")
    if gt_valid.device != cost.device:
        raise ValueError(f"gt_valid must be on the device of cost, {cost.device}, got {gt_valid.device}")
    return implementation("hungarian_assign", cost.device.type)(cost.detach(), gt_valid)


@register("hungarian_assign", "reference")
@torch.library.custom_op("drcnn_python::hungarian_assign", mutates_args=())
def _reference(cost: Tensor, gt_valid: Tensor) -> Tensor:
    # One opaque node for torch.compile: the steps would unroll into thousands of nodes.
    images, count, gts = cost.shape
    if cost.numel() == 0:
        return torch.full((images, count), -1, dtype=torch.int64, device=cost.device)
    search = _Search(cost, gt_valid)
    for gt in range(gts):
        search.serve(gt)
    return search.row_of[:, :count].clone()


class _Search:
    """Pairs and potentials of all images; a row is a ground truth, a column a prediction or the sink."""

    def __init__(self, cost: Tensor, gt_valid: Tensor) -> None:
        images, count, gts = cost.shape
        self.valid = gt_valid
        self.cost = _with_sink(cost.double(), gt_valid)  # [B, G, N + 1]
        self.row_price = self.cost.new_zeros(images, gts)
        self.price = self.cost.new_zeros(images, count + 1)
        self.row_of = torch.full_like(self.price, -1, dtype=torch.int64)  # of the sink always -1
        self.column_of = torch.zeros_like(self.row_price, dtype=torch.int64)

    def serve(self, gt: int) -> None:
        """Finds the shortest path from a ground truth to a free column, and shifts the pairs along it."""
        is_served = self.valid[:, gt : gt + 1]
        distance, closed, path, end, length = self._shortest_path(gt, is_served)
        gain = torch.where(closed, length - distance, 0.0)
        self.price -= gain
        matched = self.row_of >= 0
        self.row_price.scatter_add_(1, self.row_of.clamp(min=0), torch.where(matched, gain, 0.0))
        self.row_price[:, gt : gt + 1] += length
        column, active = end, is_served
        for _ in range(gt + 1):
            row = path.gather(1, column)
            freed = self.column_of.gather(1, row)
            self.row_of.scatter_(1, column, torch.where(active, row, self.row_of.gather(1, column)))
            self.column_of.scatter_(1, row, torch.where(active, column, freed))
            active = active & (row != gt)
            column = torch.where(active, freed, column)
        self.row_of[:, -1] = -1

    def _shortest_path(self, gt: int, active: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns distance, closed, path [B, N + 1], end and its distance [B, 1]; paths have gt + 1 steps."""
        columns = torch.arange(self.price.shape[1], device=self.price.device)
        distance = torch.full_like(self.price, math.inf)
        closed = torch.zeros_like(distance, dtype=torch.bool)
        path = torch.zeros_like(self.row_of)
        row = torch.full_like(path[:, :1], gt)
        end = torch.zeros_like(row)
        length = torch.zeros_like(distance[:, :1])
        for _ in range(gt + 1):
            cost = self.cost.gather(1, row.unsqueeze(-1).expand(-1, 1, self.cost.shape[2])).squeeze(1)
            through = (length - self.row_price.gather(1, row)) + (cost - self.price)
            is_shorter = active & ~closed & (through < distance)
            distance = torch.where(is_shorter, through, distance)
            path = torch.where(is_shorter, row, path)
            nearest = torch.where(closed, math.inf, distance).argmin(dim=1, keepdim=True)
            end = torch.where(active, nearest, end)
            length = torch.where(active, distance.gather(1, nearest), length)
            closed = closed | (active & (columns == nearest))
            row = torch.where(active, self.row_of.gather(1, nearest), row)
            active = active & (row >= 0)
            row = row.clamp(min=0)
        return distance, closed, path, end, length


def _with_sink(cost: Tensor, gt_valid: Tensor) -> Tensor:
    """Returns finite costs [B, G, N + 1], the last column of which costs more than all pairs of an image."""
    is_finite = cost.abs() <= _LARGEST
    counts = is_finite & gt_valid.unsqueeze(1)
    low = torch.where(counts, cost, math.inf).amin(dim=(1, 2), keepdim=True)
    high = torch.where(counts, cost, -math.inf).amax(dim=(1, 2), keepdim=True)
    low, high = (torch.where(low <= high, bound, 0.0) for bound in (low, high))
    pairs = min(cost.shape[1:]) + 1
    spread = torch.where(high > low, high - low, high.abs().clamp(min=1.0))
    worst, best = high + spread * pairs, low - spread * pairs
    sink = worst + (worst - best) * pairs
    cost = torch.where(is_finite, cost, torch.where(cost < 0, best, worst)).transpose(1, 2)
    return torch.cat([cost, sink.expand(-1, cost.shape[1], 1)], dim=2)


@register("hungarian_assign", "native", requires=("hungarian_assign",))
def _native(cost: Tensor, gt_valid: Tensor) -> Tensor:
    return torch.ops.drcnn.hungarian_assign(cost, gt_valid)


def _fake(cost: Tensor, gt_valid: Tensor) -> Tensor:
    return cost.new_empty(cost.shape[:2], dtype=torch.int64)


_reference.register_fake(_fake)
if native_defines("hungarian_assign"):
    torch.library.register_fake("drcnn::hungarian_assign", _fake)
