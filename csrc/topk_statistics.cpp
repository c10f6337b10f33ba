// topk_statistics on the CPU, and the schema of the operator.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "topk_statistics.h"
#include "topk_statistics_arguments.h"

namespace drcnn {
namespace {

constexpr int64_t kSlack = 2048;   // keys that are collected beyond the best k before the rest is dropped
constexpr int64_t kSlice = 512;    // keys that are computed at once

// Keys of a slice; 0, below the key of every number but a NaN, for what does not count. Returns how many count.
template <typename T, typename A>
inline __attribute__((always_inline)) int64_t slice_chunk(const T* values, const bool* mask, int64_t count,
                                                          bool from_smallest, rank_key_t<A>* keys, int64_t* masked) {
  int32_t numbers = 0;
  int32_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const A value = static_cast<A>(values[i]);
    const bool counts = mask[i] & (value == value);
    keys[i] = counts ? key_of(value, from_smallest) : rank_key_t<A>(0);
    numbers += counts;
    kept += mask[i];
  }
  *masked += kept;
  return numbers;
}

#define DRCNN_TOPK_CPU(T)                                                                                    \
  DRCNN_CPU_CLONES int64_t keys_of(const T* values, const bool* mask, int64_t count, bool from_smallest,     \
                                   rank_key_t<accumulate_t<T>>* keys, int64_t* masked) {                          \
    return slice_chunk<T, accumulate_t<T>>(values, mask, count, from_smallest, keys, masked);                \
  }

DRCNN_TOPK_CPU(float)
DRCNN_TOPK_CPU(double)
DRCNN_TOPK_CPU(torch::headeronly::Half)
DRCNN_TOPK_CPU(torch::headeronly::BFloat16)
#undef DRCNN_TOPK_CPU

// The k largest of a stream of keys, in O(1) per key: whenever the buffer is full, all but the k largest go.
template <typename K>
class Largest {
 public:
  explicit Largest(int64_t k) : k_(k), keys_(k + std::max(k, kSlack) + kSlice) {}

  void add(const K* keys, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      keys_[size_] = keys[i];
      size_ += keys[i] > least_;  // a key equal to the k-th of k that are kept changes nothing
    }
    if (size_ + kSlice > static_cast<int64_t>(keys_.size())) least_ = kth(k_);
  }

  // The rank-th largest, rank <= k; drops what cannot matter any more.
  K kth(int64_t rank) {
    const auto at = keys_.begin() + (rank - 1);
    std::nth_element(keys_.begin(), at, keys_.begin() + size_, std::greater<K>());
    size_ = std::min(size_, k_);
    return *at;
  }

 private:
  int64_t k_;
  int64_t size_ = 0;
  K least_ = 0;
  std::vector<K> keys_;
};

template <typename T>
void select_row(const T* values, const bool* mask, int64_t count, int64_t k, bool from_smallest, T* kth,
                int64_t* used) {
  using A = accumulate_t<T>;
  using K = rank_key_t<A>;
  Largest<K> largest(std::min(k, count));
  K keys[kSlice];
  int64_t numbers = 0;
  int64_t masked = 0;
  for (int64_t start = 0; start < count; start += kSlice) {
    const int64_t size = std::min(kSlice, count - start);
    numbers += keys_of(values + start, mask + start, size, from_smallest, keys, &masked);
    largest.add(keys, size);
  }
  *used = std::min(k, masked);
  A value = 0;
  if (*used > 0) {
    value = *used <= numbers ? value_of<A>(largest.kth(*used), from_smallest) : std::numeric_limits<A>::quiet_NaN();
  }
  *kth = static_cast<T>(value);
}

TopkResult topk_statistics_cpu(const Tensor& max_iou, const Tensor& error, const Tensor& iou_mask,
                               const Tensor& error_mask, int64_t k_iou, int64_t k_error) {
  STD_TORCH_CHECK(max_iou.dim() == 2, "topk_statistics: max_iou must have shape [B, N]");
  Selection selections[2] = {{max_iou, iou_mask, k_iou, max_iou, "max_iou"},
                             {error, error_mask, k_error, max_iou, "error"}};
  const int64_t rows = max_iou.size(0);
  const int64_t count = max_iou.size(1);
  torch::stable::parallel_for(0, 2 * rows, count < kSlack ? 2 * rows + 1 : 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const bool from_smallest = task % 2 == 1;
      const int64_t row = task / 2;
      Selection& selection = selections[task % 2];
      dispatch_floating(selection.values.scalar_type(), "topk_statistics", [&](auto type) {
        using T = decltype(type);
        select_row(selection.values.template const_data_ptr<T>() + row * count,
                   selection.mask.const_data_ptr<bool>() + row * count, count, selection.k, from_smallest,
                   selection.kth.template mutable_data_ptr<T>() + row,
                   selection.used.mutable_data_ptr<int64_t>() + row);
      });
    }
  });
  return {selections[0].kth, selections[0].used, selections[1].kth, selections[1].used};
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_FRAGMENT(drcnn, m) {
  m.def(
      "topk_statistics(Tensor max_iou, Tensor error, Tensor iou_mask, Tensor error_mask, int k_iou, int k_error) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(drcnn, CPU, m) { m.impl("topk_statistics", TORCH_BOX(&drcnn::topk_statistics_cpu)); }
