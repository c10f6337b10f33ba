"""Dynamic Sparse R-CNN, ResNet-101-FPN, 300 proposals, 36 epochs, on COCO 2017."""

from drcnn import sparse_presets
from drcnn.config import Config

config = Config(
    model=sparse_presets.dynamic_sparse_rcnn("resnet101", proposals=300),
    data=sparse_presets.coco_sparse(),
    optim=sparse_presets.sparse_schedule(),
)
