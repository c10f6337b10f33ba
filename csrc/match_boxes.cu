// match_boxes on CUDA: the running best of a box stays in registers, ground truths pass through shared memory.
//
// Few boxes share a ground-truth list between the eight lanes of a box. Low-quality matches add the largest IoU
// of each ground truth (integer maxima, which do not depend on the order) and a second kernel, in which a box
// looks only at the ground truths whose largest IoU it can reach.

#include "box_launch.h"
#include "match_boxes.h"
#include "match_boxes_arguments.h"
#include "topk_statistics.h"

namespace drcnn {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128;  // ground truths in shared memory
constexpr int kFewLanes = 8;
constexpr int64_t kManyBoxes = 1 << 16;

// IoUs are not negative: they order like their bits.
template <typename A>
using bits_t = rank_key_t<A>;

__device__ inline uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ inline uint64_t bits_of(double value) { return static_cast<uint64_t>(__double_as_longlong(value)); }
__device__ inline float from_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline double from_bits(uint64_t bits) { return __longlong_as_double(static_cast<long long>(bits)); }

__device__ inline void atomic_raise(uint32_t* target, uint32_t bits) { atomicMax(target, bits); }
__device__ inline void atomic_raise(uint64_t* target, uint64_t bits) {
  atomicMax(reinterpret_cast<unsigned long long*>(target), static_cast<unsigned long long>(bits));
}

__device__ inline uint32_t warp_max(uint32_t bits) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, bits);
#else
  for (int offset = kWarp / 2; offset > 0; offset /= 2) bits = greater(__shfl_xor_sync(0xffffffffu, bits, offset), bits);
  return bits;
#endif
}

__device__ inline uint64_t warp_max(uint64_t bits) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) bits = greater(__shfl_xor_sync(0xffffffffu, bits, offset), bits);
  return bits;
}

template <typename T>
struct MatchInput {
  const T* boxes;
  const T* gt;
  const bool* valid;
  int64_t boxes_stride;
  int64_t gt_stride;
  int64_t count;
  int64_t gts;
};

template <typename A>
struct GtTile {
  Box<A> box[kTile];
  A area[kTile];
};

// Loads ground truths first..first + kTile of an image. Padding gets the area NaN: its overlaps are undefined.
template <bool kAligned, typename T, typename A>
__device__ inline int load_tile(const MatchInput<T>& input, int64_t image, int64_t first, GtTile<A>& tile) {
  const int64_t left = input.gts - first;
  const int count = left < kTile ? static_cast<int>(left) : kTile;
  for (int j = threadIdx.x; j < count; j += kThreads) {
    const Box<A> box = load_box<kAligned>(input.gt + image * input.gt_stride, first + j);
    tile.box[j] = box;
    tile.area[j] = input.valid[image * input.gts + first + j] ? box_area(box) : static_cast<A>(NAN);
  }
  return count;
}

template <typename T, bool kAligned, int kLanes, bool kBest>
__global__ void __launch_bounds__(kThreads)
    match_boxes_kernel(MatchInput<T> input, T* max_iou, int64_t* gt_index, bits_t<accumulate_t<T>>* gt_max) {
  using A = accumulate_t<T>;
  static_assert(!kBest || kLanes == 1);
  __shared__ GtTile<A> tile;
  __shared__ bits_t<A> tile_max[kBest ? kTile : 1];
  const int64_t image = blockIdx.y;
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  // Threads past the end stay for the barriers, with a box that overlaps nothing.
  Box<A> box{};
  if (n < input.count) box = load_box<kAligned>(input.boxes + image * input.boxes_stride, n);
  const A area = box_area(box);
  A best = 0;
  int best_index = 0;
  for (int64_t first = 0; first < input.gts; first += kTile) {
    __syncthreads();
    const int count = load_tile<kAligned>(input, image, first, tile);
    if constexpr (kBest) {
      for (int j = threadIdx.x; j < count; j += kThreads) tile_max[j] = 0;
    }
    __syncthreads();
    for (int j = lane; j < count; j += kLanes) {
      const A iou = iou_of(box, area, tile.box[j], tile.area[j]);
      if (iou > best) {
        best = iou;
        best_index = static_cast<int>(first) + j;
      }
      if constexpr (kBest) {
        const bits_t<A> largest = warp_max(bits_of(iou));
        if (largest > 0 && threadIdx.x % kWarp == 0) atomic_raise(&tile_max[j], largest);
      }
    }
    if constexpr (kBest) {
      __syncthreads();
      for (int j = threadIdx.x; j < count; j += kThreads) {
        if (tile_max[j] > 0) atomic_raise(gt_max + image * input.gts + first + j, tile_max[j]);
      }
    }
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, best, offset);
    const int other_index = __shfl_xor_sync(0xffffffffu, best_index, offset);
    if (comes_first(other, int64_t{other_index}, best, int64_t{best_index})) {
      best = other;
      best_index = other_index;
    }
  }
  if (n < input.count && lane == 0) {
    max_iou[image * input.count + n] = static_cast<T>(best);
    gt_index[image * input.count + n] = best_index;
  }
}

// Second pass: which boxes reach the largest IoU of a ground truth; also writes those in the boxes' dtype.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    match_boxes_best_kernel(MatchInput<T> input, const T* max_iou, const bits_t<accumulate_t<T>>* gt_max,
                            accumulate_t<T> low_quality, T* gt_max_iou, bool* is_best) {
  using A = accumulate_t<T>;
  __shared__ GtTile<A> tile;
  __shared__ A target[kTile];
  __shared__ A rounded[kTile];
  const int64_t image = blockIdx.y;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool inside = n < input.count;
  // A ground truth whose rounded maximum is above the box's own rounded maximum is out of its reach.
  const A reach = inside ? static_cast<A>(max_iou[image * input.count + n]) : A(0);
  Box<A> box{};
  if (reach > A(0)) box = load_box<kAligned>(input.boxes + image * input.boxes_stride, n);
  const A area = box_area(box);
  bool found = false;
  for (int64_t first = 0; first < input.gts; first += kTile) {
    __syncthreads();
    const int count = load_tile<kAligned>(input, image, first, tile);
    for (int j = threadIdx.x; j < count; j += kThreads) {
      const A largest = from_bits(gt_max[image * input.gts + first + j]);
      const T stored = static_cast<T>(largest);
      target[j] = wants_best(largest, low_quality) ? largest : static_cast<A>(NAN);
      rounded[j] = static_cast<A>(stored);
      if (blockIdx.x == 0) gt_max_iou[image * input.gts + first + j] = stored;
    }
    __syncthreads();
    if (reach > A(0)) {
      for (int j = 0; j < count && !found; ++j) {
        found = rounded[j] <= reach && iou_of(box, area, tile.box[j], tile.area[j]) == target[j];
      }
    }
  }
  if (inside) is_best[image * input.count + n] = found;
}

template <typename T>
MatchInput<T> input_of(const MatchArguments& args) {
  return {args.boxes.data<T>(),
          args.gt.data<T>(),
          args.gt_valid.const_data_ptr<bool>(),
          args.boxes.stride,
          args.gt.stride,
          args.boxes.count,
          args.gt.count};
}

// Calls function(T{}, aligned as std::bool_constant).
template <typename Function>
void dispatch_boxes(const MatchArguments& args, const Function& function) {
  STD_TORCH_CHECK(args.gt.count <= 2147483647, "match_boxes: too many ground truths, got ", args.gt.count);
  dispatch_floating(args.type(), "match_boxes", [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) <= 4) {
      if (args.boxes.is_aligned<T>() && args.gt.is_aligned<T>()) return function(type, std::true_type{});
    }
    function(type, std::false_type{});
  });
}

MatchPair match_boxes_cuda(const Tensor& boxes_, const Tensor& gt_boxes, const Tensor& gt_valid) {
  const torch::stable::accelerator::DeviceGuard guard(boxes_.get_device_index());
  const MatchArguments args(boxes_, gt_boxes, gt_valid);
  const int64_t count = args.boxes.count;
  const int64_t batch = args.boxes.batch;
  Tensor max_iou = args.make(count, args.type());
  Tensor gt_index = args.make(count, ScalarType::Long);
  if (batch == 0 || count == 0) return {max_iou, gt_index};
  const cudaStream_t stream = current_stream(boxes_.get_device_index());
  dispatch_boxes(args, [&](auto type, auto aligned) {
    using T = decltype(type);
    constexpr bool kAligned = decltype(aligned)::value;
    const bool is_split = batch * count < kManyBoxes && args.gt.count >= 2 * kFewLanes;
    const auto kernel = is_split ? &match_boxes_kernel<T, kAligned, kFewLanes, false>
                                 : &match_boxes_kernel<T, kAligned, 1, false>;
    const dim3 grid = grid_of(count * (is_split ? kFewLanes : 1), kThreads, batch, "match_boxes");
    kernel<<<grid, kThreads, 0, stream>>>(input_of<T>(args), max_iou.mutable_data_ptr<T>(),
                                          gt_index.mutable_data_ptr<int64_t>(), nullptr);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {max_iou, gt_index};
}

MatchQuad match_boxes_best_cuda(const Tensor& boxes_, const Tensor& gt_boxes, const Tensor& gt_valid,
                                double low_quality) {
  const torch::stable::accelerator::DeviceGuard guard(boxes_.get_device_index());
  const MatchArguments args(boxes_, gt_boxes, gt_valid);
  const int64_t count = args.boxes.count;
  const int64_t batch = args.boxes.batch;
  Tensor max_iou = args.make(count, args.type());
  Tensor gt_index = args.make(count, ScalarType::Long);
  Tensor gt_max_iou = args.make(args.gt.count, args.type());
  Tensor is_best = args.make(count, ScalarType::Bool);
  if (batch == 0) return {max_iou, gt_index, gt_max_iou, is_best};
  const ScalarType accumulated = accumulate_type(args.type());
  Tensor gt_max = args.make(args.gt.count, accumulated);  // the maxima before they are rounded
  torch::stable::zero_(gt_max);
  const cudaStream_t stream = current_stream(boxes_.get_device_index());
  dispatch_boxes(args, [&](auto type, auto aligned) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    constexpr bool kAligned = decltype(aligned)::value;
    const dim3 grid = grid_of(count, kThreads, batch, "match_boxes");
    auto* const bits = reinterpret_cast<bits_t<A>*>(gt_max.mutable_data_ptr<A>());
    match_boxes_kernel<T, kAligned, 1, true><<<grid, kThreads, 0, stream>>>(
        input_of<T>(args), max_iou.mutable_data_ptr<T>(), gt_index.mutable_data_ptr<int64_t>(), bits);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    match_boxes_best_kernel<T, kAligned><<<grid, kThreads, 0, stream>>>(
        input_of<T>(args), max_iou.const_data_ptr<T>(), bits, static_cast<A>(low_quality),
        gt_max_iou.mutable_data_ptr<T>(), is_best.mutable_data_ptr<bool>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {max_iou, gt_index, gt_max_iou, is_best};
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_IMPL(drcnn, CUDA, m) {
  m.impl("match_boxes", TORCH_BOX(&drcnn::match_boxes_cuda));
  m.impl("match_boxes_best", TORCH_BOX(&drcnn::match_boxes_best_cuda));
}
