"""Renaming tensors of other systems, and changes to them that keep what they compute."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NORM_EPSILON = 1e-5
"""What batch norm adds to a variance, here and in all systems but those that add nothing."""

_STEM = "backbone.conv1.weight"


@dataclass
class Converted:
    """Tensors by our names.

    Attributes:
        tensors: by the model's names; names without a counterpart stay as they were.
        reshaped: names of those whose rows or channels were moved or dropped.
        notes: what differs from the system that wrote them, one sentence each.
    """

    tensors: dict[str, Tensor]
    reshaped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rearrange(self, name: str, rows: Sequence[int] | Tensor, dim: int = 0) -> None:
        """Takes the given rows of a tensor, if it is there; rows that it lacks leave it as it is."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.dim() <= dim or int(torch.as_tensor(rows).max()) >= tensor.shape[dim]:
            return
        self.tensors[name] = tensor.index_select(dim, torch.as_tensor(rows))
        self.reshaped.append(name)

    def reverse_colours(self) -> None:
        """Turns a first convolution on B, G, R into one on R, G, B."""
        self.rearrange(_STEM, [2, 1, 0], dim=1)

    def complete_dense_head(self) -> None:
        """Adds what others leave out of a dense head: zero biases before a norm, and FCOS's scales of 1."""
        for name, tensor in list(self.tensors.items()):
            bias = f"{name.removesuffix('.weight')}.bias"
            if re.fullmatch(r"head\.(class|box)_convs\.\d+\.0\.weight", name) and bias not in self.tensors:
                self.tensors[bias] = torch.zeros(len(tensor))
        if "head.centerness.weight" in self.tensors:
            self.tensors.setdefault("head.scales", torch.ones(5))

    def drop(self, *beginnings: str) -> None:
        """Leaves out what is not a weight, such as stored anchors."""
        self.tensors = {name: t for name, t in self.tensors.items() if not name.startswith(beginnings)}


def rename(tensors: dict[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Renames each tensor by the first rule whose pattern is its whole name; others keep theirs.

    Args:
        tensors: by the other system's names.
        rules: pattern and replacement.
    """
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed = {}
    for name, tensor in tensors.items():
        found = next((m.expand(new) for rule, new in compiled if (m := rule.fullmatch(name))), name)
        renamed[found] = tensor
    return renamed


def fold_batch_norm(
    tensors: dict[str, Tensor], norm: str, conv: str, within: tuple[str, ...]
) -> dict[str, Tensor]:
    """Takes batch norm into the convolution before it: in evaluation both compute the same.

    ``w' = w g / sqrt(v + eps)`` and ``b' = (b - m) g / sqrt(v + eps) + beta``.

    Args:
        tensors: state dict.
        norm: what ends the name of a norm, such as ".bn".
        conv: what ends the name of the convolution in its stead, such as ".conv".
        within: beginnings of the names that are looked at; a backbone keeps its norms.

    Returns:
        The state dict without these norms.
    """
    folded = dict(tensors)
    for name in tensors:
        stem = name.removesuffix(f"{norm}.running_var")
        weight = f"{stem}{conv}.weight"
        if stem == name or not name.startswith(within) or weight not in tensors:
            continue
        parts = (folded.pop(f"{stem}{norm}.{part}", None) for part in ("weight", "bias", "running_mean"))
        gain, shift, mean = parts
        if gain is None or shift is None or mean is None:
            continue
        scale = gain / (folded.pop(name) + NORM_EPSILON).sqrt()
        bias = folded.get(f"{stem}{conv}.bias", torch.zeros_like(mean))
        folded[weight] = folded[weight] * scale.view(-1, *[1] * (folded[weight].dim() - 1))
        folded[f"{stem}{conv}.bias"] = (bias - mean) * scale + shift
        folded.pop(f"{stem}{norm}.num_batches_tracked", None)
    return folded


def without_epsilon(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Makes the backbone's norms compute what they do without an epsilon: it is taken off the variances."""
    return {
        name: tensor - NORM_EPSILON
        if name.startswith("backbone.") and name.endswith("running_var")
        else tensor
        for name, tensor in tensors.items()
    }


def anchor_rows(order: Sequence[int], outputs: int) -> Tensor:
    """Rows of a layer whose outputs are anchor-major, with the anchors in another order.

    Args:
        order: for each of our anchors the position of theirs.
        outputs: outputs of each anchor.
    """
    return (torch.as_tensor(order).unsqueeze(1) * outputs + torch.arange(outputs)).flatten()
