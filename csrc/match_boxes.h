// The decisions of match_boxes, once for the C++ and the CUDA kernel; overlaps are those of box_iou.h.
#pragma once

#include "box_iou.h"

namespace drcnn {

// Whether the boxes of a ground truth's largest IoU are its low-quality matches.
template <typename A>
DRCNN_HOST_DEVICE bool wants_best(A gt_max_iou, A low_quality) {
  return gt_max_iou > A(0) && gt_max_iou >= low_quality;
}

// Whether (iou, index) comes before (best, best_index): the larger IoU, then the lower index.
template <typename A>
DRCNN_HOST_DEVICE bool comes_first(A iou, int64_t index, A best, int64_t best_index) {
  return iou > best || (iou == best && index < best_index);
}

}  // namespace drcnn
