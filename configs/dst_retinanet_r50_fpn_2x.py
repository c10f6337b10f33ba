"""RetinaNet with dynamic scale training, ResNet-50-FPN, 2x, on COCO 2017."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.scale_training(presets.retinanet("resnet50")),
    data=presets.coco(),
    optim=presets.dense_schedule(2),
)
