"""The mask branch: He et al., "Mask R-CNN", arXiv 1703.06870, section 3."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401 (registers torch.ops.torchvision)
from torch import Tensor, nn

from drcnn.dynamics import mean_over_ranks
from drcnn.models.boxes import up_to_last_pixel
from drcnn.models.roi_heads import Samples
from drcnn.ops import roi_align

MAX_PIXELS = 2**26
"""Pixels of ground-truth masks that are floating point at a time."""


@dataclass(frozen=True)
class MaskHeadConfig:
    """Mask head: pooling, convolutions, one upsampling by two, a mask for each class."""

    channels: int = 256
    """Width of the convolutions."""
    convs: int = 4
    """Number of 3 x 3 convolutions before the upsampling."""
    pool_size: int = 14
    """Side of the pooled features; masks have twice as many cells."""
    sampling_ratio: int = 0
    """Samples per cell and side of RoIAlign; 0 adapts to the box."""
    aligned: bool = True
    """RoIAlign with the half-pixel shift."""
    to_last_pixel: bool = False
    """Pool to one pixel before the right and lower edge, as systems did whose boxes include that pixel."""
    loss_weight: float = 1.0
    """Factor of the mask loss."""

    def build(self, in_channels: int, strides: Sequence[int], num_classes: int) -> "MaskHead":
        """Makes the head over pyramid levels of these channels and strides."""
        return MaskHead(self, in_channels, strides, num_classes)


class MaskHead(nn.Module):
    """Convolutions on pooled features, a transposed convolution, and a mask of each class.

    Args:
        config: sizes.
        in_channels: channels of the pyramid.
        strides: pixels per cell of the pooled levels, finest first.
        num_classes: K.
    """

    def __init__(
        self, config: MaskHeadConfig, in_channels: int, strides: Sequence[int], num_classes: int
    ) -> None:
        super().__init__()
        self.config = config
        self.strides = tuple(strides)
        self.num_classes = num_classes
        widths = [in_channels] + [config.channels] * config.convs
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise(widths)
        )
        self.deconv = nn.ConvTranspose2d(widths[-1], config.channels, 2, stride=2)
        self.logits = nn.Conv2d(config.channels, num_classes, 1)
        for layer in (*self.convs, self.deconv):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.logits.weight, std=0.001)
        nn.init.zeros_(self.logits.bias)

    def forward(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Predicts the mask of each box as an object of its class.

        Args:
            features: one Tensor[B, C, H_l, W_l] for each stride.
            boxes (Tensor[B, R, 4]): xyxy in pixels.
            labels (Tensor[B, R]): int64 in 0..K-1.

        Returns:
            Tensor[B, R, M, M]: float32 logits in M x M cells of the box; M is twice ``config.pool_size``.
        """
        config = self.config
        boxes = up_to_last_pixel(boxes) if config.to_last_pixel else boxes
        hidden = roi_align(
            features, boxes, self.strides, config.pool_size, config.sampling_ratio, config.aligned
        ).flatten(0, 1)
        for conv in self.convs:
            hidden = F.relu(conv(hidden))
        logits = self.logits(F.relu(self.deconv(hidden)))
        own = labels.flatten().view(-1, 1, 1, 1).expand(-1, 1, *logits.shape[2:])
        return logits.gather(1, own).squeeze(1).unflatten(0, labels.shape).float()

    def losses(self, features: Sequence[Tensor], samples: Samples, masks: Tensor) -> dict[str, Tensor]:
        """Computes the binary cross-entropy of the positives' masks, each of its own class.

        Args:
            features: one Tensor[B, C, H_l, W_l] for each stride.
            samples: proposals that the box head sampled, cut to the slots that can hold positives.
            masks (Tensor[B, G, H, W]): bool masks of the ground truths.

        Returns:
            dict: ``loss_mask``, the mean over all cells of all positives, whose number is averaged over the
            ranks; 0 without positives.
        """
        positive = samples.labels < self.num_classes
        labels = torch.where(positive, samples.labels, 0)
        logits = self(features, samples.boxes, labels)
        with torch.no_grad():
            wanted = mask_targets(masks, samples.boxes, samples.gt_index, positive, logits.shape[-1])
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=(2, 3))
        count = mean_over_ranks(positive.sum().float(), least=1)
        total = torch.where(positive, loss, 0.0).sum() / count
        return {"loss_mask": self.config.loss_weight * total}

    def predict(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Predicts the masks of detections.

        Args:
            features: one Tensor[B, C, H_l, W_l] for each stride.
            boxes (Tensor[B, D, 4]): xyxy in pixels.
            labels (Tensor[B, D]): int64 in 0..K-1.

        Returns:
            Tensor[B, D, M, M]: float32 probabilities in M x M cells of the box.
        """
        return self(features, boxes, labels).sigmoid()


def mask_targets(masks: Tensor, boxes: Tensor, gt_index: Tensor, wanted: Tensor, size: int) -> Tensor:
    """Cuts the ground truths' masks out at the boxes that are matched to them.

    RoIAlign of the mask, the mean over adaptive samples, is an object from 1/2 on. Every box samples its
    own ground truth alone: the B x G masks are images of one channel to torchvision's RoIAlign.

    Args:
        masks (Tensor[B, G, H, W]): bool masks of the ground truths.
        boxes (Tensor[B, R, 4]): xyxy in pixels.
        gt_index (Tensor[B, R]): int64, which ground truth of the image each box is matched to.
        wanted (Tensor[B, R]): bool; the other boxes give zeros.
        size: side of the masks to make.

    Returns:
        Tensor[B, R, size, size]: float32, 0 or 1.
    """
    count, per_image, height, width = masks.shape
    result = boxes.new_zeros((*boxes.shape[:2], size, size), dtype=torch.float32)
    if per_image == 0:
        return result
    first = torch.arange(count, device=masks.device).unsqueeze(1) * per_image
    owner = torch.where(wanted, first + gt_index, -1).flatten()
    rows = masks.flatten(0, 1).unsqueeze(1)
    chunk = max(1, MAX_PIXELS // (height * width))
    flat = boxes.float().flatten(0, 1)
    for start in range(0, len(rows), chunk):  # a static number of chunks bounds the memory
        part = rows[start : start + chunk]
        own = ((owner >= start) & (owner < start + len(part))).unsqueeze(1)
        index = torch.where(own, owner.unsqueeze(1) - start, 0).float()
        rois = torch.cat([index, torch.where(own, flat, 0.0)], dim=1)  # an empty box samples nothing
        cut = torch.ops.torchvision.roi_align(part.float(), rois, 1.0, size, size, 0, True)
        result += torch.where(own.view(-1, 1, 1, 1), cut, 0.0).view_as(result)
    return (result >= 0.5).float()
