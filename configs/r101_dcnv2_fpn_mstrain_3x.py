"""Dynamic R-CNN, ResNet-101-DCNv2-FPN, 3x with multi-scale training, on COCO 2017."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.dynamic(presets.faster_rcnn("resnet101", deformable=True)),
    data=presets.coco_multi_scale(),
    optim=presets.schedule(3),
)
