"""Sparse R-CNN with two positives for every object, ResNet-50-FPN, 300 proposals, 36 epochs, on COCO 2017."""

from drcnn import sparse_presets
from drcnn.config import Config

config = Config(
    model=sparse_presets.dynamic_assignment(sparse_presets.sparse_rcnn("resnet50", proposals=300), fixed_k=2),
    data=sparse_presets.coco_sparse(),
    optim=sparse_presets.sparse_schedule(),
)
