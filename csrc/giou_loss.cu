// giou_loss on CUDA: one box per load of 16 bytes (8 for half precision), sums in two stages without atomics.

#include <algorithm>

#include "giou_loss.h"
#include "giou_loss_arguments.h"
#include "launch.h"

namespace drcnn {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPairsPerThread = 4;
constexpr int64_t kMaxBlocks = 1024;  // partial sums; enough to fill a GPU, few enough for one block to add up

// A box of doubles is 32 bytes, more than one load.
template <typename T>
constexpr bool kVectorized = sizeof(T) <= 4;

template <bool kAligned, typename T>
__device__ Box<accumulate_t<T>> load_box(const T* box) {
  using A = accumulate_t<T>;
  const Four<T> four = load_four<kAligned>(box);
  return {static_cast<A>(four.values[0]), static_cast<A>(four.values[1]), static_cast<A>(four.values[2]),
          static_cast<A>(four.values[3])};
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    giou_loss_fwd_kernel(const T* pred, const T* target, const accumulate_t<T>* weight, int64_t pairs,
                         accumulate_t<T>* partial) {
  using A = accumulate_t<T>;
  A sum = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t pair = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; pair < pairs; pair += stride) {
    const A w = weight[pair];
    if (w == A(0)) continue;
    sum += w * giou_loss_value(load_box<kAligned>(pred + 4 * pair), load_box<kAligned>(target + 4 * pair));
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    giou_loss_bwd_kernel(const accumulate_t<T>* grad_pointer, const T* pred, const T* target,
                         const accumulate_t<T>* weight, int64_t pairs, T* grad_pred) {
  using A = accumulate_t<T>;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pair >= pairs) return;
  const A w = weight[pair];
  Box<A> slope{A(0), A(0), A(0), A(0)};
  A scale = 0;
  if (w != A(0)) {
    slope = giou_loss_slope(load_box<kAligned>(pred + 4 * pair), load_box<kAligned>(target + 4 * pair));
    scale = *grad_pointer * w;
  }
  store_four<kAligned>(grad_pred + 4 * pair, Four<T>{static_cast<T>(scale * slope.x1), static_cast<T>(scale * slope.y1),
                                                     static_cast<T>(scale * slope.x2),
                                                     static_cast<T>(scale * slope.y2)});
}

Tensor giou_loss_fwd_cuda(const Tensor& pred_, const Tensor& target_, const Tensor& weight_) {
  const torch::stable::accelerator::DeviceGuard guard(pred_.get_device_index());
  const GiouLossArguments args(pred_, target_, weight_);
  const cudaStream_t stream = current_stream(args.pred.get_device_index());
  const ScalarType out_type = args.weight.scalar_type();
  Tensor out = torch::stable::empty({}, out_type, std::nullopt, args.pred.device());
  // The number of blocks depends on the number of pairs alone, hence so does the order of the sum.
  const int64_t per_block = kThreads * kPairsPerThread;
  const int64_t blocks = std::clamp<int64_t>((args.pairs + per_block - 1) / per_block, 1, kMaxBlocks);
  Tensor partial = blocks == 1 ? out : torch::stable::empty({blocks}, out_type, std::nullopt, args.pred.device());
  dispatch_floating(args.pred.scalar_type(), "giou_loss", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const T* pred = args.pred.template const_data_ptr<T>();
    const T* target = args.target.template const_data_ptr<T>();
    const bool aligned = is_aligned_for_four<T>(pred) && is_aligned_for_four<T>(target);
    const auto kernel = aligned ? &giou_loss_fwd_kernel<T, kVectorized<T>> : &giou_loss_fwd_kernel<T, false>;
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        pred, target, args.weight.const_data_ptr<A>(), args.pairs, partial.mutable_data_ptr<A>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (blocks == 1) return;
    sum_partial_kernel<kThreads><<<1, kThreads, 0, stream>>>(
        partial.const_data_ptr<A>(), static_cast<int>(blocks), out.mutable_data_ptr<A>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

Tensor giou_loss_bwd_cuda(const Tensor& grad, const Tensor& pred_, const Tensor& target_, const Tensor& weight_) {
  const torch::stable::accelerator::DeviceGuard guard(pred_.get_device_index());
  const GiouLossArguments args(pred_, target_, weight_);
  args.check_grad(grad);
  const cudaStream_t stream = current_stream(args.pred.get_device_index());
  Tensor grad_pred = torch::stable::empty_like(args.pred);
  if (args.pairs == 0) return grad_pred;
  const int64_t blocks = (args.pairs + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks <= 2147483647, "giou_loss: too many pairs, got ", args.pairs);
  dispatch_floating(args.pred.scalar_type(), "giou_loss", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const T* pred = args.pred.template const_data_ptr<T>();
    const T* target = args.target.template const_data_ptr<T>();
    T* out = grad_pred.template mutable_data_ptr<T>();
    const bool aligned =
        is_aligned_for_four<T>(pred) && is_aligned_for_four<T>(target) && is_aligned_for_four<T>(out);
    const auto kernel = aligned ? &giou_loss_bwd_kernel<T, kVectorized<T>> : &giou_loss_bwd_kernel<T, false>;
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        grad.const_data_ptr<A>(), pred, target, args.weight.const_data_ptr<A>(), args.pairs, out);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return grad_pred;
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_IMPL(drcnn, CUDA, m) {
  m.impl("giou_loss_fwd", TORCH_BOX(&drcnn::giou_loss_fwd_cuda));
  m.impl("giou_loss_bwd", TORCH_BOX(&drcnn::giou_loss_bwd_cuda));
}
