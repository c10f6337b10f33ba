"""Faster R-CNN at several scales, light, from scratch, on nuclei (Data Science Bowl 2018)."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.light_nucleus_faster_rcnn(),
    data=presets.multi_scale(presets.small_images("data/dsb2018"), 192, 320, step=32),
    optim=presets.short_schedule(600),
)
