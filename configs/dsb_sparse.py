"""Sparse R-CNN on a CPU, light, on nuclei (Data Science Bowl 2018).

Begin with the weights of dsb_baseline.py: --train.weights RUN --train.partial-weights.
"""

from drcnn import presets, sparse_presets
from drcnn.config import Config

config = Config(
    model=sparse_presets.light_sparse_rcnn(num_classes=1, proposals=300),
    data=presets.small_images("data/dsb2018"),
    optim=sparse_presets.short_sparse_schedule(600),
)
