// The mathematics of hungarian_assign, once for the C++ and the CUDA kernel.
//
// All is computed in double, by the sums of the PyTorch reference in its order, so that all backends take the
// same decisions: a column is (distance of the row - price of the row) + (cost - price of the column) away.
// Products are rounded on their own: nothing is contracted into FMA.
#pragma once

#include <limits>

#include "box_iou.h"

namespace drcnn {

constexpr double kHungarianFar = std::numeric_limits<double>::infinity();
constexpr double kHungarianLargest = 1e150;  // a cost beyond counts as infinite: no sum of finite ones overflows

DRCNN_HOST_DEVICE bool hungarian_is_finite(double cost) {
  return (cost >= -kHungarianLargest) & (cost <= kHungarianLargest);
}

// What stands for costs that are not finite, and for being left without a prediction.
struct HungarianBounds {
  double worst;  // costs more than any two sums of finite costs differ
  double best;   // and that much less
  double sink;   // costs more than all pairs of an image can
};

// `low` and `high` of the finite costs of the valid ground truths, infinity and -infinity where there is none.
DRCNN_HOST_DEVICE HungarianBounds hungarian_bounds(double low, double high, int64_t count, int64_t gts) {
  if (!(low <= high)) low = high = 0;
  const double pairs = static_cast<double>((count < gts ? count : gts) + 1);
  const double size = high < 0 ? -high : high;
  const double spread = high > low ? high - low : (size > 1 ? size : 1.0);
  const double reach = unfused_product(spread, pairs);
  const double worst = high + reach;
  const double best = low - reach;
  return {worst, best, worst + unfused_product(worst - best, pairs)};
}

DRCNN_HOST_DEVICE double hungarian_cost(double cost, const HungarianBounds& bounds) {
  return hungarian_is_finite(cost) ? cost : (cost < 0 ? bounds.best : bounds.worst);
}

}  // namespace drcnn
