// hungarian_assign on the CPU, and the schema of the operator: one image after the other, shared out among threads.
//
// The costs of an image are laid out ground truth by ground truth, in double, so that a step of the search is one
// vectorized pass over the predictions. In a search, a column is closed by the price -infinity, at which no way
// through it is shorter.

#include <algorithm>
#include <vector>

#include "hungarian_assign.h"
#include "hungarian_assign_arguments.h"

namespace drcnn {
namespace {

constexpr int64_t kLanes = 16;          // columns are padded to a multiple
constexpr int64_t kTile = 16;           // predictions whose costs are transposed together
constexpr int64_t kSharedCosts = 4096;  // below this a second thread costs more than it saves

// A column that a search has closed, and what it was before.
struct Closed {
  int64_t column;
  double distance;
  double price;
};

// The open column at the least distance, of several the first.
struct Nearest {
  double distance;
  int64_t column;
};

// Measures the columns through a row, from scratch or from the distances so far.
template <bool kFirst>
DRCNN_HOST_DEVICE Nearest measure(const double* __restrict cost, const double* __restrict price, double base,
                                  int64_t row, int64_t columns, double* __restrict distance,
                                  int64_t* __restrict path) {
  double least[kLanes];
  int64_t where[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) least[l] = kHungarianFar;
  for (int64_t l = 0; l < kLanes; ++l) where[l] = columns;
  for (int64_t i = 0; i < columns; i += kLanes) {
#pragma GCC ivdep
    for (int64_t l = 0; l < kLanes; ++l) {
      const double through = hungarian_distance(base, cost[i + l], price[i + l]);
      const double before = kFirst ? kHungarianFar : distance[i + l];
      const bool is_shorter = kFirst | (through < before);
      const double after = is_shorter ? through : before;
      distance[i + l] = after;
      path[i + l] = is_shorter ? row : path[i + l];
      where[l] = after < least[l] ? i + l : where[l];
      least[l] = after < least[l] ? after : least[l];
    }
  }
  Nearest nearest{least[0], where[0]};
  for (int64_t l = 1; l < kLanes; ++l) {
    const bool is_nearer = (least[l] < nearest.distance) | ((least[l] == nearest.distance) & (where[l] < nearest.column));
    if (is_nearer) nearest = {least[l], where[l]};
  }
  return nearest;
}

DRCNN_CPU_CLONES Nearest measure_first(const double* cost, const double* price, int64_t row, int64_t columns,
                                       double* distance, int64_t* path) {
  return measure<true>(cost, price, 0.0, row, columns, distance, path);
}

DRCNN_CPU_CLONES Nearest measure_next(const double* cost, const double* price, double base, int64_t row,
                                      int64_t columns, double* distance, int64_t* path) {
  return measure<false>(cost, price, base, row, columns, distance, path);
}

// The least and the greatest of the finite costs, and whether all are.
struct Range {
  double low = kHungarianFar;
  double high = -kHungarianFar;
  bool all_finite = true;
};

DRCNN_CPU_CLONES Range range_of(const double* cost, int64_t count) {
  double low[kLanes], high[kLanes];
  int64_t odd[kLanes] = {};
  for (int64_t l = 0; l < kLanes; ++l) low[l] = kHungarianFar;
  for (int64_t l = 0; l < kLanes; ++l) high[l] = -kHungarianFar;
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const double value = cost[i + l];
      const bool is_finite = hungarian_is_finite(value);
      const double lower = is_finite ? value : kHungarianFar;
      const double higher = is_finite ? value : -kHungarianFar;
      low[l] = lower < low[l] ? lower : low[l];
      high[l] = higher > high[l] ? higher : high[l];
      odd[l] += is_finite ? 0 : 1;
    }
  }
  Range range;
  for (int64_t l = 0; l < kLanes; ++l) {
    range.low = low[l] < range.low ? low[l] : range.low;
    range.high = high[l] > range.high ? high[l] : range.high;
    range.all_finite &= odd[l] == 0;
  }
  return range;
}

// The pairs and prices of one image; a row is a valid ground truth, a column a prediction or the sink.
class Search {
 public:
  Search(int64_t count, int64_t gts)
      : count_(count),
        gts_(gts),
        columns_((count + 1 + kLanes - 1) / kLanes * kLanes),
        cost_(columns_ * gts),
        price_(columns_),
        distance_(columns_),
        path_(columns_),
        row_of_(columns_),
        row_price_(gts),
        column_of_(gts) {}

  template <typename T>
  void assign(const T* cost, const bool* valid, int64_t* gt_index) {
    rows_.clear();
    for (int64_t g = 0; g < gts_; ++g) {
      if (valid[g]) rows_.push_back(g);
    }
    load(cost);
    std::fill(price_.begin(), price_.end(), 0.0);
    std::fill(row_of_.begin(), row_of_.end(), -1);
    for (int64_t row = 0; row < static_cast<int64_t>(rows_.size()); ++row) serve(row);
    for (int64_t n = 0; n < count_; ++n) gt_index[n] = row_of_[n] < 0 ? -1 : rows_[row_of_[n]];
  }

 private:
  double* costs_of(int64_t row) { return cost_.data() + row * columns_; }

  template <typename T>
  void load(const T* cost) {
    const int64_t rows = static_cast<int64_t>(rows_.size());
    for (int64_t start = 0; start < count_; start += kTile) {
      const int64_t end = std::min(start + kTile, count_);
      for (int64_t row = 0; row < rows; ++row) {
        double* out = costs_of(row);
        for (int64_t n = start; n < end; ++n) out[n] = static_cast<double>(cost[n * gts_ + rows_[row]]);
      }
    }
    // Costs past the last prediction repeat one, and widen nothing.
    for (int64_t row = 0; row < rows; ++row) std::fill(costs_of(row) + count_, costs_of(row + 1), *costs_of(row));
    const Range range = range_of(cost_.data(), rows * columns_);
    const HungarianBounds bounds = hungarian_bounds(range.low, range.high, count_, gts_);
    for (int64_t row = 0; row < rows; ++row) {
      double* out = costs_of(row);
      for (int64_t n = 0; !range.all_finite && n < count_; ++n) out[n] = hungarian_cost(out[n], bounds);
      out[count_] = bounds.sink;
      std::fill(out + count_ + 1, costs_of(row + 1), kHungarianFar);
    }
  }

  // Finds the shortest path from a row to a free column, and shifts the pairs along it.
  void serve(int64_t row) {
    closed_.clear();
    Nearest end = measure_first(costs_of(row), price_.data(), row, columns_, distance_.data(), path_.data());
    while (row_of_[end.column] >= 0) {
      closed_.push_back({end.column, end.distance, price_[end.column]});
      distance_[end.column] = kHungarianFar;
      price_[end.column] = -kHungarianFar;
      const int64_t through = row_of_[end.column];
      end = measure_next(costs_of(through), price_.data(), end.distance - row_price_[through], through, columns_,
                         distance_.data(), path_.data());
    }
    for (const Closed& before : closed_) {
      const double gain = end.distance - before.distance;
      price_[before.column] = before.price - gain;
      row_price_[row_of_[before.column]] += gain;
    }
    row_price_[row] = end.distance;
    for (int64_t column = end.column, from = -1; from != row;) {
      from = path_[column];
      if (column != count_) row_of_[column] = from;
      std::swap(column, column_of_[from]);
    }
  }

  int64_t count_;
  int64_t gts_;
  int64_t columns_;
  std::vector<int64_t> rows_;  // the valid ground truths
  std::vector<double> cost_;
  std::vector<double> price_;
  std::vector<double> distance_;
  std::vector<int64_t> path_;
  std::vector<int64_t> row_of_;  // of the sink always -1
  std::vector<double> row_price_;
  std::vector<int64_t> column_of_;
  std::vector<Closed> closed_;
};

Tensor hungarian_assign_cpu(const Tensor& cost, const Tensor& gt_valid) {
  const HungarianArguments args(cost, gt_valid);
  Tensor gt_index = args.new_output();
  int64_t* index = gt_index.mutable_data_ptr<int64_t>();
  const bool* valid = args.gt_valid.const_data_ptr<bool>();
  const int64_t costs = args.count * args.gts;
  const int64_t grain = args.images * costs > kSharedCosts ? 1 : std::max<int64_t>(args.images, 1);
  dispatch_floating(args.cost.scalar_type(), "hungarian_assign", [&](auto type) {
    using T = decltype(type);
    const T* values = args.cost.template const_data_ptr<T>();
    torch::stable::parallel_for(0, args.images, grain, [&](int64_t first, int64_t last) {
      Search search(args.count, args.gts);
      for (int64_t b = first; b < last; ++b) {
        search.assign(values + b * costs, valid + b * args.gts, index + b * args.count);
      }
    });
  });
  return gt_index;
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_FRAGMENT(drcnn, m) { m.def("hungarian_assign(Tensor cost, Tensor gt_valid) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(drcnn, CPU, m) { m.impl("hungarian_assign", TORCH_BOX(&drcnn::hungarian_assign_cpu)); }
