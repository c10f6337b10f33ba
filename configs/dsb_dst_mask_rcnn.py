"""Mask R-CNN with dynamic scale training, light, from scratch, on nuclei (Data Science Bowl 2018)."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.scale_training(presets.light_nucleus_mask_rcnn(), presets.nucleus_scale()),
    data=presets.with_masks(presets.small_images("data/dsb2018")),
    optim=presets.short_schedule(600),
)
