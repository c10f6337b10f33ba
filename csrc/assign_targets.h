// The mathematics of assign_targets, once for the C++ and the CUDA kernel.
#pragma once

#include "box_iou.h"
#include "elementary.h"

namespace drcnn {

// Whether a box is positive: an IoU of 0 is never a match, whatever the threshold.
template <typename A>
DRCNN_HOST_DEVICE bool is_positive(A max_iou, A threshold) {
  return (max_iou >= threshold) & (max_iou > A(0));
}

DRCNN_HOST_DEVICE double natural_log(double x) { return ::log(x); }

template <typename A>
struct Deltas {
  A dx, dy, dw, dh;
};

// The way from a box to its ground truth, 0 where either has no area.
template <typename A>
DRCNN_HOST_DEVICE Deltas<A> deltas_of(const Box<A>& box, const Box<A>& gt, const Deltas<A>& weights) {
  const A width = box.x2 - box.x1, height = box.y2 - box.y1;
  const A gt_width = gt.x2 - gt.x1, gt_height = gt.y2 - gt.y1;
  // & instead of && leaves no branch in the loop.
  const bool has_area = (width > A(0)) & (height > A(0)) & (gt_width > A(0)) & (gt_height > A(0));
  const A half = A(0.5);
  const A offset_x = (gt.x1 + half * gt_width) - (box.x1 + half * width);
  const A offset_y = (gt.y1 + half * gt_height) - (box.y1 + half * height);
  const A one = A(1);
  const A dx = weights.dx * (offset_x / width), dy = weights.dy * (offset_y / height);
  const A dw = weights.dw * natural_log(has_area ? gt_width / width : one);
  const A dh = weights.dh * natural_log(has_area ? gt_height / height : one);
  return {has_area ? dx : A(0), has_area ? dy : A(0), has_area ? dw : A(0), has_area ? dh : A(0)};
}

}  // namespace drcnn
