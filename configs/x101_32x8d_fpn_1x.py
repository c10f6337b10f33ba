"""Dynamic R-CNN, ResNeXt-101-32x8d-FPN, 1x, on COCO 2017."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.dynamic(presets.faster_rcnn("resnext101_32x8d")),
    data=presets.coco(),
    optim=presets.schedule(1),
)
