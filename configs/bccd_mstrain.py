"""Faster R-CNN at several scales, light, from scratch on a CPU, on blood cells (BCCD)."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.light_faster_rcnn(num_classes=3),
    data=presets.multi_scale(presets.small_images("data/bccd"), 192, 320, step=32),
    optim=presets.short_schedule(600),
)
