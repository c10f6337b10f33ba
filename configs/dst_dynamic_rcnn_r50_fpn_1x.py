"""Dynamic R-CNN with dynamic scale training too, ResNet-50-FPN, 1x, on COCO 2017."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.scale_training(presets.dynamic(presets.faster_rcnn("resnet50"))),
    data=presets.coco(),
    optim=presets.schedule(1),
)
