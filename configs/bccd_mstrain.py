"""Faster R-CNN, light, from scratch on a CPU, on blood cells (BCCD), at many scales."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.light_faster_rcnn(num_classes=3),
    data=presets.small_multi_scale(presets.small_images("data/bccd")),
    optim=presets.short_schedule(600),
)
