// smooth_l1 on CUDA: one box per load of 16 bytes (8 for half precision), sums in two stages without atomics.

#include <algorithm>

#include "launch.h"
#include "smooth_l1.h"
#include "smooth_l1_arguments.h"

namespace drcnn {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBoxesPerThread = 4;
constexpr int64_t kMaxBlocks = 1024;  // partial sums; enough to fill a GPU, few enough for one block to add up

// A box of doubles is 32 bytes, more than one load, and loading it whole costs registers that spill.
template <typename T>
constexpr bool kVectorized = sizeof(T) <= 4;

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    smooth_l1_fwd_kernel(const T* pred, const T* target, const accumulate_t<T>* beta_pointer, const bool* mask,
                         int64_t boxes, accumulate_t<T>* partial) {
  using A = accumulate_t<T>;
  const A beta = *beta_pointer;
  A sum = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t box = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; box < boxes; box += stride) {
    if (mask != nullptr && !mask[box]) continue;
    const Four<T> p = load_four<kAligned>(pred + 4 * box);
    const Four<T> t = load_four<kAligned>(target + 4 * box);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      sum += smooth_l1_value(static_cast<A>(p.values[c]) - static_cast<A>(t.values[c]), beta);
    }
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    smooth_l1_bwd_kernel(const accumulate_t<T>* grad_pointer, const T* pred, const T* target,
                         const accumulate_t<T>* beta_pointer, const bool* mask, int64_t boxes, T* grad_pred) {
  using A = accumulate_t<T>;
  const int64_t box = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (box >= boxes) return;
  Four<T> out;
  if (mask != nullptr && !mask[box]) {
#pragma unroll
    for (int c = 0; c < 4; ++c) out.values[c] = static_cast<T>(0.0f);
  } else {
    const A grad = *grad_pointer;
    const A beta = *beta_pointer;
    const Four<T> p = load_four<kAligned>(pred + 4 * box);
    const Four<T> t = load_four<kAligned>(target + 4 * box);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const A difference = static_cast<A>(p.values[c]) - static_cast<A>(t.values[c]);
      out.values[c] = static_cast<T>(grad * smooth_l1_slope(difference, beta));
    }
  }
  store_four<kAligned>(grad_pred + 4 * box, out);
}

Tensor smooth_l1_fwd_cuda(const Tensor& pred_, const Tensor& target_, const Tensor& beta,
                          const std::optional<Tensor>& mask_) {
  const torch::stable::accelerator::DeviceGuard guard(pred_.get_device_index());
  const SmoothL1Arguments args(pred_, target_, beta, mask_);
  const cudaStream_t stream = current_stream(args.pred.get_device_index());
  const ScalarType out_type = accumulate_type(args.pred.scalar_type());
  Tensor out = torch::stable::empty({}, out_type, std::nullopt, args.pred.device());
  // The number of blocks depends on the number of boxes alone, hence so does the order of the sum.
  const int64_t per_block = kThreads * kBoxesPerThread;
  const int64_t blocks = std::clamp<int64_t>((args.boxes + per_block - 1) / per_block, 1, kMaxBlocks);
  Tensor partial = blocks == 1 ? out : torch::stable::empty({blocks}, out_type, std::nullopt, args.pred.device());
  dispatch_floating(args.pred.scalar_type(), "smooth_l1", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const T* pred = args.pred.template const_data_ptr<T>();
    const T* target = args.target.template const_data_ptr<T>();
    const bool aligned = is_aligned_for_four<T>(pred) && is_aligned_for_four<T>(target);
    const auto kernel = aligned ? &smooth_l1_fwd_kernel<T, kVectorized<T>> : &smooth_l1_fwd_kernel<T, false>;
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        pred, target, beta.const_data_ptr<A>(), args.mask_pointer(), args.boxes, partial.mutable_data_ptr<A>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (blocks == 1) return;
    sum_partial_kernel<kThreads><<<1, kThreads, 0, stream>>>(
        partial.const_data_ptr<A>(), static_cast<int>(blocks), out.mutable_data_ptr<A>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

Tensor smooth_l1_bwd_cuda(const Tensor& grad, const Tensor& pred_, const Tensor& target_, const Tensor& beta,
                          const std::optional<Tensor>& mask_) {
  const torch::stable::accelerator::DeviceGuard guard(pred_.get_device_index());
  const SmoothL1Arguments args(pred_, target_, beta, mask_);
  args.check_grad(grad);
  const cudaStream_t stream = current_stream(args.pred.get_device_index());
  Tensor grad_pred = torch::stable::empty_like(args.pred);
  if (args.boxes == 0) return grad_pred;
  const int64_t blocks = (args.boxes + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks <= 2147483647, "smooth_l1: too many boxes, got ", args.boxes);
  dispatch_floating(args.pred.scalar_type(), "smooth_l1", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const T* pred = args.pred.template const_data_ptr<T>();
    const T* target = args.target.template const_data_ptr<T>();
    T* out = grad_pred.template mutable_data_ptr<T>();
    const bool aligned =
        is_aligned_for_four<T>(pred) && is_aligned_for_four<T>(target) && is_aligned_for_four<T>(out);
    const auto kernel = aligned ? &smooth_l1_bwd_kernel<T, kVectorized<T>> : &smooth_l1_bwd_kernel<T, false>;
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        grad.const_data_ptr<A>(), pred, target, beta.const_data_ptr<A>(), args.mask_pointer(), args.boxes, out);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return grad_pred;
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_IMPL(drcnn, CUDA, m) {
  m.impl("smooth_l1_fwd", TORCH_BOX(&drcnn::smooth_l1_fwd_cuda));
  m.impl("smooth_l1_bwd", TORCH_BOX(&drcnn::smooth_l1_bwd_cuda));
}
