// roi_align on the CPU: the schema of the operators and the forward. A thread pools a few channels of
// all RoIs of an image and level if features are contiguous, and all channels of a RoI if they are channels-last.

#include "roi_align_cpu.h"

namespace drcnn {
namespace {

// Sums the rows of each bin into one row of columns: [size][x.width].
template <typename T, typename A>
inline __attribute__((always_inline)) void sum_rows(const T* plane, int64_t row, const RoiTaps<A>& y, int32_t bin,
                                                    int64_t width, A* sums) {
  const Tap<A>* first = y.taps.data() + y.first[bin];
  const Tap<A>* last = y.taps.data() + y.first[bin + 1];
  int64_t x = 0;
  for (; x + kRoiLanes <= width; x += kRoiLanes) {
    A lanes[kRoiLanes] = {};
    for (const Tap<A>* tap = first; tap != last; ++tap) {
      const T* cells = plane + tap->cell * row + x;
      for (int64_t l = 0; l < kRoiLanes; ++l) lanes[l] += tap->weight * static_cast<A>(cells[l]);
    }
    for (int64_t l = 0; l < kRoiLanes; ++l) sums[x + l] = lanes[l];
  }
  for (; x < width; ++x) {
    A sum = 0;
    for (const Tap<A>* tap = first; tap != last; ++tap) {
      sum += tap->weight * static_cast<A>(plane[tap->cell * row + x]);
    }
    sums[x] = sum;
  }
}

// Pools one channel of a RoI from contiguous features: kRoiLanes rows of bins at a time, so that the taps of a
// column of bins are gone through once for all of them. `sums` has kRoiLanes rows of x.width.
template <typename T, typename A>
inline __attribute__((always_inline)) void pool_contiguous(const T* plane, int64_t row, int32_t size,
                                                           const RoiTaps<A>& y, const RoiTaps<A>& x, A* sums,
                                                           T* pooled) {
  const int64_t width = x.width;
  for (int32_t ph = 0; ph < size; ph += kRoiLanes) {
    const int32_t rows = std::min<int32_t>(kRoiLanes, size - ph);
    for (int32_t r = 0; r < rows; ++r) sum_rows(plane + x.begin, row, y, ph + r, width, sums + r * width);
    for (int32_t pw = 0; pw < size; ++pw) {
      A lanes[kRoiLanes] = {};
      for (int32_t t = x.first[pw]; t < x.first[pw + 1]; ++t) {
        const A weight = x.taps[t].weight;
        const A* column = sums + (x.taps[t].cell - x.begin);
        for (int32_t r = 0; r < kRoiLanes; ++r) lanes[r] += weight * column[r * width];
      }
      for (int32_t r = 0; r < rows; ++r) pooled[(ph + r) * size + pw] = static_cast<T>(lanes[r]);
    }
  }
}

// sum[c] = sum over taps of weight * values[(cell - begin) * step + c], for up to kRoiChannels channels.
template <typename V, typename A>
inline __attribute__((always_inline)) void sum_cells(const V* values, int32_t begin, int64_t step, const Tap<A>* first,
                                                     const Tap<A>* last, int64_t channels, A* sums) {
  if (channels == kRoiChannels) {
    A block[kRoiChannels] = {};
    for (const Tap<A>* tap = first; tap != last; ++tap) {
      const V* cell = values + (tap->cell - begin) * step;
      for (int64_t c = 0; c < kRoiChannels; ++c) block[c] += tap->weight * static_cast<A>(cell[c]);
    }
    for (int64_t c = 0; c < kRoiChannels; ++c) sums[c] = block[c];
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    A sum = 0;
    for (const Tap<A>* tap = first; tap != last; ++tap) {
      sum += tap->weight * static_cast<A>(values[(tap->cell - begin) * step + c]);
    }
    sums[c] = sum;
  }
}

// Pools up to kRoiChannels channels of a RoI from channels-last features; `image` points to the first of them.
template <typename T, typename A>
inline __attribute__((always_inline)) void pool_channels_last(const T* image, int64_t row, int64_t step,
                                                              int64_t channels, int32_t size, const RoiTaps<A>& y,
                                                              const RoiTaps<A>& x, A* sums, A* bins, T* pooled) {
  for (int32_t ph = 0; ph < size; ++ph) {
    const Tap<A>* rows = y.taps.data();
    for (int32_t column = 0; column < x.width; ++column) {
      sum_cells(image + (x.begin + column) * step, 0, row, rows + y.first[ph], rows + y.first[ph + 1], channels,
                sums + column * kRoiChannels);
    }
    const Tap<A>* columns = x.taps.data();
    for (int32_t pw = 0; pw < size; ++pw) {
      sum_cells(sums, x.begin, kRoiChannels, columns + x.first[pw], columns + x.first[pw + 1],
                channels, bins + (ph * size + pw) * kRoiChannels);
    }
  }
  const int64_t count = static_cast<int64_t>(size) * size;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t bin = 0; bin < count; ++bin) pooled[c * count + bin] = static_cast<T>(bins[bin * kRoiChannels + c]);
  }
}

// target_clones wants plain functions, hence one pair for each type.
#define DRCNN_ROI_ALIGN_CPU(T)                                                                                  \
  DRCNN_CPU_CLONES void pool_plane(const T* plane, int64_t row, int32_t size, const RoiTaps<accumulate_t<T>>& y, \
                                   const RoiTaps<accumulate_t<T>>& x, accumulate_t<T>* sums, T* pooled) {       \
    pool_contiguous(plane, row, size, y, x, sums, pooled);                                                      \
  }                                                                                                             \
  DRCNN_CPU_CLONES void pool_cells(const T* image, int64_t row, int64_t step, int64_t channels, int32_t size,   \
                                   const RoiTaps<accumulate_t<T>>& y, const RoiTaps<accumulate_t<T>>& x,        \
                                   accumulate_t<T>* sums, accumulate_t<T>* bins, T* pooled) {                   \
    pool_channels_last(image, row, step, channels, size, y, x, sums, bins, pooled);                             \
  }

DRCNN_ROI_ALIGN_CPU(float)
DRCNN_ROI_ALIGN_CPU(double)
DRCNN_ROI_ALIGN_CPU(torch::headeronly::Half)
DRCNN_ROI_ALIGN_CPU(torch::headeronly::BFloat16)
#undef DRCNN_ROI_ALIGN_CPU

template <typename T>
class Pooler {
  using A = accumulate_t<T>;

 public:
  Pooler(const RoiAlignArguments& args, const std::vector<CpuRoi<A>>& rois, T* out)
      : args_(args), rois_(rois), out_(out) {}

  // Pools the RoIs of a slab of contiguous features.
  void pool_slab(const RoiSlab& slab) {
    const Tensor& feature = args_.features[slab.level];
    if (is_channels_last(feature)) return;
    const int64_t row = feature.size(3);
    const int64_t plane = feature.size(2) * row;
    const T* image = feature.template const_data_ptr<T>() + slab.image * args_.channels * plane;
    // Rows of bins that there are not stay zero.
    sums_.resize(kRoiLanes * row);
    for (int64_t c = slab.first; c < slab.first + slab.count; ++c) {
      for (const int64_t roi : *slab.rois) {
        pool_plane(image + c * plane, row, args_.size, rois_[roi].y, rois_[roi].x, sums_.data(),
                   out_ + (roi * args_.channels + c) * args_.bins());
      }
    }
  }

  // Pools a RoI of channels-last features, or writes the zeros of one that has no level.
  void pool_roi(int64_t index) {
    const CpuRoi<A>& roi = rois_[index];
    T* pooled = out_ + index * args_.channels * args_.bins();
    if (roi.level < 0) {
      std::fill_n(pooled, args_.channels * args_.bins(), static_cast<T>(0.0f));
      return;
    }
    const Tensor& feature = args_.features[roi.level];
    if (!is_channels_last(feature)) return;
    const int64_t row = feature.size(3) * args_.channels;
    const T* image = feature.template const_data_ptr<T>() + index / args_.per_image * feature.size(2) * row;
    if (static_cast<int64_t>(sums_.size()) < roi.x.width * kRoiChannels) sums_.resize(roi.x.width * kRoiChannels);
    bins_.resize(args_.bins() * kRoiChannels);
    for (int64_t c = 0; c < args_.channels; c += kRoiChannels) {
      pool_cells(image + c, row, args_.channels, std::min(kRoiChannels, args_.channels - c), args_.size, roi.y, roi.x,
                 sums_.data(), bins_.data(), pooled + c * args_.bins());
    }
  }

 private:
  const RoiAlignArguments& args_;
  const std::vector<CpuRoi<A>>& rois_;
  T* out_;
  std::vector<A> sums_;
  std::vector<A> bins_;
};

Tensor roi_align_fwd_cpu(std::vector<Tensor> features, const Tensor& boxes, const Tensor& levels,
                         std::vector<int64_t> strides, int64_t size, int64_t sampling_ratio, bool aligned, bool) {
  const RoiAlignArguments args(features, boxes, levels, strides, size, sampling_ratio, aligned);
  Tensor out = args.empty_pooled();
  dispatch_floating(args.type(), "roi_align", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    T* pooled = out.template mutable_data_ptr<T>();
    const std::vector<CpuRoi<A>> rois = build_rois<A>(args);
    const RoiSlabs slabs(args, rois);
    for_each_task(slabs.slabs.size(), [&] {
      return [&slabs, pooler = Pooler<T>(args, rois, pooled)](int64_t task) mutable {
        pooler.pool_slab(slabs.slabs[task]);
      };
    });
    for_each_task(args.rois(), [&] {
      return [pooler = Pooler<T>(args, rois, pooled)](int64_t roi) mutable { pooler.pool_roi(roi); };
    });
  });
  return out;
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_FRAGMENT(drcnn, m) {
  m.def(
      "roi_align_fwd(Tensor[] features, Tensor boxes, Tensor levels, int[] strides, int size, int sampling_ratio, "
      "bool aligned, bool deterministic) -> Tensor");
  m.def(
      "roi_align_bwd(Tensor grad, Tensor[] features, Tensor boxes, Tensor levels, int[] strides, int size, "
      "int sampling_ratio, bool aligned, bool deterministic) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(drcnn, CPU, m) { m.impl("roi_align_fwd", TORCH_BOX(&drcnn::roi_align_fwd_cpu)); }
