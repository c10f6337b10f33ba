// The backward of roi_align on CUDA, in two forms. The fast one adds the taps of every pooled value atomically. The
// deterministic one gathers: a block owns a tile of cells and some channels, goes through the boxes of its image in
// their order, keeps the sums in registers and writes each cell once; it needs no memory beside the gradients.

#include <type_traits>

#include "roi_align_cuda.h"

namespace drcnn {
namespace {

constexpr int64_t kElementsPerBlock = 8 * kRoiThreads;
constexpr int kTile = 8;                     // cells per side of a tile; a warp owns a row of it
constexpr int kChannels = kWarp;             // channels of a block, one per lane
constexpr int kStagedBytes = 32 * 1024;      // most shared memory for the gradient of one box
static_assert(kTile * kWarp == kRoiThreads);

// Blocks of the gather that a multiprocessor must hold; the registers that this leaves suffice without spills.
template <typename A>
constexpr int kGatherBlocks = sizeof(A) == 8 ? 4 : 5;

template <typename T>
__global__ void __launch_bounds__(kRoiThreads)
    roi_align_bwd_atomic_kernel(const __grid_constant__ RoiLevels<accumulate_t<T>> levels, const T* grad, const accumulate_t<T>* boxes,
                                const int64_t* box_levels) {
  using A = accumulate_t<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  const int64_t roi = blockIdx.x;
  const int32_t bins = levels.size * levels.size;
  const int64_t total = static_cast<int64_t>(levels.channels) * bins;
  const int64_t begin = blockIdx.y * kElementsPerBlock;
  const int64_t end = min(begin + kElementsPerBlock, total);
  const A* box = boxes + 4 * roi;
  const int32_t level = level_of(levels, box, box_levels[roi]);
  if (level < 0) return;
  build_taps(levels, level, box, memory);

  const SharedTaps<A> y = shared_taps<A>(levels, memory, 0);
  const SharedTaps<A> x = shared_taps<A>(levels, memory, 1);
  const RoiLevel<A>& own = levels.level[level];
  A* image = own.data + roi / levels.per_image * own.image;
  for (int64_t i = begin + threadIdx.x; i < end; i += kRoiThreads) {
    // Neighbouring threads add to neighbouring addresses: channels of a cell, or bins of a row.
    const bool channels_last = own.channel == 1;
    const int32_t channel = static_cast<int32_t>(channels_last ? i % levels.channels : i / bins);
    const int32_t bin = static_cast<int32_t>(channels_last ? i / levels.channels : i % bins);
    const int32_t ph = bin / levels.size;
    const int32_t pw = bin % levels.size;
    const A g = static_cast<A>(grad[(roi * levels.channels + channel) * bins + bin]);
    A* plane = image + channel * own.channel;
    for (int32_t r = 0; r < y.count[ph]; ++r) {
      const Tap<A> row = y.taps[y.first[ph] + r];
      for (int32_t c = 0; c < x.count[pw]; ++c) {
        const Tap<A> column = x.taps[x.first[pw] + c];
        atomicAdd(plane + row.cell * own.row + column.cell * own.cell, row.weight * column.weight * g);
      }
    }
  }
}

struct Tile {
  int32_t level;
  int32_t image;
  int32_t y;
  int32_t x;
};

template <typename T>
__host__ __device__ inline int64_t tiles_of(const RoiLevel<T>& level) {
  return static_cast<int64_t>((level.height + kTile - 1) / kTile) * ((level.width + kTile - 1) / kTile);
}

// The tile of a block: level by level, image by image.
template <typename T>
__device__ inline Tile tile_of(const RoiLevels<T>& levels, int64_t index) {
  int32_t level = 0;
  for (; level + 1 < levels.count; ++level) {
    const int64_t here = tiles_of(levels.level[level]) * levels.images;
    if (index < here) break;
    index -= here;
  }
  const int64_t per_image = tiles_of(levels.level[level]);
  const int32_t across = (levels.level[level].width + kTile - 1) / kTile;
  const int64_t within = index % per_image;
  return Tile{level, static_cast<int32_t>(index / per_image), static_cast<int32_t>(within / across) * kTile,
              static_cast<int32_t>(within % across) * kTile};
}

// Whether taps of the axis can lie in the kTile cells from `from`; may say yes for too many.
template <typename A>
__device__ inline bool reaches(const RoiAxis<A>& axis, int32_t size, int32_t from) {
  const A end = axis.start + axis.bin * static_cast<A>(size);
  const A low = (axis.start < end ? axis.start : end) - A(1);
  const A high = (axis.start < end ? end : axis.start) + A(1);
  // Samples up to a cell outside count for the cell at the border.
  return axis.samples > 0 && low <= static_cast<A>(from + kTile) && high >= static_cast<A>(from) - A(1);
}

// The weight of a bin for one cell: the sum over the samples whose taps hit the cell.
template <typename A>
__device__ inline A weight_of(const RoiAxis<A>& axis, int32_t bin, int32_t cell) {
  A weight = 0;
#pragma unroll 1  // a sample is three divisions; more at once would spill the sums of the tile
  for (int32_t sample = 0; sample < axis.samples; ++sample) {
    int32_t low;
    A share;
    if (!roi_sample(axis, bin, sample, &low, &share)) continue;
    if (low == cell) weight += (A(1) - share) / static_cast<A>(axis.samples);
    if (low + 1 == cell) weight += share / static_cast<A>(axis.samples);
  }
  return weight;
}

// Writes the boxes among first..first + kRoiThreads - 1 of the tile's image that reach it, in their order, and
// returns their number.
template <typename A, typename T>
__device__ inline int32_t find_boxes(const RoiLevels<T>& levels, const Tile& tile, const A* boxes,
                                     const int64_t* box_levels, int32_t first, int32_t* found, int32_t* warp_counts) {
  const int32_t index = first + threadIdx.x;
  bool hit = false;
  if (index < levels.per_image) {
    const int64_t roi = static_cast<int64_t>(tile.image) * levels.per_image + index;
    const A* box = boxes + 4 * roi;
    hit = level_of(levels, box, box_levels[roi]) == tile.level;
#pragma unroll 1  // both axes at once would spill in float64
    for (int32_t axis = 0; axis < 2 && hit; ++axis) {
      const bool vertical = axis == 0;
      hit = reaches(axis_of(levels, tile.level, box, vertical), levels.size, vertical ? tile.y : tile.x);
    }
  }
  const unsigned hits = __ballot_sync(0xffffffffu, hit);
  const int32_t lane = threadIdx.x % kWarp;
  const int32_t warp = threadIdx.x / kWarp;
  __syncthreads();  // the previous boxes have been used
  if (lane == 0) warp_counts[warp] = __popc(hits);
  __syncthreads();
  int32_t place = __popc(hits & ((1u << lane) - 1));
  int32_t total = 0;
#pragma unroll
  for (int32_t w = 0; w < kRoiThreads / kWarp; ++w) {
    if (w < warp) place += warp_counts[w];
    total += warp_counts[w];
  }
  if (hit) found[place] = index;
  __syncthreads();
  return total;
}

// weights: [2][size][kTile], those of the rows and those of the columns of the tile.
template <typename T, bool kStaged>
__global__ void __launch_bounds__(kRoiThreads, kGatherBlocks<accumulate_t<T>>)
    roi_align_bwd_gather_kernel(const __grid_constant__ RoiLevels<T> levels, const T* grad, const accumulate_t<T>* boxes,
                                const int64_t* box_levels) {
  using A = accumulate_t<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int32_t found[kRoiThreads];
  __shared__ int32_t warp_counts[kRoiThreads / kWarp];
  const int32_t size = levels.size;
  const int32_t bins = size * size;
  const int32_t pitch = bins | 1;  // an odd one keeps the lanes on different banks
  A* weights = reinterpret_cast<A*>(memory);
  A* staged = weights + 2 * size * kTile;
  const Tile tile = tile_of(levels, blockIdx.x);
  const int32_t lane = threadIdx.x % kWarp;
  const int32_t row = threadIdx.x / kWarp;
  const int32_t first_channel = blockIdx.y * kChannels;
  const int32_t channels = min(kChannels, levels.channels - first_channel);
  A sum[kTile] = {};

  for (int32_t first = 0; first < levels.per_image; first += kRoiThreads) {
    const int32_t count = find_boxes(levels, tile, boxes, box_levels, first, found, warp_counts);
    for (int32_t i = 0; i < count; ++i) {
      const int64_t roi = static_cast<int64_t>(tile.image) * levels.per_image + found[i];
      const T* own_grad = grad + (roi * levels.channels + first_channel) * bins;
      for (int32_t k = threadIdx.x; k < 2 * size * kTile; k += kRoiThreads) {
        const bool vertical = k < size * kTile;
        const RoiAxis<A> axis = axis_of(levels, tile.level, boxes + 4 * roi, vertical);
        weights[k] = weight_of(axis, k / kTile % size, (vertical ? tile.y : tile.x) + k % kTile);
      }
      if constexpr (kStaged) {
        for (int32_t k = threadIdx.x; k < channels * bins; k += kRoiThreads) {
          staged[k / bins * pitch + k % bins] = static_cast<A>(own_grad[k]);
        }
      }
      __syncthreads();
      for (int32_t pw = 0; pw < size && lane < channels; ++pw) {
        A g = 0;
        for (int32_t ph = 0; ph < size; ++ph) {
          const A weight = weights[ph * kTile + row];
          if (weight == A(0)) continue;  // a NaN in a bin stays out of cells that it does not touch
          g += weight * (kStaged ? staged[lane * pitch + ph * size + pw]
                                 : static_cast<A>(own_grad[static_cast<int64_t>(lane) * bins + ph * size + pw]));
        }
#pragma unroll
        for (int32_t c = 0; c < kTile; ++c) {
          const A weight = weights[(size + pw) * kTile + c];
          sum[c] += weight == A(0) ? A(0) : weight * g;
        }
      }
      __syncthreads();
    }
  }
  const RoiLevel<T>& own = levels.level[tile.level];
  if (lane >= channels || tile.y + row >= own.height) return;
  T* out = own.data + tile.image * own.image + (first_channel + lane) * own.channel + (tile.y + row) * own.row;
#pragma unroll
  for (int32_t c = 0; c < kTile; ++c) {
    if (tile.x + c < own.width) out[(tile.x + c) * own.cell] = static_cast<T>(sum[c]);
  }
}

template <typename T>
void launch_atomic(const RoiAlignArguments& args, const Tensor& grad, const std::vector<Tensor>& sums,
                   cudaStream_t stream) {
  using A = accumulate_t<T>;
  const RoiLevels<A> levels = roi_levels<A>(args, sums);
  const int64_t bytes = checked_taps_bytes<A>(levels);
  const int64_t blocks = (args.channels * args.bins() + kElementsPerBlock - 1) / kElementsPerBlock;
  STD_TORCH_CHECK(blocks <= 65535, "roi_align: too many channels for CUDA, got ", args.channels);
  const dim3 grid(static_cast<unsigned>(args.rois()), static_cast<unsigned>(blocks));
  roi_align_bwd_atomic_kernel<T><<<grid, kRoiThreads, bytes, stream>>>(
      levels, grad.const_data_ptr<T>(), args.boxes.const_data_ptr<A>(), args.levels.const_data_ptr<int64_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void launch_gather(const RoiAlignArguments& args, const Tensor& grad, const std::vector<Tensor>& gradients,
                   cudaStream_t stream) {
  using A = accumulate_t<T>;
  const RoiLevels<T> levels = roi_levels<T>(args, gradients);
  int64_t tiles = 0;
  for (int32_t l = 0; l < levels.count; ++l) tiles += tiles_of(levels.level[l]) * args.images;
  const int64_t blocks = (args.channels + kChannels - 1) / kChannels;
  STD_TORCH_CHECK(tiles <= 2147483647 && blocks <= 65535, "roi_align: features are too large for CUDA");
  const int64_t weight_bytes = 2 * args.size * kTile * static_cast<int64_t>(sizeof(A));
  const int64_t staged_bytes = kChannels * (args.bins() | 1) * static_cast<int64_t>(sizeof(A));
  STD_TORCH_CHECK(weight_bytes + 4096 <= kRoiSharedBytes, "roi_align: output_size is too large for CUDA, got ",
                  args.size);
  const bool is_staged = staged_bytes <= kStagedBytes && weight_bytes + staged_bytes + 4096 <= kRoiSharedBytes;
  const auto kernel = is_staged ? &roi_align_bwd_gather_kernel<T, true> : &roi_align_bwd_gather_kernel<T, false>;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(blocks));
  kernel<<<grid, kRoiThreads, weight_bytes + (is_staged ? staged_bytes : 0), stream>>>(
      levels, grad.const_data_ptr<T>(), args.boxes.const_data_ptr<A>(), args.levels.const_data_ptr<int64_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::vector<Tensor> roi_align_bwd_cuda(const Tensor& grad_, std::vector<Tensor> features, const Tensor& boxes,
                                       const Tensor& box_levels, std::vector<int64_t> strides, int64_t size,
                                       int64_t sampling_ratio, bool aligned, bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(grad_.get_device_index());
  const RoiAlignArguments args(features, boxes, box_levels, strides, size, sampling_ratio, aligned);
  args.check_grad(grad_);
  const Tensor grad = torch::stable::contiguous(grad_);
  const cudaStream_t stream = current_stream(args.boxes.get_device_index());
  // Half precision is added up in float32 by both forms; only the atomic one needs memory for that.
  const ScalarType type = deterministic ? args.type() : accumulate_type(args.type());
  std::vector<Tensor> gradients;
  for (size_t level = 0; level < args.features.size(); ++level) {
    gradients.push_back(args.empty_gradient(level, type));
    if (!deterministic) torch::stable::zero_(gradients.back());
  }
  dispatch_floating(args.type(), "roi_align", [&](auto tag) {
    using T = decltype(tag);
    if (deterministic && args.images * args.channels > 0) launch_gather<T>(args, grad, gradients, stream);
    if (!deterministic && grad.numel() > 0) launch_atomic<T>(args, grad, gradients, stream);
  });
  if (type != args.type()) {
    for (Tensor& gradient : gradients) gradient = torch::stable::to(gradient, args.type());
  }
  return gradients;
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_IMPL(drcnn, CUDA, m) { m.impl("roi_align_bwd", TORCH_BOX(&drcnn::roi_align_bwd_cuda)); }
