"""The public operators: batched, padded, masked, free of host synchronisation."""

from drcnn.ops.assign_targets import assign_targets, encode_deltas
from drcnn.ops.backend import BackendError, BackendWarning, backend_status, use_backend
from drcnn.ops.box_iou import box_iou
from drcnn.ops.collage import Cell, collage, collage_cells
from drcnn.ops.focal_loss import focal_loss
from drcnn.ops.giou_loss import giou_loss
from drcnn.ops.hungarian_assign import hungarian_assign
from drcnn.ops.match_boxes import MatchResult, match_boxes
from drcnn.ops.nms import NmsResult, nms
from drcnn.ops.ota_assign import OtaAssignment, ota_assign
from drcnn.ops.roi_align import fpn_level, roi_align
from drcnn.ops.smooth_l1 import smooth_l1
from drcnn.ops.soft_nms import SoftNmsResult, soft_nms
from drcnn.ops.topk_statistics import TopkStatistics, topk_statistics

__all__ = [
    "BackendError",
    "BackendWarning",
    "Cell",
    "MatchResult",
    "NmsResult",
    "OtaAssignment",
    "SoftNmsResult",
    "TopkStatistics",
    "assign_targets",
    "backend_status",
    "box_iou",
    "collage",
    "collage_cells",
    "encode_deltas",
    "focal_loss",
    "fpn_level",
    "giou_loss",
    "hungarian_assign",
    "match_boxes",
    "nms",
    "ota_assign",
    "roi_align",
    "smooth_l1",
    "soft_nms",
    "topk_statistics",
    "use_backend",
]
