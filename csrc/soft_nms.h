// The mathematics of soft_nms, once for the C++ and the CUDA kernel: how a taken box lowers another's score.
//
// Every float32 operation is rounded on its own, in the order of the PyTorch reference: nothing is contracted
// into FMA (CMakeLists.txt for the CPU, __fmul_rn on the GPU).
#pragma once

#include <algorithm>

#include "nms.h"

namespace drcnn {

// As drcnn/ops/soft_nms.py numbers them.
enum class SoftNmsMethod : int64_t { kHard = 0, kLinear = 1, kGaussian = 2 };

struct SoftNmsRule {
  float threshold;  // IoU from which the hard and the linear method act
  float factor;     // -1 / sigma
  float min_score;
};

// The score of a box that was taken, dropped or never valid. Times 0 it is NaN, which reaches no least score
// either: no decay brings such a box back.
constexpr float kSoftNmsGone = -std::numeric_limits<float>::infinity();

DRCNN_HOST_DEVICE int32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(value);
#else
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

DRCNN_HOST_DEVICE float float_of_bits(int32_t bits) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// The score that a box starts with. -0 becomes 0: the bits of scores from 0 on, as integers, are in their
// order, and those of kSoftNmsGone are negative.
DRCNN_HOST_DEVICE float soft_nms_first_score(float score, float min_score) {
  return score >= min_score ? score + 0.0f : kSoftNmsGone;
}

// The IoU; 0 where it is not defined.
DRCNN_HOST_DEVICE float soft_nms_overlap(const Corners& a, float area_a, const Corners& b, float area_b) {
  const float intersection = nms_intersection(a, b);
  const float overlap = intersection / (area_a + area_b - intersection);
  return overlap > 0 ? overlap : 0.0f;
}

// exp(factor * overlap^2); see soft_nms_weight in drcnn/ops/soft_nms.py.
DRCNN_HOST_DEVICE float soft_nms_weight(float overlap, float factor) {
  float x = rounded_product(rounded_product(overlap, overlap), factor);
  x = x < -87.0f ? -87.0f : x;
  const int32_t k = static_cast<int32_t>(rounded_product(x, 1.44269504f) - 0.5f);
  const float whole = static_cast<float>(k);
  const float r = x - rounded_product(whole, 0.693359375f) - rounded_product(whole, -2.12194440e-4f);
  float p = rounded_product(r, 1.98756915e-4f) + 1.39819995e-3f;
  p = rounded_product(p, r) + 8.33345191e-3f;
  p = rounded_product(p, r) + 4.16657959e-2f;
  p = rounded_product(p, r) + 1.66666655e-1f;
  p = rounded_product(p, r) + 5.00000012e-1f;
  p = rounded_product(rounded_product(r, r), p) + r + 1.0f;
  return rounded_product(p, float_of_bits((k + 127) << 23));
}

// The score of a box after one of its group was taken that it overlaps.
template <SoftNmsMethod kMethod>
DRCNN_HOST_DEVICE float soft_nms_decayed(float score, float overlap, const SoftNmsRule& rule) {
  float decayed;
  if constexpr (kMethod == SoftNmsMethod::kGaussian) {
    decayed = rounded_product(score, soft_nms_weight(overlap, rule.factor));
  } else {
    const float lowered =
        kMethod == SoftNmsMethod::kLinear ? rounded_product(score, 1.0f - overlap) : kSoftNmsGone;
    decayed = overlap >= rule.threshold ? lowered : score;
  }
  return decayed >= rule.min_score ? decayed : kSoftNmsGone;
}

// The smallest float32 that is not below a float64: a float32 reaches both or neither.
inline float soft_nms_least(double least) { return -nms_threshold(-least); }

// See gaussian_factor in drcnn/ops/soft_nms.py.
inline float soft_nms_factor(double sigma) { return static_cast<float>(std::max(-1.0 / sigma, -3e38)); }

}  // namespace drcnn
