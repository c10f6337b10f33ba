"""Detectors and their parts."""

from drcnn.models.anchors import AnchorConfig
from drcnn.models.backbone import ResNetConfig
from drcnn.models.cascade import CascadeHead, CascadeHeadConfig
from drcnn.models.detector import FasterRCNN, FasterRCNNConfig
from drcnn.models.fcos import FCOS, FCOSConfig, FCOSHeadConfig
from drcnn.models.fpn import FPNConfig
from drcnn.models.mask_head import MaskHead, MaskHeadConfig
from drcnn.models.retinanet import RetinaNet, RetinaNetConfig, RetinaNetHeadConfig
from drcnn.models.roi_heads import BoxHead, BoxHeadConfig
from drcnn.models.rpn import RPN, RPNConfig
from drcnn.models.sparse import SparseRCNN, SparseRCNNConfig
from drcnn.models.sparse_head import SparseHead, SparseHeadConfig
from drcnn.models.timm_backbone import TimmConfig

__all__ = [
    "FCOS",
    "RPN",
    "AnchorConfig",
    "BoxHead",
    "BoxHeadConfig",
    "CascadeHead",
    "CascadeHeadConfig",
    "FCOSConfig",
    "FCOSHeadConfig",
    "FPNConfig",
    "FasterRCNN",
    "FasterRCNNConfig",
    "MaskHead",
    "MaskHeadConfig",
    "RPNConfig",
    "ResNetConfig",
    "RetinaNet",
    "RetinaNetConfig",
    "RetinaNetHeadConfig",
    "SparseHead",
    "SparseHeadConfig",
    "SparseRCNN",
    "SparseRCNNConfig",
    "TimmConfig",
]
