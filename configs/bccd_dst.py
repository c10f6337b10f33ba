"""Faster R-CNN with dynamic scale training, light, from scratch on a CPU, on blood cells (BCCD)."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.scale_training(presets.light_faster_rcnn(num_classes=3)),
    data=presets.small_images("data/bccd"),
    optim=presets.short_schedule(600),
)
