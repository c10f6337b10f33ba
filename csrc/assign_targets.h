// The mathematics of assign_targets, once for the C++ and the CUDA kernel.
#pragma once

#include <cmath>

#include "box_iou.h"

namespace drcnn {

// Whether a box is positive: an IoU of 0 is never a match, whatever the threshold.
template <typename A>
DRCNN_HOST_DEVICE bool is_positive(A max_iou, A threshold) {
  return (max_iou >= threshold) & (max_iou > A(0));
}

// Natural logarithm within 2 ulp, of operations that vectorize. x = 2^k m with m in [sqrt(1/2), sqrt(2)), and
// log m = 2 atanh s with s = (m - 1) / (m + 1), |s| <= 0.172: the series to s^9 is exact to 2e-9.
DRCNN_HOST_DEVICE float natural_log(float x) {
  constexpr float kSmallest = 1.17549435e-38f;  // of the normal numbers
  constexpr uint32_t kRootOfHalf = 0x3f3504f3u;
  const bool is_subnormal = x < kSmallest;
  const float scaled = is_subnormal ? x * 8388608.0f : x;
  uint32_t bits;
  __builtin_memcpy(&bits, &scaled, sizeof(bits));
  const int32_t exponent = static_cast<int32_t>(bits - kRootOfHalf) >> 23;
  const uint32_t mantissa_bits = bits - (static_cast<uint32_t>(exponent) << 23);
  float mantissa;
  __builtin_memcpy(&mantissa, &mantissa_bits, sizeof(mantissa));
  const float k = static_cast<float>(exponent) - (is_subnormal ? 23.0f : 0.0f);
  const float s = (mantissa - 1.0f) / (mantissa + 1.0f);
  const float z = s * s;
  const float series = z * (0.666666667f + z * (0.4f + z * (0.285714286f + z * 0.222222222f)));
  // ln 2 in two parts: k times the first is exact.
  const float value = k * 0.693145752f + (k * 1.42860677e-6f + (s * series + 2.0f * s));
  const float infinity = HUGE_VALF;
  return x > 0.0f ? (x < infinity ? value : infinity) : (x == 0.0f ? -infinity : x - x + NAN);
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
