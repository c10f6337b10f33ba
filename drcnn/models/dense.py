"""What RetinaNet and FCOS share: from images to a head, the first weights of a head, the choice at test."""

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from drcnn.dynamics import PlainTraining
from drcnn.models.boxes import clip_boxes, has_size
from drcnn.models.pixels import PixelNormalization
from drcnn.models.suppression import SuppressionConfig, suppress
from drcnn.ops.shapes import at_most
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
        scale (ScaleTraining): the policy of the images' scale.
    """

    def __init__(self, config: "RetinaNetConfig | FCOSConfig") -> None:
        super().__init__()
        self.config = config
        self.backbone = config.backbone.build()
        self.fpn = config.fpn.build(self.backbone.channels, self.backbone.strides)
        self.head = config.head.build(self.fpn.channels, self.fpn.strides, config.num_classes)
        self.dynamics = PlainTraining()
        self.scale = config.scale.build()
        self.normalize = PixelNormalization(config.pixel_mean, config.pixel_std)

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
            self.scale.observe(targets)
            return self.head.losses(features, targets, self.scale)
        return self.head.detect(features, images)


def initialize_head(head: nn.Module, classifier: nn.Conv2d, prior: float) -> None:
    """Sets a dense head's convolutions to small random weights, and its first scores to ``prior``.

    Without the prior, the loss of the many background cells would swamp the first iterations (RetinaNet,
    section 4.1).

    Args:
        head: all of its convolutions are set.
        classifier: the layer whose outputs are class logits.
        prior: score of every class before training.
    """
    for conv in (layer for layer in head.modules() if isinstance(layer, nn.Conv2d)):
        nn.init.normal_(conv.weight, std=0.01)
        nn.init.zeros_(conv.bias)
    nn.init.constant_(classifier.bias, -math.log((1 - prior) / prior))


def by_cell(output: Tensor, values: int) -> Tensor:
    """Turns a convolution's output into rows, one for each anchor of each cell.

    Args:
        output (Tensor[B, A * values, H, W]): channels by anchor and value.
        values: channels of an anchor.

    Returns:
        Tensor[B, H * W * A, values]: float32, by row, column and anchor.
    """
    return output.permute(0, 2, 3, 1).reshape(output.shape[0], -1, values).float()


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
    best, index = scores.topk(at_most(most, scores.shape[1]), dim=1)
    return best, index % classes, index // classes


def keep_best(
    boxes: Tensor, scores: Tensor, labels: Tensor, images: ImageBatch, config: SuppressionConfig
) -> Detections:
    """Clips candidates to their images and keeps the best after NMS by class.

    Args:
        boxes (Tensor[B, M, 4]): xyxy in pixels.
        scores (Tensor[B, M]): in 0..1.
        labels (Tensor[B, M]): int64 in 0..K-1.
        images: the batch, for the sizes of its images.
        config: least score, NMS, number of detections.

    Returns:
        Detections: D = min(``config.detections``, M) slots per image.
    """
    boxes = clip_boxes(boxes, images.sizes)
    passed = (scores > config.score_threshold) & has_size(boxes, 1e-2)
    return suppress(boxes, scores, labels, passed, config)
