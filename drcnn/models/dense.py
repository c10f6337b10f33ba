"""What RetinaNet and FCOS share: the way from images to a head, the focal loss, the choice at test."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from drcnn.dynamics import PlainTraining
from drcnn.models.boxes import clip_boxes, has_size
from drcnn.models.pixels import normalize
from drcnn.ops import nms
from drcnn.structures import Detections, ImageBatch, Targets

if TYPE_CHECKING:
    from drcnn.models.fcos import FCOSConfig
    from drcnn.models.retinanet import RetinaNetConfig


class DenseDetector(nn.Module):
    """Backbone, pyramid and one head over all cells; its training forward never waits for the device.

    Args:
        config: its parts.

    Attributes:
        dynamics (PlainTraining): the policy that training follows; nothing moves.
    """

    def __init__(self, config: "RetinaNetConfig | FCOSConfig") -> None:
        super().__init__()
        self.config = config
        self.backbone = config.backbone.build()
        self.fpn = config.fpn.build(self.backbone.channels, self.backbone.strides)
        self.head = config.head.build(self.fpn.channels, self.fpn.strides, config.num_classes)
        self.dynamics = PlainTraining()
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std).view(3, 1, 1), persistent=False)

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        """Computes losses in training mode and detections in evaluation mode.

        Args:
            images: a padded batch; H and W are multiples of 32.
            targets: ground truths; needed in training mode.

        Returns:
            dict[str, Tensor[]] | Detections: in training mode the losses of the head; their sum is to be
            minimized.

        Raises:
            ValueError: in training mode without targets.
        """
        if self.training and targets is None:
            raise ValueError("a detector in training mode needs targets; call .eval() to detect")
        features = self.fpn(self.backbone(self.normalize(images)))
        if self.training:
            return self.head.losses(features, targets)
        return self.head.detect(features, images)

    def normalize(self, images: ImageBatch) -> Tensor:
        """Scales pixels to zero mean and unit deviation, and sets the padding to zero.

        Args:
            images: RGB in 0..255.

        Returns:
            Tensor[B, 3, H, W]: float32.
        """
        return normalize(images, self.pixel_mean, self.pixel_std)


def initialize_head(head: nn.Module, classifier: nn.Conv2d, prior: float) -> None:
    """Sets a dense head's convolutions to small random weights, and its first scores to ``prior``.

    Without the prior, the loss of the many background cells would swamp the first iterations (RetinaNet,
    section 4.1).

    Args:
        head: all of its convolutions are set.
        classifier: the layer whose outputs are class logits.
        prior: score of every class before training.
    """
    for name, parameter in head.named_parameters():
        if parameter.dim() == 4:
            nn.init.normal_(parameter, std=0.01)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.constant_(classifier.bias, -math.log((1 - prior) / prior))


def by_cell(output: Tensor, values: int) -> Tensor:
    """Turns a convolution's output into rows, one for each anchor of each cell.

    Args:
        output (Tensor[B, A * values, H, W]): channels by anchor and value.
        values: channels of an anchor.

    Returns:
        Tensor[B, H * W * A, values]: float32, by row, column and anchor.
    """
    return output.permute(0, 2, 3, 1).reshape(len(output), -1, values).float()


def focal_loss(logits: Tensor, labels: Tensor, counted: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sums the sigmoid focal loss ``-alpha_t (1 - p_t)^gamma log(p_t)`` (RetinaNet, equation 5).

    Args:
        logits (Tensor[B, N, K]): of the classes.
        labels (Tensor[B, N]): int64 in 0..K; K, the background, is no class.
        counted (Tensor[B, N]): bool; others add nothing.
        alpha: weight of the class that is there; of those that are not, 1 - alpha.
        gamma: how fast the weight falls as a logit gets right.

    Returns:
        Tensor[]: the sum.
    """
    classes = torch.arange(logits.shape[-1], device=logits.device)
    wanted = (labels.unsqueeze(-1) == classes).to(logits.dtype)
    loss = sigmoid_focal_loss(logits, wanted, alpha, gamma)
    return torch.where(counted.unsqueeze(-1), loss, 0.0).sum()


def strongest(scores: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Picks the pairs of an anchor and a class that score best in a level.

    Args:
        scores (Tensor[B, N, K]): of each anchor and class.
        most: pairs per image.

    Returns:
        tuple[Tensor[B, M], Tensor[B, M], Tensor[B, M]]: scores, int64 labels, int64 positions of the anchors;
        M = min(most, N * K).
    """
    classes = scores.shape[-1]
    scores = scores.flatten(1)
    best, index = scores.topk(min(most, scores.shape[1]), dim=1)
    return best, index % classes, index // classes


def keep_best(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    images: ImageBatch,
    score_threshold: float,
    iou_threshold: float,
    detections: int,
) -> Detections:
    """Clips candidates to their images and keeps the best after NMS by class.

    Args:
        boxes (Tensor[B, M, 4]): xyxy in pixels.
        scores (Tensor[B, M]): in 0..1.
        labels (Tensor[B, M]): int64 in 0..K-1.
        images: the batch, for the sizes of its images.
        score_threshold: a detection scores above.
        iou_threshold: IoU above which the lower detection of a class is dropped.
        detections: most detections per image.

    Returns:
        Detections: D = min(detections, M) slots per image.
    """
    boxes = clip_boxes(boxes, images.sizes)
    passed = (scores > score_threshold) & has_size(boxes, 1e-2)
    kept = nms(boxes, scores, labels, iou_threshold, detections, passed)
    boxes = boxes.gather(1, kept.index.unsqueeze(-1).expand(-1, -1, 4))
    return Detections(
        torch.where(kept.valid.unsqueeze(-1), boxes, 0.0),
        torch.where(kept.valid, scores.gather(1, kept.index), 0.0),
        torch.where(kept.valid, labels.gather(1, kept.index), 0),
        kept.valid,
    )
