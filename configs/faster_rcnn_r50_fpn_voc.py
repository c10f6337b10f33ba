"""Faster R-CNN, ResNet-50-FPN, on PASCAL VOC: 2007 and 2012 trainval, evaluated on 2007 test."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.faster_rcnn("resnet50", num_classes=20),
    data=presets.voc(),
    optim=presets.voc_schedule(),
)
