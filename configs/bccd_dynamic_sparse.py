"""Dynamic Sparse R-CNN, light, from scratch on a CPU, on blood cells (BCCD)."""

from drcnn import presets, sparse_presets
from drcnn.config import Config

config = Config(
    model=sparse_presets.light_dynamic_sparse_rcnn(num_classes=3),
    data=presets.small_images("data/bccd"),
    optim=sparse_presets.short_sparse_schedule(600),
)
