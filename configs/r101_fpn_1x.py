"""Dynamic R-CNN, ResNet-101-FPN, 1x, on COCO 2017."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.dynamic(presets.faster_rcnn("resnet101")),
    data=presets.coco(),
    optim=presets.schedule(1),
)
