"""Faster R-CNN, light, from scratch on a CPU, on nuclei (Data Science Bowl 2018)."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.light_nucleus_faster_rcnn(),
    data=presets.small_images("data/dsb2018"),
    optim=presets.short_schedule(600),
)
