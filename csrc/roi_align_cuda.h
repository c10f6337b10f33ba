// What the forward and the backward of roi_align on CUDA share: the levels by value, and the taps of a RoI in
// shared memory.
#pragma once

#include <algorithm>

#include "launch.h"
#include "roi_align.h"
#include "roi_align_arguments.h"

namespace drcnn {

constexpr int kRoiThreads = 256;
constexpr int64_t kRoiSharedBytes = 48 * 1024;  // every GPU gives a block this much without being asked

template <typename T>
struct RoiLevel {
  T* data;
  int64_t image;  // elements from one image, channel, row and cell to the next
  int64_t channel;
  int64_t row;
  int64_t cell;
  int32_t height;
  int32_t width;
  double scale;  // a power of two
};

// All levels, passed to a kernel by value, and the numbers that it needs beside them.
template <typename T>
struct RoiLevels {
  RoiLevel<T> level[kMaxLevels];
  int32_t count;
  int32_t channels;
  int32_t size;
  int32_t sampling_ratio;
  int32_t per_image;
  int32_t images;
  int32_t taps;  // room for the taps of an axis
  bool aligned;
};

template <typename T>
RoiLevels<T> roi_levels(const RoiAlignArguments& args, const std::vector<Tensor>& tensors) {
  using Plain = std::remove_const_t<T>;
  RoiLevels<T> levels{};
  int64_t longest = 0;
  for (size_t l = 0; l < tensors.size(); ++l) {
    Tensor t = tensors[l];
    T* data;
    if constexpr (std::is_const_v<T>) {
      data = t.template const_data_ptr<Plain>();
    } else {
      data = t.template mutable_data_ptr<Plain>();
    }
    longest = std::max({longest, t.size(2), t.size(3)});
    const bool last = is_channels_last(args.features[l]);
    const int64_t cell = last ? args.channels : 1;
    const int64_t row = cell * t.size(3);
    levels.level[l] = RoiLevel<T>{data, args.channels * t.size(2) * t.size(3), last ? 1 : t.size(2) * t.size(3), row,
                                  cell, static_cast<int32_t>(t.size(2)), static_cast<int32_t>(t.size(3)),
                                  1.0 / static_cast<double>(args.strides[l])};
  }
  STD_TORCH_CHECK(args.channels < (int64_t{1} << 30) && args.per_image < (int64_t{1} << 30) &&
                      args.rois() <= 2147483647,
                  "roi_align: too many channels or boxes for CUDA");
  levels.count = static_cast<int32_t>(tensors.size());
  levels.channels = static_cast<int32_t>(args.channels);
  levels.size = args.size;
  levels.sampling_ratio = args.sampling_ratio;
  levels.per_image = static_cast<int32_t>(args.per_image);
  levels.images = static_cast<int32_t>(args.images);
  levels.aligned = args.aligned;
  // See first_tap.
  levels.taps = static_cast<int32_t>(args.sampling_ratio > 0 ? 2 * args.sampling_ratio * args.size
                                                             : longest + 2 * args.size);
  return levels;
}

template <typename A>
struct SharedTaps {
  Tap<A>* taps;
  int32_t* first;  // [size]
  int32_t* count;  // [size]
};

// Bytes of the tables of both axes. The taps come first, so that they are aligned.
template <typename A, typename T>
__host__ __device__ inline int64_t taps_bytes(const RoiLevels<T>& levels) {
  return 2 * (levels.taps * static_cast<int64_t>(sizeof(Tap<A>)) + 2 * levels.size * int64_t{4});
}

template <typename A, typename T>
int64_t checked_taps_bytes(const RoiLevels<T>& levels) {
  const int64_t bytes = taps_bytes<A>(levels);
  STD_TORCH_CHECK(bytes <= kRoiSharedBytes,
                  "roi_align: features, output_size or sampling_ratio are too large for a block's shared memory: "
                  "they need ",
                  bytes, " bytes of ", kRoiSharedBytes);
  return bytes;
}

// The place of a bin's first tap. Adaptive samples are at most a cell apart and ascend, so the bin's taps are
// consecutive cells and share at most two with the next bin: from the lowest cell plus twice the bin, none overlap.
template <typename A>
__device__ inline int32_t first_tap(const RoiAxis<A>& axis, int32_t sampling_ratio, int32_t bin) {
  if (sampling_ratio > 0) return 2 * sampling_ratio * bin;
  int32_t low = 0;
  A share;
  for (int32_t sample = 0; sample < axis.samples; ++sample) {
    if (roi_sample(axis, bin, sample, &low, &share)) break;
  }
  return low + 2 * bin;
}

template <typename A, typename T>
__device__ inline SharedTaps<A> shared_taps(const RoiLevels<T>& levels, unsigned char* memory, int32_t which) {
  Tap<A>* taps = reinterpret_cast<Tap<A>*>(memory) + which * levels.taps;
  int32_t* table = reinterpret_cast<int32_t*>(reinterpret_cast<Tap<A>*>(memory) + 2 * levels.taps);
  table += which * 2 * levels.size;
  return SharedTaps<A>{taps, table, table + levels.size};
}

// The level of a box, or -1 when it pools to zeros.
template <typename A, typename T>
__device__ inline int32_t level_of(const RoiLevels<T>& levels, const A* box, int64_t level) {
  return is_poolable(box) && level >= 0 && level < levels.count ? static_cast<int32_t>(level) : -1;
}

template <typename A, typename T>
__device__ inline RoiAxis<A> axis_of(const RoiLevels<T>& levels, int32_t level, const A* box, bool vertical) {
  const RoiLevel<T>& own = levels.level[level];
  const int32_t c = vertical ? 1 : 0;
  return roi_axis(box[c], box[c + 2], static_cast<A>(own.scale), levels.size, levels.sampling_ratio, levels.aligned,
                  vertical ? own.height : own.width);
}

// All threads of a block write the taps of both axes; they are valid when this returns.
template <typename A, typename T>
__device__ inline void build_taps(const RoiLevels<T>& levels, int32_t level, const A* box, unsigned char* memory) {
  for (int32_t i = threadIdx.x; i < 2 * levels.size; i += blockDim.x) {
    const int32_t which = i / levels.size;
    const int32_t bin = i % levels.size;
    const SharedTaps<A> table = shared_taps<A>(levels, memory, which);
    const RoiAxis<A> axis = axis_of(levels, level, box, which == 0);
    const int32_t first = first_tap(axis, levels.sampling_ratio, bin);
    table.first[bin] = first;
    table.count[bin] = roi_taps(axis, bin, table.taps + first);
  }
  __syncthreads();
}

}  // namespace drcnn
