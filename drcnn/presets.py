"""The detectors, data sets and schedules that the files in ``configs/`` are put together from.

Numbers are those of Dynamic R-CNN (arXiv 2004.06002, section 5.1) unless said otherwise.
"""

from dataclasses import replace
from typing import TypeVar

from drcnn.data import VOC_CLASSES, DataConfig, SplitConfig, SyntheticConfig
from drcnn.dynamics import DynamicTrainingConfig, ScaleControl, ScaleTrainingConfig
from drcnn.engine.optim import OptimConfig
from drcnn.models import (
    AnchorConfig,
    BoxHeadConfig,
    CascadeHeadConfig,
    FasterRCNNConfig,
    FCOSConfig,
    FCOSHeadConfig,
    FPNConfig,
    MaskHeadConfig,
    ResNetConfig,
    RetinaNetConfig,
    RetinaNetHeadConfig,
    RPNConfig,
    SparseRCNNConfig,
)
from drcnn.models.backbone import ResNetName
from drcnn.models.retinanet import SCALES

Detector = TypeVar("Detector", FasterRCNNConfig, RetinaNetConfig, FCOSConfig, SparseRCNNConfig)

ITERATIONS_1X = 90_000
MILESTONES_1X = (60_000, 80_000)


def faster_rcnn(
    backbone: ResNetName = "resnet50", num_classes: int = 80, deformable: bool = False
) -> FasterRCNNConfig:
    """Faster R-CNN with FPN on an ImageNet backbone.

    Args:
        backbone: torchvision's name. `resnext101_32x4d` has no weights there and starts from none: give a
            file by ``--model.backbone.weights``.
        num_classes: object classes, without the background.
        deformable: modulated deformable convolution (v2) in C3 to C5.
    """
    weights = "none" if backbone == "resnext101_32x4d" else "IMAGENET1K_V1"
    return FasterRCNNConfig(num_classes, ResNetConfig(backbone, weights, deformable=deformable))


def light_faster_rcnn(num_classes: int) -> FasterRCNNConfig:
    """Faster R-CNN that trains from scratch on a CPU, for small images: ResNet-18 with group norm.

    Args:
        num_classes: object classes, without the background.
    """
    return FasterRCNNConfig(
        num_classes,
        ResNetConfig("resnet18", norm="gn", frozen_stages=0),
        FPNConfig(channels=64),
        RPNConfig(
            AnchorConfig(sizes=(16, 32, 64, 128, 256)),
            pre_nms=1000,
            post_nms=500,
            test_pre_nms=500,
            test_post_nms=500,
        ),
        BoxHeadConfig(channels=256, sampling_ratio=2, samples=128),
    )


def dynamic(detector: FasterRCNNConfig, training: DynamicTrainingConfig | None = None) -> FasterRCNNConfig:
    """Turns Faster R-CNN into Dynamic R-CNN: DLA, DSL, and RPN NMS 0.85, which keeps more good proposals.

    Args:
        detector: the Faster R-CNN.
        training: the policy. Default: the paper's.
    """
    training = training or DynamicTrainingConfig.paper()
    return replace(detector, training=training, rpn=replace(detector.rpn, nms=0.85))


def scale_training(detector: Detector, scale: ScaleTrainingConfig | None = None) -> Detector:
    """Turns on dynamic scale training (DST, arXiv 2004.12432): collages where small objects get little loss.

    Args:
        detector: any detector.
        scale: the policy. Default: the paper's, with the regression loss as feedback.
    """
    return replace(detector, scale=scale or ScaleTrainingConfig())


def nucleus_scale(control: ScaleControl = "feedback") -> ScaleTrainingConfig:
    """Scale training on dsb2018: nuclei are small and medium in proportion to 256 pixels instead of 800.

    Args:
        control: what decides on collages.
    """
    small, medium = (32 * 256 / 800) ** 2, (96 * 256 / 800) ** 2
    return ScaleTrainingConfig(control, small_area=small, medium_area=medium)


def coco(root: str = "data/coco") -> DataConfig:
    """COCO 2017: short side 800, long side at most 1333, flips left to right, 16 images a step.

    Two of its boxes have no width or height; they are left out.

    Args:
        root: folder with ``annotations``, ``train2017`` and ``val2017``.
    """
    return DataConfig(
        root,
        train=SplitConfig("train2017", "annotations/instances_train2017.json"),
        val=SplitConfig("val2017", "annotations/instances_val2017.json"),
        workers=4,
        skip=("box-no-area",),
    )


def coco_multi_scale(root: str = "data/coco") -> DataConfig:
    """COCO 2017 for multi-scale training (MST): short side from five, long side at most 1400.

    Args:
        root: folder with ``annotations``, ``train2017`` and ``val2017``.
    """
    return replace(coco(root), short_sides=(400, 600, 800, 1000, 1200), max_size=1400)


def multi_scale(data: DataConfig, shortest: int, longest: int, step: int = 100) -> DataConfig:
    """The same data, trained at short sides from a range; the maximum of the long side grows in proportion.

    Args:
        data: the data set, at one scale.
        shortest: least short side in pixels.
        longest: greatest short side in pixels.
        step: distance between two short sides in pixels.
    """
    short_sides = tuple(range(shortest, longest + 1, step))
    return replace(data, short_sides=short_sides, max_size=data.max_size * longest // max(data.short_sides))


def small_images(root: str, batch_size: int = 4) -> DataConfig:
    """A small data set in COCO format with its own train, val and test split, at a short side of 256.

    Args:
        root: folder with ``images`` and ``annotations/instances_{train,val,test}.json``.
        batch_size: images a step.
    """
    folders = {"train": "images", "val": "images", "test": "images"}
    return _at_one_scale(root, folders, batch_size, short_side=256, max_size=448)


def synthetic_shapes(root: str, batch_size: int = 4) -> DataConfig:
    """Textured shapes of four classes, made in ``root`` when it is not there; short side 160.

    Args:
        root: folder to make.
        batch_size: images a step.
    """
    folders = {"train": "images/train", "val": "images/val"}
    data = _at_one_scale(root, folders, batch_size, short_side=160, max_size=256)
    return replace(data, synthetic=SyntheticConfig())


def _at_one_scale(
    root: str, folders: dict[str, str], batch_size: int, short_side: int, max_size: int
) -> DataConfig:
    """Small images of one scale, flipped both ways; ``folders`` holds the images of each split."""
    splits = {name: SplitConfig(folders[name], f"annotations/instances_{name}.json") for name in folders}
    return DataConfig(
        root,
        **splits,
        batch_size=batch_size,
        short_sides=(short_side,),
        max_size=max_size,
        test_short_side=short_side,
        test_max_size=max_size,
        vflip=0.5,
        pad_step=32,
    )


def schedule(times: int = 1) -> OptimConfig:
    """SGD for COCO: 0.02 for 16 images; "1x" is 90,000 iterations with drops at 60,000 and 80,000.

    Args:
        times: multiple of "1x"; "3x" is 270,000 with drops at 180,000 and 240,000.
    """
    milestones = tuple(times * iteration for iteration in MILESTONES_1X)
    return OptimConfig(iterations=times * ITERATIONS_1X, milestones=milestones)


def short_schedule(iterations: int, lr: float = 0.02, batch_size: int = 4) -> OptimConfig:
    """SGD for a short training from scratch: drops at 70 % and 90 %, gradients clipped.

    Args:
        iterations: optimizer steps.
        lr: learning rate for ``batch_size`` images.
        batch_size: images a step that ``lr`` is for.
    """
    drops = {iterations * 7 // 10, iterations * 9 // 10}  # of few iterations the same one, or the first
    return OptimConfig(
        lr=lr,
        reference_batch=batch_size,
        warmup_iterations=min(100, iterations // 5),
        iterations=iterations,
        milestones=tuple(sorted(drop for drop in drops if drop > 0)),
        clip_norm=10.0,
    )


def mask_rcnn(backbone: ResNetName = "resnet50", num_classes: int = 80) -> FasterRCNNConfig:
    """Mask R-CNN with FPN on an ImageNet backbone (arXiv 1703.06870).

    Args:
        backbone: torchvision's name.
        num_classes: object classes, without the background.
    """
    return replace(faster_rcnn(backbone, num_classes), mask_head=MaskHeadConfig())


def light_mask_rcnn(num_classes: int) -> FasterRCNNConfig:
    """Mask R-CNN that trains from scratch on a CPU, for small images: a narrow mask head on the light parts.

    Args:
        num_classes: object classes, without the background.
    """
    return replace(
        light_faster_rcnn(num_classes), mask_head=MaskHeadConfig(channels=64, convs=2, sampling_ratio=2)
    )


def light_nucleus_faster_rcnn() -> FasterRCNNConfig:
    """`light_nucleus_mask_rcnn` without masks."""
    return replace(light_nucleus_mask_rcnn(), mask_head=None)


def light_nucleus_mask_rcnn() -> FasterRCNNConfig:
    """`light_mask_rcnn` for the nuclei of dsb2018: small anchors, room for hundreds of objects per image."""
    detector = light_mask_rcnn(num_classes=1)
    return replace(
        detector,
        rpn=replace(detector.rpn, anchors=AnchorConfig(sizes=(8, 16, 32, 64, 128))),
        box_head=replace(detector.box_head, detections=300),
    )


def cascade_rcnn(backbone: ResNetName = "resnet50", num_classes: int = 80) -> FasterRCNNConfig:
    """Cascade R-CNN with FPN on an ImageNet backbone (arXiv 1712.00726); 2000 proposals in training.

    Args:
        backbone: torchvision's name.
        num_classes: object classes, without the background.
    """
    detector = faster_rcnn(backbone, num_classes)
    return replace(detector, rpn=replace(detector.rpn, post_nms=2000), box_head=CascadeHeadConfig())


def light_cascade_rcnn(num_classes: int) -> FasterRCNNConfig:
    """Cascade R-CNN that trains from scratch on a CPU, for small images: three of the light box heads.

    Args:
        num_classes: object classes, without the background.
    """
    detector = light_faster_rcnn(num_classes)
    return replace(detector, box_head=CascadeHeadConfig(replace(detector.box_head, class_agnostic=True)))


def cascade_mask_rcnn(backbone: ResNetName = "resnet50", num_classes: int = 80) -> FasterRCNNConfig:
    """Cascade R-CNN with one mask head: it trains on the first stage's positives and serves the last's boxes.

    Args:
        backbone: torchvision's name.
        num_classes: object classes, without the background.
    """
    return replace(cascade_rcnn(backbone, num_classes), mask_head=MaskHeadConfig())


def with_masks(data: DataConfig) -> DataConfig:
    """The same data with its instance masks, for detectors with a mask head.

    Args:
        data: the data set.
    """
    return replace(data, masks=True)


def retinanet(backbone: ResNetName = "resnet50", num_classes: int = 80) -> RetinaNetConfig:
    """RetinaNet (arXiv 1708.02002) on an ImageNet backbone.

    Args:
        backbone: torchvision's name.
        num_classes: object classes, without the background.
    """
    return RetinaNetConfig(num_classes, ResNetConfig(backbone, weights="IMAGENET1K_V1"))


def fcos(backbone: ResNetName = "resnet50", num_classes: int = 80) -> FCOSConfig:
    """FCOS (arXiv 1904.01355) with its improvements on an ImageNet backbone.

    Args:
        backbone: torchvision's name.
        num_classes: object classes, without the background.
    """
    return FCOSConfig(num_classes, ResNetConfig(backbone, weights="IMAGENET1K_V1"))


def light_retinanet(num_classes: int) -> RetinaNetConfig:
    """RetinaNet that trains from scratch on a CPU, for small images: ResNet-18 with group norm.

    Args:
        num_classes: object classes, without the background.
    """
    return RetinaNetConfig(
        num_classes,
        ResNetConfig("resnet18", norm="gn", frozen_stages=0),
        FPNConfig(channels=64, first_level=3, top="convs_on_c5"),
        RetinaNetHeadConfig(AnchorConfig(sizes=(16, 32, 64, 128, 256), scales=SCALES), convs=2),
    )


def light_fcos(num_classes: int) -> FCOSConfig:
    """FCOS that trains from scratch on a CPU, for small images: ResNet-18 with group norm.

    Args:
        num_classes: object classes, without the background.
    """
    return FCOSConfig(
        num_classes,
        ResNetConfig("resnet18", norm="gn", frozen_stages=0),
        FPNConfig(channels=64, first_level=3, top="convs_on_p5"),
        FCOSHeadConfig(convs=2, size_limits=(32, 64, 128, 256)),
    )


def dense_schedule(times: int = 1) -> OptimConfig:
    """SGD for RetinaNet and FCOS on COCO: 0.01 for 16 images, otherwise as :func:`schedule`.

    Args:
        times: multiple of "1x".
    """
    return replace(schedule(times), lr=0.01)


def voc(root: str = "data/VOCdevkit") -> DataConfig:
    """PASCAL VOC: trains on 2007 and 2012 trainval, evaluates on 2007 test; 600 pixels, at most 1000.

    Args:
        root: folder with ``VOC2007`` and ``VOC2012``, as the tars leave it.
    """
    return DataConfig(
        root,
        train=SplitConfig(
            annotations=("VOC2007/ImageSets/Main/trainval.txt", "VOC2012/ImageSets/Main/trainval.txt")
        ),
        val=SplitConfig(annotations="VOC2007/ImageSets/Main/test.txt"),
        classes=VOC_CLASSES,
        workers=4,
        short_sides=(600,),
        max_size=1000,
        test_short_side=600,
        test_max_size=1000,
    )


def voc_schedule() -> OptimConfig:
    """SGD for PASCAL VOC (Stitcher, arXiv 2004.12432): 0.01, a tenth for the last third of 24,000 iterations.

    The paper gives no batch; 16 images is usual at this learning rate.
    """
    return OptimConfig(lr=0.01, iterations=24_000, milestones=(16_000,))
