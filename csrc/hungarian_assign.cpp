// hungarian_assign on the CPU, and the schema of the operator: one image after the other, shared out among threads.
//
// The costs of an image are laid out ground truth by ground truth, so that a step of the search is one vectorized
// pass over the predictions. Finite float32 costs stay float32, which halves what a pass reads; distances and
// prices are double. In a search, a column is closed by the price -infinity, at which no way through it is shorter.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "hungarian_assign.h"
#include "hungarian_assign_arguments.h"

namespace drcnn {
namespace {

constexpr int64_t kLanes = 8;              // columns are padded to a multiple
constexpr int64_t kTile = 16;              // predictions whose costs are transposed together
constexpr int64_t kSharedCosts = 1 << 18;  // below this a second thread costs more than it saves

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

// Columns side by side. As loops over arrays, the minimum would go through memory from step to step.
using Doubles = double __attribute__((vector_size(kLanes * sizeof(double))));
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Integers = int64_t __attribute__((vector_size(kLanes * sizeof(int64_t))));

// Measures the columns through a row, from scratch or from the distances so far.
template <bool kFirst, typename S>
DRCNN_HOST_DEVICE Nearest measure(const S* cost, const double* price, double base, int64_t row, int64_t columns,
                                  double* distance, int64_t* path) {
  Doubles least = Doubles{} + kHungarianFar;
  Integers where = Integers{} + columns;
  Integers places = {0, 1, 2, 3, 4, 5, 6, 7};
  for (int64_t i = 0; i < columns; i += kLanes) {
    std::conditional_t<std::is_same_v<S, float>, Floats, Doubles> costs;
    Doubles prices;
    __builtin_memcpy(&costs, cost + i, sizeof(costs));
    __builtin_memcpy(&prices, price + i, sizeof(prices));
    Doubles reached = base + (__builtin_convertvector(costs, Doubles) - prices);
    Integers through = Integers{} + row;
    if constexpr (!kFirst) {
      Doubles before;
      Integers path_before;
      __builtin_memcpy(&before, distance + i, sizeof(before));
      __builtin_memcpy(&path_before, path + i, sizeof(path_before));
      through = reached < before ? through : path_before;
      reached = reached < before ? reached : before;
    }
    __builtin_memcpy(distance + i, &reached, sizeof(reached));
    __builtin_memcpy(path + i, &through, sizeof(through));
    where = reached < least ? places : where;
    least = reached < least ? reached : least;
    places += kLanes;
  }
  Nearest nearest{least[0], where[0]};
  for (int64_t l = 1; l < kLanes; ++l) {
    const bool is_tie = least[l] == nearest.distance && where[l] < nearest.column;
    if (least[l] < nearest.distance || is_tie) nearest = {least[l], where[l]};
  }
  return nearest;
}

#define DRCNN_HUNGARIAN_CPU(S)                                                                              \
  DRCNN_CPU_CLONES Nearest measure_first(const S* cost, const double* price, int64_t row, int64_t columns,  \
                                         double* distance, int64_t* path) {                                 \
    return measure<true>(cost, price, 0.0, row, columns, distance, path);                                   \
  }                                                                                                         \
  DRCNN_CPU_CLONES Nearest measure_next(const S* cost, const double* price, double base, int64_t row,       \
                                        int64_t columns, double* distance, int64_t* path) {                 \
    return measure<false>(cost, price, base, row, columns, distance, path);                                 \
  }

DRCNN_HUNGARIAN_CPU(float)
DRCNN_HUNGARIAN_CPU(double)
#undef DRCNN_HUNGARIAN_CPU

// Whether costs may stay float32.
DRCNN_CPU_CLONES bool is_finite_float(const float* cost, int64_t count) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  int32_t odd = 0;
  for (int64_t i = 0; i < count; ++i) odd |= (cost[i] >= -kLargest) & (cost[i] <= kLargest) ? 0 : 1;
  return odd == 0;
}

template <typename T>
bool is_finite_float(const T*, int64_t) {
  return false;
}

// The pairs and prices of one image; a row is a valid ground truth, a column a prediction or the sink.
class Search {
 public:
  Search(int64_t count, int64_t gts)
      : count_(count),
        gts_(gts),
        columns_((count + 1 + kLanes - 1) / kLanes * kLanes),
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
    std::fill(price_.begin(), price_.end(), 0.0);
    std::fill(row_of_.begin(), row_of_.end(), -1);
    if (rows() <= count_ && is_finite_float(cost, count_ * gts_)) {
      lay_out(cost, near_);
      serve_all(near_);
    } else {
      lay_out(cost, far_);
      bound(far_);
      serve_all(far_);
    }
    for (int64_t n = 0; n < count_; ++n) gt_index[n] = row_of_[n] < 0 ? -1 : rows_[row_of_[n]];
  }

 private:
  int64_t rows() const { return static_cast<int64_t>(rows_.size()); }

  // Writes the costs row by row; those past the last prediction, the sink's too, are infinite.
  template <typename T, typename S>
  void lay_out(const T* cost, std::vector<S>& costs) const {
    costs.resize(columns_ * gts_);
    for (int64_t start = 0; start < count_; start += kTile) {
      const int64_t end = std::min(start + kTile, count_);
      for (int64_t row = 0; row < rows(); ++row) {
        S* out = costs.data() + row * columns_;
        for (int64_t n = start; n < end; ++n) out[n] = static_cast<S>(cost[n * gts_ + rows_[row]]);
      }
    }
    for (int64_t row = 0; row < rows(); ++row) {
      S* out = costs.data() + row * columns_;
      std::fill(out + count_, out + columns_, std::numeric_limits<S>::infinity());
    }
  }

  // Replaces costs that are not finite, and lets ground truths be left over at the cost of the sink.
  void bound(std::vector<double>& costs) const {
    double low = kHungarianFar, high = -kHungarianFar;
    const auto each = [&](const auto& function) {
      for (int64_t row = 0; row < rows(); ++row) {
        for (int64_t n = 0; n < count_; ++n) function(costs[row * columns_ + n]);
      }
    };
    each([&](double value) {
      if (!hungarian_is_finite(value)) return;
      low = std::min(low, value);
      high = std::max(high, value);
    });
    const HungarianBounds bounds = hungarian_bounds(low, high, count_, gts_);
    each([&](double& value) { value = hungarian_cost(value, bounds); });
    for (int64_t row = 0; row < rows(); ++row) costs[row * columns_ + count_] = bounds.sink;
  }

  template <typename S>
  void serve_all(const std::vector<S>& costs) {
    for (int64_t row = 0; row < rows(); ++row) serve(costs.data(), row);
  }

  // Finds the shortest path from a row to a free column, and shifts the pairs along it.
  template <typename S>
  void serve(const S* costs, int64_t row) {
    closed_.clear();
    Nearest end =
        measure_first(costs + row * columns_, price_.data(), row, columns_, distance_.data(), path_.data());
    while (row_of_[end.column] >= 0) {
      closed_.push_back({end.column, end.distance, price_[end.column]});
      distance_[end.column] = kHungarianFar;
      price_[end.column] = -kHungarianFar;
      const int64_t through = row_of_[end.column];
      end = measure_next(costs + through * columns_, price_.data(), end.distance - row_price_[through], through,
                         columns_, distance_.data(), path_.data());
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
  std::vector<float> near_;    // costs by row: finite ones,
  std::vector<double> far_;    // or any
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
