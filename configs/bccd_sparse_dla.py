"""Sparse R-CNN with dynamic assignment (DLA) on a CPU, light, on blood cells (BCCD).

Begin with the weights of bccd_baseline.py: --train.weights RUN --train.partial-weights.
"""

from drcnn import presets, sparse_presets
from drcnn.config import Config

config = Config(
    model=sparse_presets.dynamic_assignment(sparse_presets.light_sparse_rcnn(num_classes=3)),
    data=presets.small_images("data/bccd"),
    optim=sparse_presets.short_sparse_schedule(600),
)
