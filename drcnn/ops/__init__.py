"""The public operators: batched, padded, masked, free of host synchronisation."""

from drcnn.ops.assign_targets import assign_targets, encode_deltas
from drcnn.ops.backend import BackendError, BackendWarning, backend_status, use_backend
from drcnn.ops.box_iou import box_iou
from drcnn.ops.collage import Cell, collage, collage_cells
from drcnn.ops.match_boxes import MatchResult, match_boxes
from drcnn.ops.nms import NmsResult, nms
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
    "SoftNmsResult",
    "TopkStatistics",
    "assign_targets",
    "backend_status",
    "box_iou",
    "collage",
    "collage_cells",
    "encode_deltas",
    "fpn_level",
    "match_boxes",
    "nms",
    "roi_align",
    "smooth_l1",
    "soft_nms",
    "topk_statistics",
    "use_backend",
]
