"""Faster R-CNN, light, from scratch on a CPU, on nuclei (Data Science Bowl 2018), at many scales."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.for_nuclei(presets.light_faster_rcnn(num_classes=1)),
    data=presets.small_multi_scale(presets.small_images("data/dsb2018")),
    optim=presets.short_schedule(600),
)
