// The mathematics of nms, once for the C++ and the CUDA kernel: the order of the boxes and the test of a pair.
//
// Every backend decides exactly as torchvision's CPU kernel does, so every float32 operation is rounded on its
// own: nothing is contracted into FMA (CMakeLists.txt for the CPU, __fmul_rn on the GPU).
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "portable.h"

namespace drcnn {

struct Corners {
  float x1, y1, x2, y2;
};

DRCNN_HOST_DEVICE float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// A box with a NaN has the area NaN, hence no IoU: what max and min below return for a NaN does not matter.
DRCNN_HOST_DEVICE float nms_area(const Corners& box) {
  return rounded_product(box.x2 - box.x1, box.y2 - box.y1);
}

DRCNN_HOST_DEVICE float nms_intersection(const Corners& a, const Corners& b) {
  const float width = (a.x2 < b.x2 ? a.x2 : b.x2) - (a.x1 > b.x1 ? a.x1 : b.x1);
  const float height = (a.y2 < b.y2 ? a.y2 : b.y2) - (a.y1 > b.y1 ? a.y1 : b.y1);
  return rounded_product(width > 0 ? width : 0.0f, height > 0 ? height : 0.0f);
}

// False only where the IoU cannot be above the threshold; costs no division. Rounding is monotone: if the
// quotient rounds to more than the threshold then intersection > threshold * union as real numbers, and the
// product rounds to no more than the intersection. This needs a union above 0, which every pair has whose
// intersection is above 0; with a threshold below 0 pairs without intersection count too, and all may pass.
DRCNN_HOST_DEVICE bool nms_may_overlap(float intersection, float joined, float threshold) {
  return threshold < 0 || intersection >= threshold * joined;
}

// A quotient of NaN (0 / 0, a NaN, an infinite area) is not above any threshold.
DRCNN_HOST_DEVICE bool nms_overlaps(const Corners& a, float area_a, const Corners& b, float area_b,
                                    float threshold) {
  const float intersection = nms_intersection(a, b);
  const float joined = area_a + area_b - intersection;
  return nms_may_overlap(intersection, joined, threshold) && intersection / joined > threshold;
}

// Rises while the score falls, in the order of torch.sort: NaN first, -0 equal to 0.
DRCNN_HOST_DEVICE uint32_t nms_sort_key(float score) {
  if (score != score) return 0;
  if (score == 0) score = 0;
#if defined(__CUDA_ARCH__)
  const uint32_t bits = __float_as_uint(score);
#else
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
#endif
  return bits >> 31 ? bits : ~(bits | 0x80000000u);
}

// The largest float32 that is not above a float64. A float32 is above the one exactly where it is above the
// other, so comparing with it gives what torchvision's comparison with the float64 gives.
inline float nms_threshold(double threshold) {
  const float nearest = static_cast<float>(threshold);
  if (static_cast<double>(nearest) <= threshold || threshold != threshold) return nearest;
  return std::nextafter(nearest, -std::numeric_limits<float>::infinity());
}

}  // namespace drcnn
