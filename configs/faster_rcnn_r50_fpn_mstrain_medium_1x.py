"""Faster R-CNN, ResNet-50-FPN, 1x, on COCO 2017 at short sides from 600 to 1000."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.faster_rcnn("resnet50"),
    data=presets.multi_scale(presets.coco(), 600, 1000),
    optim=presets.schedule(1),
)
