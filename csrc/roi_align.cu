// roi_align forward on CUDA: one launch over the boxes of all images and levels. A block first writes the taps of
// its box to shared memory; every channel uses them.

#include <type_traits>

#include "roi_align_cuda.h"

namespace drcnn {
namespace {

constexpr int kLanes = 16;  // threads side by side on the channels of a cell: 256 bytes
// Blocks of the vector kernel that a multiprocessor must hold: leaves the registers for four loads in flight.
constexpr int kVectorBlocks = 4;
constexpr int64_t kElementsPerBlock = 8 * kRoiThreads;

template <typename T>
struct alignas(16) Vector {
  static constexpr int kCount = 16 / sizeof(T);
  T values[kCount];
};

template <typename T>
__device__ void fill_zero(T* out, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) out[i] = static_cast<T>(0.0f);
}

// Channels-last features, 16 bytes of channels per load. The block's channels are collected in shared memory, since
// in the pooled features a channel's bins are neighbours.
template <typename T>
__global__ void __launch_bounds__(kRoiThreads, kVectorBlocks)
    roi_align_fwd_vector_kernel(const __grid_constant__ RoiLevels<const T> levels, const accumulate_t<T>* boxes, const int64_t* box_levels,
                                int32_t lanes, T* out) {
  using A = accumulate_t<T>;
  constexpr int kCount = Vector<T>::kCount;
  extern __shared__ __align__(16) unsigned char memory[];
  const int64_t roi = blockIdx.x;
  const int32_t bins = levels.size * levels.size;
  const int32_t first_channel = blockIdx.y * lanes * kCount;
  const int32_t channels = min(lanes * kCount, levels.channels - first_channel);
  out += (roi * levels.channels + first_channel) * bins;
  const A* box = boxes + 4 * roi;
  const int32_t level = level_of(levels, box, box_levels[roi]);
  if (level < 0) return fill_zero(out, static_cast<int64_t>(channels) * bins);
  build_taps(levels, level, box, memory);

  const SharedTaps<A> y = shared_taps<A>(levels, memory, 0);
  const SharedTaps<A> x = shared_taps<A>(levels, memory, 1);
  T* tile = reinterpret_cast<T*>(memory + taps_bytes<A>(levels));
  const RoiLevel<const T>& own = levels.level[level];
  const int32_t channel = threadIdx.x % lanes * kCount;
  const T* image = own.data + roi / levels.per_image * own.image + first_channel + channel;
  const int32_t last_bin = channel < channels ? bins : 0;
  for (int32_t bin = threadIdx.x / lanes; bin < last_bin; bin += blockDim.x / lanes) {
    const int32_t ph = bin / levels.size;
    const int32_t pw = bin % levels.size;
    const Tap<A>* row = y.taps + y.first[ph];
    const Tap<A>* const rows_end = row + y.count[ph];
    const Tap<A>* columns = x.taps + x.first[pw];
    const int32_t column_count = x.count[pw];
    A sum[kCount] = {};
    for (; row < rows_end; ++row) {
      const A row_weight = row->weight;
      const T* cells = image + row->cell * own.row;
      for (int32_t j = 0; j < column_count; ++j) {
        const A weight = row_weight * columns[j].weight;
        const int64_t offset = int64_t{columns[j].cell} * levels.channels;  // own.cell, by a 32-bit product
        const Vector<T> cell = *reinterpret_cast<const Vector<T>*>(cells + offset);
#pragma unroll
        for (int k = 0; k < kCount; ++k) sum[k] += weight * static_cast<A>(cell.values[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) tile[(channel + k) * bins + bin] = static_cast<T>(sum[k]);
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < channels * bins; i += blockDim.x) out[i] = tile[i];
}

// Any layout: one thread per pooled value, neighbours in a row of the pooled square.
template <typename T>
__global__ void __launch_bounds__(kRoiThreads)
    roi_align_fwd_kernel(const __grid_constant__ RoiLevels<const T> levels, const accumulate_t<T>* boxes, const int64_t* box_levels,
                         T* out) {
  using A = accumulate_t<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  const int64_t roi = blockIdx.x;
  const int32_t bins = levels.size * levels.size;
  const int64_t total = static_cast<int64_t>(levels.channels) * bins;
  const int64_t begin = blockIdx.y * kElementsPerBlock;
  const int64_t end = min(begin + kElementsPerBlock, total);
  out += roi * total;
  const A* box = boxes + 4 * roi;
  const int32_t level = level_of(levels, box, box_levels[roi]);
  if (level < 0) return fill_zero(out + begin, end - begin);
  build_taps(levels, level, box, memory);

  const SharedTaps<A> y = shared_taps<A>(levels, memory, 0);
  const SharedTaps<A> x = shared_taps<A>(levels, memory, 1);
  const RoiLevel<const T>& own = levels.level[level];
  const T* image = own.data + roi / levels.per_image * own.image;
  for (int64_t i = begin + threadIdx.x; i < end; i += kRoiThreads) {
    const int32_t channel = static_cast<int32_t>(i / bins);
    const int32_t bin = static_cast<int32_t>(i % bins);
    const int32_t ph = bin / levels.size;
    const int32_t pw = bin % levels.size;
    const T* plane = image + channel * own.channel;
    A sum = 0;
    for (int32_t r = 0; r < y.count[ph]; ++r) {
      const Tap<A> row = y.taps[y.first[ph] + r];
      A row_sum = 0;
      for (int32_t c = 0; c < x.count[pw]; ++c) {
        const Tap<A> column = x.taps[x.first[pw] + c];
        row_sum += column.weight * static_cast<A>(plane[row.cell * own.row + column.cell * own.cell]);
      }
      sum += row.weight * row_sum;
    }
    out[i] = static_cast<T>(sum);
  }
}

// How many threads may stand side by side on the channels; 0 if vectors do not fit the features.
template <typename T>
int32_t vector_lanes(const RoiAlignArguments& args, const RoiLevels<const T>& levels, int64_t table_bytes) {
  constexpr int kCount = Vector<T>::kCount;
  if (args.channels % kCount != 0) return 0;
  for (size_t l = 0; l < args.features.size(); ++l) {
    if (!is_channels_last(args.features[l])) return 0;
    if (reinterpret_cast<uintptr_t>(levels.level[l].data) % sizeof(Vector<T>) != 0) return 0;
  }
  int32_t lanes = kLanes;
  while (lanes > 0 && table_bytes + lanes * kCount * args.bins() * static_cast<int64_t>(sizeof(T)) > kRoiSharedBytes) {
    lanes /= 2;
  }
  return lanes;
}

Tensor roi_align_fwd_cuda(std::vector<Tensor> features, const Tensor& boxes, const Tensor& box_levels,
                          std::vector<int64_t> strides, int64_t size, int64_t sampling_ratio, bool aligned, bool) {
  STD_TORCH_CHECK(!features.empty(), "roi_align: expected features of at least one level");
  const torch::stable::accelerator::DeviceGuard guard(features[0].get_device_index());
  const RoiAlignArguments args(features, boxes, box_levels, strides, size, sampling_ratio, aligned);
  const cudaStream_t stream = current_stream(args.boxes.get_device_index());
  Tensor out = args.empty_pooled();
  if (out.numel() == 0) return out;
  dispatch_floating(args.type(), "roi_align", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const RoiLevels<const T> levels = roi_levels<const T>(args, args.features);
    const int64_t table_bytes = checked_taps_bytes<A>(levels);
    const A* box = args.boxes.template const_data_ptr<A>();
    const int64_t* level = args.levels.template const_data_ptr<int64_t>();
    T* pooled = out.template mutable_data_ptr<T>();
    const int32_t lanes = vector_lanes(args, levels, table_bytes);
    const int64_t per_block = lanes > 0 ? int64_t{lanes} * Vector<T>::kCount : kElementsPerBlock;
    const int64_t blocks = ((lanes > 0 ? args.channels : args.channels * args.bins()) + per_block - 1) / per_block;
    STD_TORCH_CHECK(blocks <= 65535, "roi_align: too many channels for CUDA, got ", args.channels);
    const dim3 grid(static_cast<unsigned>(args.rois()), static_cast<unsigned>(blocks));
    if (lanes > 0) {
      const int64_t bytes = table_bytes + per_block * args.bins() * static_cast<int64_t>(sizeof(T));
      roi_align_fwd_vector_kernel<T><<<grid, kRoiThreads, bytes, stream>>>(levels, box, level, lanes, pooled);
    } else {
      roi_align_fwd_kernel<T><<<grid, kRoiThreads, table_bytes, stream>>>(levels, box, level, pooled);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_IMPL(drcnn, CUDA, m) { m.impl("roi_align_fwd", TORCH_BOX(&drcnn::roi_align_fwd_cuda)); }
