// The mathematics of ota_assign, once for the C++ and the CUDA kernel: costs, supplies and potentials.
#pragma once

#include <cmath>

#include "box_iou.h"
#include "elementary.h"

namespace drcnn {

constexpr float kOtaLargest = 1e6f;  // of the costs, which are finite
constexpr float kOtaLeast = 1e-30f;  // that a supplier counts as shipping, so that its potential stays finite
constexpr float kOtaStride = 1.7f;   // of a move of the potentials, in moves that would satisfy the supplies
constexpr float kOtaTie = 1.0005e-3f;      // -log(0.999): a share whose logarithm is nearer to the largest ties
constexpr float kOtaClaim = 0.694147681f;  // -log(0.999 / 2): from here on a share contests a prediction

struct OtaRule {
  float class_weight, l1_weight, giou_weight;
  float alpha, gamma;
  int64_t top_q;
  float fixed_k, unit_offset;
  double max_share;
  float epsilon;
  int64_t iterations;
};

// The focal loss of a logit whose class is the label, less that of one whose class is not. NaN for NaN.
DRCNN_HOST_DEVICE float ota_focal_cost(float logit, float alpha, float gamma) {
  const float tail = log_of_normal(1.0f + exp_of_negative(-fabsf(logit)));
  const float negative = not_negative(logit) + tail;   // -log(1 - p)
  const float positive = not_negative(-logit) + tail;  // -log p
  const float hit = alpha * exp_of_negative(-gamma * negative) * positive;
  const float miss = (1.0f - alpha) * exp_of_negative(-gamma * positive) * negative;
  return hit - miss;
}

DRCNN_HOST_DEVICE float ota_distance(float x, float y) { return x < y ? y - x : x - y; }

// The sum of the distances of the coordinates, in image sizes.
DRCNN_HOST_DEVICE float ota_box_distance(const Box<float>& box, const Box<float>& gt, float x_scale, float y_scale) {
  return ota_distance(box.x1 * x_scale, gt.x1 * x_scale) + ota_distance(box.y1 * y_scale, gt.y1 * y_scale) +
         ota_distance(box.x2 * x_scale, gt.x2 * x_scale) + ota_distance(box.y2 * y_scale, gt.y2 * y_scale);
}

// The finite cost of a pair, relative to the background's.
DRCNN_HOST_DEVICE float ota_cost(float logit, float distance, float giou, const OtaRule& rule) {
  const float cost = rule.class_weight * ota_focal_cost(logit, rule.alpha, rule.gamma) +
                     (rule.l1_weight * distance + rule.giou_weight * (1.0f - giou));
  const float bounded = cost < -kOtaLargest ? -kOtaLargest : cost;
  return bounded <= kOtaLargest ? bounded : kOtaLargest;  // NaN is the largest
}

// What a ground truth supplies before all are scaled, from the sum of its largest IoUs.
DRCNN_HOST_DEVICE float ota_units(float iou_sum, const OtaRule& rule) {
  const float whole = floorf(iou_sum);
  const float units = (rule.fixed_k > 0 ? rule.fixed_k : (whole > 1 ? whole : 1.0f)) - rule.unit_offset;
  return units > 1 ? units : 1.0f;
}

// By what the supplies are multiplied when they sum to `total`.
DRCNN_HOST_DEVICE float ota_scale(float total, int64_t count, const OtaRule& rule) {
  const float most = static_cast<float>(rule.max_share * static_cast<double>(count));
  return total > most ? most / total : 1.0f;
}

// The weight of the entropy in an iteration, which falls from 100 epsilon to epsilon.
DRCNN_HOST_DEVICE float ota_epsilon_at(int64_t step, const OtaRule& rule) {
  constexpr float kLogHundred = 4.60517019f;
  const int64_t steps = rule.iterations * 4 / 5;
  if (step >= steps) return rule.epsilon;
  return 100.0f * rule.epsilon * exp_of_negative(-kLogHundred * static_cast<float>(step) / static_cast<float>(steps));
}

// How far the potential of a supplier moves to ship what it has; the last move is exact.
DRCNN_HOST_DEVICE float ota_move(float supply, float shipped, float epsilon, bool is_last) {
  const float ratio = supply / (shipped > kOtaLeast ? shipped : kOtaLeast);
  return (is_last ? 1.0f : kOtaStride) * epsilon * natural_log(ratio);
}

}  // namespace drcnn
