// topk_statistics on CUDA: one block selects one rank of one image, digit by digit of 8 bits from the top.
//
// The histograms count in integers, so that atomics leave the result independent of timing.

#include "launch.h"
#include "topk_statistics.h"
#include "topk_statistics_arguments.h"

namespace drcnn {
namespace {

constexpr int kThreads = 1024;
constexpr int kDigits = 256;
constexpr int kPerLane = kDigits / kWarp;

// Adds one to the bin of each active thread's digit, with one atomic for all threads of a warp that share it.
__device__ inline void count_digit(uint32_t* histogram, uint32_t digit) {
  const unsigned active = __activemask();
  const unsigned same = __match_any_sync(active, digit);
  if (threadIdx.x % kWarp == static_cast<unsigned>(__ffs(same) - 1)) atomicAdd(histogram + digit, __popc(same));
}

// The digit in which the rank-th largest key lies, and its rank among the keys with this digit. By one warp.
__device__ inline void find_digit(const uint32_t* histogram, uint32_t rank, uint32_t* digit, uint32_t* rank_within) {
  const int lane = threadIdx.x % kWarp;
  const int top = kDigits - 1 - lane * kPerLane;  // the largest digit of this lane
  uint32_t own = 0;
  for (int i = 0; i < kPerLane; ++i) own += histogram[top - i];
  uint32_t above = own;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, above, offset);
    if (lane >= offset) above += other;
  }
  above -= own;
  if (above < rank && rank <= above + own) {
    int d = top;
    for (; above + histogram[d] < rank; --d) above += histogram[d];
    *digit = static_cast<uint32_t>(d);
    *rank_within = rank - above;
  }
}

// Counts what the mask keeps, and the numbers among it; all threads get both.
template <typename T>
__device__ inline void count_row(const T* values, const bool* mask, int64_t count, uint32_t* totals) {
  using A = accumulate_t<T>;
  if (threadIdx.x < 2) totals[threadIdx.x] = 0;
  __syncthreads();
  uint32_t kept = 0;
  uint32_t numbers = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const A value = static_cast<A>(values[i]);
    kept += mask[i];
    numbers += mask[i] && value == value;
  }
  kept = __reduce_add_sync(0xffffffffu, kept);
  numbers = __reduce_add_sync(0xffffffffu, numbers);
  if (threadIdx.x % kWarp == 0) {
    atomicAdd(totals, kept);
    atomicAdd(totals + 1, numbers);
  }
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    topk_statistics_kernel(const T* values, const bool* mask, int64_t count, int64_t k, bool from_smallest, T* kth,
                           int64_t* used) {
  using A = accumulate_t<T>;
  using K = rank_key_t<A>;
  __shared__ uint32_t totals[2];
  __shared__ uint32_t histogram[kDigits];
  __shared__ uint32_t digit;
  __shared__ uint32_t rank_within;
  values += blockIdx.x * count;
  mask += blockIdx.x * count;
  count_row(values, mask, count, totals);
  const uint32_t kept = totals[0];
  uint32_t rank = k < kept ? static_cast<uint32_t>(k) : kept;
  if (threadIdx.x == 0) used[blockIdx.x] = rank;
  if (rank == 0 || rank > totals[1]) {
    if (threadIdx.x == 0) kth[blockIdx.x] = static_cast<T>(rank == 0 ? A(0) : static_cast<A>(NAN));
    return;
  }
  K prefix = 0;
  for (int shift = 8 * sizeof(K) - 8; shift >= 0; shift -= 8) {
    if (threadIdx.x < kDigits) histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      const A value = static_cast<A>(values[i]);
      if (!mask[i] || value != value) continue;
      const K difference = key_of(value, from_smallest) ^ prefix;  // 0 above the digit where the key is still in
      if (((difference >> shift) >> 8) == 0) count_digit(histogram, static_cast<uint32_t>(difference >> shift));
    }
    __syncthreads();
    if (threadIdx.x < kWarp) find_digit(histogram, rank, &digit, &rank_within);
    __syncthreads();
    prefix |= static_cast<K>(digit) << shift;
    rank = rank_within;
    __syncthreads();
  }
  if (threadIdx.x == 0) kth[blockIdx.x] = static_cast<T>(value_of<A>(prefix, from_smallest));
}

void launch(const Selection& selection, bool from_smallest, cudaStream_t stream) {
  const int64_t rows = selection.values.size(0);
  const int64_t count = selection.values.size(1);
  if (rows == 0) return;
  STD_TORCH_CHECK(rows <= 2147483647 && count <= 2147483647, "topk_statistics: too many values, got [", rows, ", ",
                  count, "]");
  dispatch_floating(selection.values.scalar_type(), "topk_statistics", [&](auto type) {
    using T = decltype(type);
    topk_statistics_kernel<T><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
        selection.values.const_data_ptr<T>(), selection.mask.const_data_ptr<bool>(), count, selection.k,
        from_smallest, selection.kth.mutable_data_ptr<T>(), selection.used.mutable_data_ptr<int64_t>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

TopkResult topk_statistics_cuda(const Tensor& max_iou, const Tensor& error, const Tensor& iou_mask,
                                const Tensor& error_mask, int64_t k_iou, int64_t k_error) {
  const torch::stable::accelerator::DeviceGuard guard(max_iou.get_device_index());
  STD_TORCH_CHECK(max_iou.dim() == 2, "topk_statistics: max_iou must have shape [B, N]");
  const Selection iou(max_iou, iou_mask, k_iou, max_iou, "max_iou");
  const Selection errors(error, error_mask, k_error, max_iou, "error");
  const cudaStream_t stream = current_stream(max_iou.get_device_index());
  launch(iou, false, stream);
  launch(errors, true, stream);
  return {iou.kth, iou.used, errors.kth, errors.used};
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_IMPL(drcnn, CUDA, m) { m.impl("topk_statistics", TORCH_BOX(&drcnn::topk_statistics_cuda)); }
