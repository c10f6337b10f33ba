"""Faster R-CNN with dynamic scale training, ResNet-50-FPN, 6x, on COCO 2017."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.scale_training(presets.faster_rcnn("resnet50")),
    data=presets.coco(),
    optim=presets.schedule(6),
)
