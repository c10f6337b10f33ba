// focal_loss on CUDA: four logits of one row per load of 16 bytes (8 for half precision) where rows allow it, sums
// in two stages without atomics.

#include <algorithm>

#include "focal_loss.h"
#include "focal_loss_arguments.h"
#include "launch.h"

namespace drcnn {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kGroupsPerThread = 4;
constexpr int64_t kMaxBlocks = 1024;  // partial sums; enough to fill a GPU, few enough for one block to add up

// Finds the row of a logit by a product: a 64-bit division would cost more than the loss.
struct RowFinder {
  int64_t classes;
  uint64_t inverse;  // 2^64 / classes, rounded up; unused for one class

  explicit RowFinder(const FocalLossArguments& args) : classes(args.classes), inverse(~uint64_t(0) / classes + 1) {
    // The product is exact while (classes - 1) * numel < 2^64.
    STD_TORCH_CHECK(args.logits.numel() <= INT64_MAX / classes, "focal_loss: too many logits");
  }

  __device__ int64_t row_of(int64_t element) const {
    return classes == 1 ? element : static_cast<int64_t>(__umul64hi(element, inverse));
  }
};

// kWidth neighbouring logits of one row.
template <typename T, int kWidth>
struct Group {
  T values[kWidth];
};

template <int kWidth, typename T>
__device__ Group<T, kWidth> load_group(const T* pointer) {
  Group<T, kWidth> group;
  if constexpr (kWidth == 4) {
    const Four<T> four = load_four<true>(pointer);
#pragma unroll
    for (int c = 0; c < 4; ++c) group.values[c] = four.values[c];
  } else {
    group.values[0] = *pointer;
  }
  return group;
}

template <typename T, int kWidth>
__device__ void store_group(T* pointer, const Group<T, kWidth>& group) {
  if constexpr (kWidth == 4) {
    store_four<true>(pointer, Four<T>{group.values[0], group.values[1], group.values[2], group.values[3]});
  } else {
    *pointer = group.values[0];
  }
}

template <typename T, int kWidth, bool kSquare>
__global__ void __launch_bounds__(kThreads)
    focal_loss_fwd_kernel(const T* logits, const int64_t* labels, const bool* mask, RowFinder rows, int64_t groups,
                          FocalWeights<accumulate_t<T>> weights, accumulate_t<T>* partial) {
  using A = accumulate_t<T>;
  A sum = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; group < groups; group += stride) {
    const int64_t first = group * kWidth, row = rows.row_of(first);
    if (mask != nullptr && !mask[row]) continue;
    const int64_t place = labels[row] - (first - row * rows.classes);
    const Group<T, kWidth> x = load_group<kWidth>(logits + first);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const A value = static_cast<A>(x.values[c]);
      const A loss = focal_value<kSquare>(c == place ? -value : value, weights.gamma);
      sum += (c == place ? weights.there : weights.absent) * loss;
    }
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

template <typename T, int kWidth, bool kSquare>
__global__ void __launch_bounds__(kThreads)
    focal_loss_bwd_kernel(const accumulate_t<T>* grad_pointer, const T* logits, const int64_t* labels,
                          const bool* mask, RowFinder rows, int64_t groups, FocalWeights<accumulate_t<T>> weights,
                          T* grad_logits) {
  using A = accumulate_t<T>;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (group >= groups) return;
  const int64_t first = group * kWidth, row = rows.row_of(first);
  Group<T, kWidth> out;
  if (mask != nullptr && !mask[row]) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) out.values[c] = static_cast<T>(0.0f);
  } else {
    const A grad = *grad_pointer;
    const int64_t place = labels[row] - (first - row * rows.classes);
    const Group<T, kWidth> x = load_group<kWidth>(logits + first);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const A value = static_cast<A>(x.values[c]);
      const A slope = focal_slope<kSquare>(c == place ? -value : value, weights.gamma);
      out.values[c] = static_cast<T>(grad * (c == place ? -weights.there : weights.absent) * slope);
    }
  }
  store_group(grad_logits + first, out);
}

// Calls launch(width, square) with compile-time numbers: logits per load, and whether gamma is 2.
template <typename T, typename Launch>
void choose(const FocalLossArguments& args, bool aligned, double gamma, const Launch& launch) {
  using One = std::integral_constant<int, 1>;
  // Four doubles are more than one load.
  using Four = std::integral_constant<int, sizeof(T) <= 4 ? 4 : 1>;
  const bool by_four = aligned && args.classes % 4 == 0;
  if (gamma == 2) return by_four ? launch(Four{}, std::true_type{}) : launch(One{}, std::true_type{});
  return by_four ? launch(Four{}, std::false_type{}) : launch(One{}, std::false_type{});
}

Tensor focal_loss_fwd_cuda(const Tensor& logits_, const Tensor& labels_, const std::optional<Tensor>& mask_,
                           double alpha, double gamma) {
  const torch::stable::accelerator::DeviceGuard guard(logits_.get_device_index());
  const FocalLossArguments args(logits_, labels_, mask_);
  const cudaStream_t stream = current_stream(args.logits.get_device_index());
  const ScalarType out_type = accumulate_type(args.logits.scalar_type());
  Tensor out = torch::stable::empty({}, out_type, std::nullopt, args.logits.device());
  if (args.logits.numel() == 0) return torch::stable::zero_(out);
  dispatch_floating(args.logits.scalar_type(), "focal_loss", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const T* logits = args.logits.template const_data_ptr<T>();
    choose<T>(args, is_aligned_for_four<T>(logits), gamma, [&](auto width, auto square) {
      // The number of blocks depends on the shape and the alignment alone, hence so does the order of the sum.
      const int64_t groups = args.logits.numel() / width, per_block = kThreads * kGroupsPerThread;
      const int64_t blocks = std::min((groups + per_block - 1) / per_block, kMaxBlocks);
      Tensor partial =
          blocks == 1 ? out : torch::stable::empty({blocks}, out_type, std::nullopt, args.logits.device());
      focal_loss_fwd_kernel<T, width(), square()><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
          logits, args.labels.const_data_ptr<int64_t>(), args.mask_pointer(), RowFinder(args), groups,
          FocalWeights<A>(alpha, gamma), partial.mutable_data_ptr<A>());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      if (blocks == 1) return;
      sum_partial_kernel<kThreads><<<1, kThreads, 0, stream>>>(
          partial.const_data_ptr<A>(), static_cast<int>(blocks), out.mutable_data_ptr<A>());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return out;
}

Tensor focal_loss_bwd_cuda(const Tensor& grad, const Tensor& logits_, const Tensor& labels_,
                           const std::optional<Tensor>& mask_, double alpha, double gamma) {
  const torch::stable::accelerator::DeviceGuard guard(logits_.get_device_index());
  const FocalLossArguments args(logits_, labels_, mask_);
  args.check_grad(grad);
  const cudaStream_t stream = current_stream(args.logits.get_device_index());
  Tensor grad_logits = torch::stable::empty_like(args.logits);
  if (args.logits.numel() == 0) return grad_logits;
  dispatch_floating(args.logits.scalar_type(), "focal_loss", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const T* logits = args.logits.template const_data_ptr<T>();
    T* out = grad_logits.template mutable_data_ptr<T>();
    const bool aligned = is_aligned_for_four<T>(logits) && is_aligned_for_four<T>(out);
    choose<T>(args, aligned, gamma, [&](auto width, auto square) {
      const int64_t groups = args.logits.numel() / width, blocks = (groups + kThreads - 1) / kThreads;
      STD_TORCH_CHECK(blocks <= 2147483647, "focal_loss: too many logits, got ", args.logits.numel());
      focal_loss_bwd_kernel<T, width(), square()><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
          grad.const_data_ptr<A>(), logits, args.labels.const_data_ptr<int64_t>(), args.mask_pointer(),
          RowFinder(args), groups, FocalWeights<A>(alpha, gamma), out);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return grad_logits;
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_IMPL(drcnn, CUDA, m) {
  m.impl("focal_loss_fwd", TORCH_BOX(&drcnn::focal_loss_fwd_cuda));
  m.impl("focal_loss_bwd", TORCH_BOX(&drcnn::focal_loss_bwd_cuda));
}
