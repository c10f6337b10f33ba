"""Faster R-CNN with dynamic scale training, ResNet-50-FPN, on PASCAL VOC 2007 and 2012."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.scale_training(presets.faster_rcnn("resnet50", num_classes=20)),
    data=presets.voc(),
    optim=presets.voc_schedule(),
)
