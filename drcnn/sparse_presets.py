"""Sparse R-CNN and Dynamic Sparse R-CNN, their data and their schedules, for the files in ``configs/``.

Numbers are those of arXiv 2011.12450 (section 4) and arXiv 2205.02101 (section 4) unless said otherwise.
"""

from dataclasses import replace

from drcnn import presets
from drcnn.data import CropConfig, DataConfig
from drcnn.dynamics import DynamicProposalsConfig, LearnedProposalsConfig, OptimalTransportConfig
from drcnn.engine.optim import OptimConfig
from drcnn.models import FPNConfig, ResNetConfig, SparseHeadConfig, SparseRCNNConfig
from drcnn.models.backbone import ResNetName

COCO_EPOCH = 7330
"""Steps of 16 images in one epoch of COCO's 117,266 training images with objects, rounded up."""


def sparse_rcnn(
    backbone: ResNetName = "resnet50", proposals: int = 300, num_classes: int = 80
) -> SparseRCNNConfig:
    """Sparse R-CNN on an ImageNet backbone.

    Args:
        backbone: torchvision's name.
        proposals: of an image; 300, or 100 for speed.
        num_classes: object classes, without the background.
    """
    return SparseRCNNConfig(
        num_classes,
        ResNetConfig(backbone, weights="IMAGENET1K_V1"),
        proposals=LearnedProposalsConfig(proposals),
    )


def dynamic_assignment(detector: SparseRCNNConfig, fixed_k: int = 0) -> SparseRCNNConfig:
    """Turns on dynamic label assignment (DLA) by optimal transport; detections then pass NMS at 0.7.

    Args:
        detector: the Sparse R-CNN.
        fixed_k: positives of every object in every stage, an ablation; 0 finds their number by dynamic k and
            lets it rise from stage to stage.
    """
    return replace(detector, assignment=OptimalTransportConfig(fixed_k=fixed_k, unit_increasing=not fixed_k))


def dynamic_proposals(
    detector: SparseRCNNConfig, anneal_iterations: int = 10 * COCO_EPOCH
) -> SparseRCNNConfig:
    """Turns on dynamic proposal generation (DPG): four experts, mixed for each image.

    Args:
        detector: the Sparse R-CNN.
        anneal_iterations: over which the temperature of the mixture falls to 1; the paper gives no number.
    """
    count, start = detector.proposals.count, detector.proposals.start
    proposals = DynamicProposalsConfig(count, start=start, anneal_iterations=anneal_iterations)
    return replace(detector, proposals=proposals)


def dynamic_sparse_rcnn(
    backbone: ResNetName = "resnet50", proposals: int = 300, num_classes: int = 80
) -> SparseRCNNConfig:
    """Dynamic Sparse R-CNN on an ImageNet backbone: Sparse R-CNN with DLA and DPG.

    Args:
        backbone: torchvision's name.
        proposals: of an image.
        num_classes: object classes, without the background.
    """
    return dynamic_assignment(dynamic_proposals(sparse_rcnn(backbone, proposals, num_classes)))


def light_sparse_rcnn(num_classes: int, proposals: int = 100) -> SparseRCNNConfig:
    """Sparse R-CNN that trains on a CPU, for small images: ResNet-18 with group norm.

    Boxes start in a grid and move little at first, so that it learns in hundreds of iterations. It wants the
    backbone and pyramid of ``presets.light_faster_rcnn``, trained on the same data, to begin with
    (``--train.weights RUN --train.partial-weights``); from scratch it takes very long.

    Args:
        num_classes: object classes, without the background.
        proposals: of an image, and at most that many detections.
    """
    return SparseRCNNConfig(
        num_classes,
        ResNetConfig("resnet18", norm="gn", frozen_stages=0),
        FPNConfig(channels=64, top="none"),
        LearnedProposalsConfig(proposals, start="grid"),
        SparseHeadConfig(dynamic_channels=16, ffn_channels=256, delta_std=0.01, detections=proposals),
    )


def light_dynamic_proposals(detector: SparseRCNNConfig) -> SparseRCNNConfig:
    """:func:`dynamic_proposals` for a short training: the temperature falls over 200 iterations.

    Args:
        detector: the Sparse R-CNN.
    """
    return dynamic_proposals(detector, anneal_iterations=200)


def light_dynamic_sparse_rcnn(num_classes: int, proposals: int = 100) -> SparseRCNNConfig:
    """Dynamic Sparse R-CNN that trains on a CPU: the light Sparse R-CNN with DLA and DPG.

    Args:
        num_classes: object classes, without the background.
        proposals: of an image, and at most that many detections.
    """
    return dynamic_assignment(light_dynamic_proposals(light_sparse_rcnn(num_classes, proposals)))


def coco_sparse(root: str = "data/coco") -> DataConfig:
    """COCO 2017 as for DETR: short side 480 to 800 in steps of 32, long side at most 1333, random crops.

    Args:
        root: folder with ``annotations``, ``train2017`` and ``val2017``.
    """
    return replace(presets.coco(root), short_sides=tuple(range(480, 801, 32)), crop=CropConfig())


def sparse_schedule(epochs: int = 36) -> OptimConfig:
    """AdamW for COCO: 2.5e-5 for 16 images, drops at three quarters and eleven twelfths, gradients clipped.

    "3x" is 36 epochs of 7,330 steps, 263,880 in all, with drops after epochs 27 and 33, as the papers say and
    MMDetection does. The first code of Sparse R-CNN counts 270,000 with drops at 210,000 and 250,000.

    Args:
        epochs: passes over the 117,266 training images with objects.
    """
    return OptimConfig(
        optimizer="adamw",
        lr=2.5e-5,
        weight_decay=1e-4,
        warmup_iterations=1000,
        warmup_factor=0.01,
        iterations=epochs * COCO_EPOCH,
        milestones=(epochs * 3 // 4 * COCO_EPOCH, epochs * 11 // 12 * COCO_EPOCH),
        clip_norm=1.0,
    )


def short_sparse_schedule(iterations: int, lr: float = 3e-4, batch_size: int = 4) -> OptimConfig:
    """AdamW for a short training from scratch: drops at 70 % and 90 %, gradients clipped.

    Args:
        iterations: optimizer steps.
        lr: learning rate for ``batch_size`` images.
        batch_size: images a step that ``lr`` is for.
    """
    return replace(presets.short_schedule(iterations, lr, batch_size), optimizer="adamw", clip_norm=1.0)
