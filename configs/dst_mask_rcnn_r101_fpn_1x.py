"""Mask R-CNN with dynamic scale training, ResNet-101-FPN, 1x, on COCO 2017."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.scale_training(presets.mask_rcnn("resnet101")),
    data=presets.with_masks(presets.coco()),
    optim=presets.schedule(1),
)
