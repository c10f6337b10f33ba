// ota_assign on the CPU, and the schema of the operator: one image after the other, shared out among threads.
//
// The costs of an image are a row of predictions for each valid ground truth and one of zeros for the background.
// An iteration walks over blocks of predictions that stay in the first-level cache: the largest share, the
// exponentials and their sum for each prediction, then what each supplier ships. One exponential per pair and
// iteration, and no N x G buffer but the costs.

#include <algorithm>
#include <vector>

#include "ota_assign.h"
#include "ota_assign_arguments.h"

namespace drcnn {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 4 * kLanes;  // predictions, of which a row of each supplier is worked on at once
constexpr int64_t kSharedPairs = 1024;  // below this a second thread costs more than it saves

// The predictions of one image as columns, padded to whole blocks.
struct Predictions {
  const float* x1;
  const float* y1;
  const float* x2;
  const float* y2;
  const float* area;
};

// Writes the IoUs and the costs of a ground truth with `columns` predictions; `cost` holds the logits before.
DRCNN_CPU_CLONES void pair_costs(const Predictions& predictions, const Box<float>& gt, float x_scale, float y_scale,
                                 const OtaRule& rule, int64_t columns, float* ious, float* cost) {
  const Predictions p = predictions;
  const OtaRule own_rule = rule;
  const Box<float> own_gt = gt;
  const float gt_area = box_area(own_gt);
#pragma GCC ivdep
  for (int64_t n = 0; n < columns; ++n) {
    const Box<float> box{p.x1[n], p.y1[n], p.x2[n], p.y2[n]};
    ious[n] = iou_of(box, p.area[n], own_gt, gt_area);
    const float giou = giou_of(box, p.area[n], own_gt, gt_area);
    cost[n] = ota_cost(cost[n], ota_box_distance(box, own_gt, x_scale, y_scale), giou, own_rule);
  }
}

// Subtracts the least of `count` costs from each: a potential then starts where the supplier begins to compete.
void subtract_least(float* cost, int64_t count) {
  const float least = *std::min_element(cost, cost + count);
  for (int64_t n = 0; n < count; ++n) cost[n] -= least;
}

// The sum of the `top` largest of `count` values, from the largest on.
float sum_of_largest(const float* values, int64_t count, std::vector<float>& largest, int64_t top) {
  largest.assign(std::min(top, count), 0.0f);
  if (largest.empty()) return 0.0f;
  for (int64_t n = 0; n < count; ++n) {
    if (values[n] <= largest.back()) continue;
    const auto place = std::upper_bound(largest.begin(), largest.end(), values[n], std::greater<float>());
    std::copy_backward(place, largest.end() - 1, largest.end());
    *place = values[n];
  }
  float sum = 0;
  for (const float value : largest) sum += value;
  return sum;
}

// Adds what each supplier ships to one block of predictions, by lanes, when each prediction takes one unit.
DRCNN_CPU_CLONES void ship_block(const float* cost, int64_t stride, int64_t suppliers, int64_t count,
                                 const float* potential, float per_epsilon, float* shares, float* shipped) {
  alignas(64) float most[kBlock];
  alignas(64) float sum[kBlock];
  for (int64_t n = 0; n < kBlock; ++n) most[n] = potential[0] - cost[n];
  for (int64_t s = 1; s < suppliers; ++s) {
    const float* row = cost + s * stride;
    const float own = potential[s];
    for (int64_t n = 0; n < kBlock; ++n) {
      const float score = own - row[n];
      most[n] = score > most[n] ? score : most[n];
    }
  }
  for (int64_t n = 0; n < kBlock; ++n) sum[n] = 0;
  for (int64_t s = 0; s < suppliers; ++s) {
    const float* row = cost + s * stride;
    float* share = shares + s * kBlock;
    const float own = potential[s];
#pragma GCC ivdep
    for (int64_t n = 0; n < kBlock; ++n) {
      share[n] = exp_of_negative((own - row[n] - most[n]) * per_epsilon);
      sum[n] += share[n];
    }
  }
  for (int64_t n = 0; n < kBlock; ++n) sum[n] = n < count ? 1.0f / sum[n] : 0.0f;
  for (int64_t s = 0; s < suppliers; ++s) {
    const float* share = shares + s * kBlock;
    float* lanes = shipped + s * kLanes;
#pragma GCC ivdep
    for (int64_t l = 0; l < kLanes; ++l) {
      lanes[l] += (share[l] * sum[l] + share[l + kLanes] * sum[l + kLanes]) +
                  (share[l + 2 * kLanes] * sum[l + 2 * kLanes] + share[l + 3 * kLanes] * sum[l + 3 * kLanes]);
    }
  }
}

// Finds who takes each of a block of predictions, and which of them are contested by another ground truth.
DRCNN_CPU_CLONES void take_block(const float* cost, int64_t stride, int64_t suppliers, const float* potential,
                                 float epsilon, int32_t* taken_by, int32_t* contested) {
  alignas(64) float most[kBlock];
  for (int64_t n = 0; n < kBlock; ++n) most[n] = potential[0] - cost[n];
  for (int64_t s = 1; s < suppliers; ++s) {
    const float* row = cost + s * stride;
    for (int64_t n = 0; n < kBlock; ++n) most[n] = greater(potential[s] - row[n], most[n]);
  }
  for (int64_t n = 0; n < kBlock; ++n) taken_by[n] = contested[n] = 0;
  for (int64_t s = suppliers - 1; s >= 0; --s) {  // the first of those that tie is written last
    const float* row = cost + s * stride;
    for (int64_t n = 0; n < kBlock; ++n) {
      const bool ties = potential[s] - row[n] >= most[n] - kOtaTie * epsilon;
      taken_by[n] = ties ? static_cast<int32_t>(s) : taken_by[n];
    }
  }
  for (int64_t s = 0; s < suppliers - 1; ++s) {
    const float* row = cost + s * stride;
    for (int64_t n = 0; n < kBlock; ++n) {
      const bool claims = potential[s] - row[n] >= most[n] - kOtaClaim * epsilon;
      contested[n] |= static_cast<int32_t>(claims & (taken_by[n] != static_cast<int32_t>(s)));
    }
  }
}

// The transport problem of one image. Suppliers are the valid ground truths, in order, and the background.
class Transport {
 public:
  explicit Transport(const OtaArguments& args)
      : args_(args),
        stride_((args.count + kBlock - 1) / kBlock * kBlock),
        cost_((args.gts + 1) * stride_),
        columns_(5 * stride_),
        ious_(stride_),
        supply_(args.gts + 1),
        potential_(args.gts + 1),
        shares_((args.gts + 1) * kBlock),
        shipped_((args.gts + 1) * kLanes) {}

  void assign(int64_t image, int64_t* gt_index, float* supply, int64_t* conflicts) {
    const bool* valid = args_.gt_valid.const_data_ptr<bool>() + image * args_.gts;
    rows_.clear();
    for (int64_t g = 0; g < args_.gts; ++g) {
      if (valid[g]) rows_.push_back(g);
    }
    load(image);
    std::fill(supply, supply + args_.gts, 0.0f);
    for (size_t row = 0; row < rows_.size(); ++row) supply[rows_[row]] = supply_[row];
    solve();
    *conflicts = take(gt_index);
  }

 private:
  int64_t suppliers() const { return static_cast<int64_t>(rows_.size()) + 1; }

  // Costs and supplies of the ground truths, and of the background.
  void load(int64_t image) {
    const int64_t count = args_.count;
    const float* boxes = args_.boxes.const_data_ptr<float>() + 4 * image * count;
    const float* logits = args_.logits.const_data_ptr<float>() + image * count * args_.classes;
    const float* gt_boxes = args_.gt_boxes.const_data_ptr<float>() + 4 * image * args_.gts;
    const int64_t* labels = args_.gt_labels.const_data_ptr<int64_t>() + image * args_.gts;
    const float* size = args_.image_sizes.const_data_ptr<float>() + 2 * image;
    float* column[5];
    for (int64_t c = 0; c < 5; ++c) column[c] = columns_.data() + c * stride_;
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t c = 0; c < 4; ++c) column[c][n] = boxes[4 * n + c];
      column[4][n] = box_area(Box<float>{column[0][n], column[1][n], column[2][n], column[3][n]});
    }
    const Predictions predictions{column[0], column[1], column[2], column[3], column[4]};
    float total = 0;
    for (size_t row = 0; row < rows_.size(); ++row) {
      const int64_t g = rows_[row];
      STD_TORCH_CHECK(labels[g] >= 0 && labels[g] < args_.classes, "ota_assign: gt_labels[", image, ", ", g,
                      "] must be in 0..", args_.classes - 1, ", got ", labels[g]);
      float* cost = cost_.data() + row * stride_;
      for (int64_t n = 0; n < count; ++n) cost[n] = logits[n * args_.classes + labels[g]];
      const Box<float> gt{gt_boxes[4 * g], gt_boxes[4 * g + 1], gt_boxes[4 * g + 2], gt_boxes[4 * g + 3]};
      pair_costs(predictions, gt, 1.0f / size[1], 1.0f / size[0], args_.rule, stride_, ious_.data(), cost);
      if (count > 0) subtract_least(cost, count);
      supply_[row] = ota_units(sum_of_largest(ious_.data(), count, largest_, args_.rule.top_q), args_.rule);
      total += supply_[row];
    }
    const float scale = ota_scale(total, count, args_.rule);
    float shipped = 0;
    for (size_t row = 0; row < rows_.size(); ++row) shipped += supply_[row] *= scale;
    supply_[rows_.size()] = not_negative(static_cast<float>(count) - shipped);
    std::fill_n(cost_.data() + rows_.size() * stride_, stride_, 0.0f);
  }

  void solve() {
    const OtaRule& rule = args_.rule;
    std::fill(potential_.begin(), potential_.end(), 0.0f);
    for (int64_t step = 0; step < rule.iterations && suppliers() > 1; ++step) {
      const float epsilon = ota_epsilon_at(step, rule);
      std::fill(shipped_.begin(), shipped_.end(), 0.0f);
      for (int64_t first = 0; first < args_.count; first += kBlock) {
        ship_block(cost_.data() + first, stride_, suppliers(), args_.count - first, potential_.data(),
                   1.0f / epsilon, shares_.data(), shipped_.data());
      }
      for (int64_t s = 0; s < suppliers(); ++s) {
        float shipped = 0;
        for (int64_t l = 0; l < kLanes; ++l) shipped += shipped_[s * kLanes + l];
        potential_[s] += ota_move(supply_[s], shipped, epsilon, step + 1 == rule.iterations);
      }
    }
  }

  // Writes who takes each prediction, and returns how many are contested.
  int64_t take(int64_t* gt_index) const {
    int32_t taken_by[kBlock], contested[kBlock];
    int64_t conflicts = 0;
    for (int64_t first = 0; first < args_.count; first += kBlock) {
      take_block(cost_.data() + first, stride_, suppliers(), potential_.data(), args_.rule.epsilon, taken_by,
                 contested);
      const int64_t size = std::min(kBlock, args_.count - first);
      for (int64_t n = 0; n < size; ++n) {
        gt_index[first + n] = taken_by[n] + 1 < suppliers() ? rows_[taken_by[n]] : -1;
        conflicts += contested[n];
      }
    }
    return conflicts;
  }

  const OtaArguments& args_;
  int64_t stride_;
  std::vector<int64_t> rows_;  // the valid ground truths
  std::vector<float> cost_;
  std::vector<float> columns_;
  std::vector<float> ious_;
  std::vector<float> largest_;
  std::vector<float> supply_;
  std::vector<float> potential_;
  std::vector<float> shares_;
  std::vector<float> shipped_;
};

OtaResult ota_assign_cpu(const Tensor& logits, const Tensor& boxes, const Tensor& gt_boxes, const Tensor& gt_labels,
                         const Tensor& gt_valid, const Tensor& image_sizes, double class_weight, double l1_weight,
                         double giou_weight, double alpha, double gamma, int64_t top_q, int64_t fixed_k,
                         double unit_offset, double max_share, double epsilon, int64_t iterations) {
  const OtaArguments args(logits, boxes, gt_boxes, gt_labels, gt_valid, image_sizes,
                          ota_rule(class_weight, l1_weight, giou_weight, alpha, gamma, top_q, fixed_k, unit_offset,
                                   max_share, epsilon, iterations));
  Tensor gt_index = args.make({args.images, args.count}, ScalarType::Long);
  Tensor supply = args.make({args.images, args.gts}, ScalarType::Float);
  Tensor conflicts = args.make({args.images}, ScalarType::Long);
  int64_t* index_out = gt_index.mutable_data_ptr<int64_t>();
  float* supply_out = supply.mutable_data_ptr<float>();
  int64_t* conflicts_out = conflicts.mutable_data_ptr<int64_t>();
  const bool is_shared = args.images * args.count * args.gts > kSharedPairs;
  torch::stable::parallel_for(0, args.images, is_shared ? 1 : std::max<int64_t>(args.images, 1),
                              [&](int64_t first, int64_t last) {
                                Transport transport(args);
                                for (int64_t b = first; b < last; ++b) {
                                  transport.assign(b, index_out + b * args.count, supply_out + b * args.gts,
                                                   conflicts_out + b);
                                }
                              });
  return {gt_index, supply, conflicts};
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_FRAGMENT(drcnn, m) {
  m.def(
      "ota_assign(Tensor logits, Tensor boxes, Tensor gt_boxes, Tensor gt_labels, Tensor gt_valid, Tensor "
      "image_sizes, float class_weight, float l1_weight, float giou_weight, float alpha, float gamma, int top_q, int "
      "fixed_k, float unit_offset, float max_share, float epsilon, int iterations) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(drcnn, CPU, m) { m.impl("ota_assign", TORCH_BOX(&drcnn::ota_assign_cpu)); }
