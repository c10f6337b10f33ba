// The backward of roi_align on the CPU. A thread owns some channels of one image of one level, and adds the RoIs
// to them in their order: no atomics, and equal bits for every number of threads.

#include <type_traits>

#include "roi_align_cpu.h"

namespace drcnn {
namespace {

// Adds a RoI's gradient, [size][size] of one channel, to a plane of cells.
template <typename T, typename A>
inline __attribute__((always_inline)) void spread_contiguous(const T* grad, int32_t size, const RoiTaps<A>& y,
                                                             const RoiTaps<A>& x, int64_t row, A* sums, A* plane) {
  const int64_t width = x.width;
  for (int32_t ph = 0; ph < size; ++ph) {
    for (int64_t i = 0; i < width; ++i) sums[i] = A(0);
    for (int32_t pw = 0; pw < size; ++pw) {
      const A g = static_cast<A>(grad[ph * size + pw]);
      for (int32_t t = x.first[pw]; t < x.first[pw + 1]; ++t) sums[x.taps[t].cell - x.begin] += x.taps[t].weight * g;
    }
    for (int32_t t = y.first[ph]; t < y.first[ph + 1]; ++t) {
      const A weight = y.taps[t].weight;
      A* cells = plane + y.taps[t].cell * row + x.begin;
      int64_t i = 0;
      for (; i + kRoiLanes <= width; i += kRoiLanes) {
        for (int64_t l = 0; l < kRoiLanes; ++l) cells[i + l] += weight * sums[i + l];
      }
      for (; i < width; ++i) cells[i] += weight * sums[i];
    }
  }
}

template <typename A>
inline __attribute__((always_inline)) void add_scaled(A weight, const A* values, int64_t channels, A* sums) {
  if (channels == kRoiChannels) {
    for (int64_t c = 0; c < kRoiChannels; ++c) sums[c] += weight * values[c];
  } else {
    for (int64_t c = 0; c < channels; ++c) sums[c] += weight * values[c];
  }
}

// The same for up to kRoiChannels channels of channels-last cells, which are `step` apart.
template <typename T, typename A>
inline __attribute__((always_inline)) void spread_channels_last(const T* grad, int32_t size, const RoiTaps<A>& y,
                                                                const RoiTaps<A>& x, int64_t row, int64_t step,
                                                                int64_t channels, A* bins, A* sums, A* cells) {
  const int64_t count = static_cast<int64_t>(size) * size;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t bin = 0; bin < count; ++bin) bins[bin * kRoiChannels + c] = static_cast<A>(grad[c * count + bin]);
  }
  for (int32_t ph = 0; ph < size; ++ph) {
    for (int64_t i = 0; i < x.width * kRoiChannels; ++i) sums[i] = A(0);
    for (int32_t pw = 0; pw < size; ++pw) {
      for (int32_t t = x.first[pw]; t < x.first[pw + 1]; ++t) {
        add_scaled(x.taps[t].weight, bins + (ph * size + pw) * kRoiChannels, channels,
                   sums + (x.taps[t].cell - x.begin) * kRoiChannels);
      }
    }
    for (int32_t t = y.first[ph]; t < y.first[ph + 1]; ++t) {
      for (int32_t column = 0; column < x.width; ++column) {
        add_scaled(y.taps[t].weight, sums + column * kRoiChannels, channels,
                   cells + y.taps[t].cell * row + (x.begin + column) * step);
      }
    }
  }
}

// target_clones wants plain functions, hence one pair for each type.
#define DRCNN_ROI_ALIGN_CPU(T)                                                                                   \
  DRCNN_CPU_CLONES void spread_rows(const T* grad, int32_t size, const RoiTaps<accumulate_t<T>>& y,              \
                                    const RoiTaps<accumulate_t<T>>& x, int64_t row, accumulate_t<T>* sums,       \
                                    accumulate_t<T>* plane) {                                                    \
    spread_contiguous(grad, size, y, x, row, sums, plane);                                                       \
  }                                                                                                              \
  DRCNN_CPU_CLONES void spread_cells(const T* grad, int32_t size, const RoiTaps<accumulate_t<T>>& y,             \
                                     const RoiTaps<accumulate_t<T>>& x, int64_t row, int64_t step,               \
                                     int64_t channels, accumulate_t<T>* bins, accumulate_t<T>* sums,             \
                                     accumulate_t<T>* cells) {                                                   \
    spread_channels_last(grad, size, y, x, row, step, channels, bins, sums, cells);                              \
  }

DRCNN_ROI_ALIGN_CPU(float)
DRCNN_ROI_ALIGN_CPU(double)
DRCNN_ROI_ALIGN_CPU(torch::headeronly::Half)
DRCNN_ROI_ALIGN_CPU(torch::headeronly::BFloat16)
#undef DRCNN_ROI_ALIGN_CPU

template <typename T>
class Spreader {
  using A = accumulate_t<T>;

 public:
  Spreader(const RoiAlignArguments& args, const std::vector<CpuRoi<A>>& rois, const T* grad,
           const std::vector<Tensor>& gradients)
      : args_(args), rois_(rois), grad_(grad), gradients_(gradients) {}

  void operator()(const RoiSlab& slab) {
    Tensor gradient = gradients_[slab.level];
    height_ = gradient.size(2);
    width_ = gradient.size(3);
    T* image = gradient.template mutable_data_ptr<T>() + slab.image * args_.channels * height_ * width_;
    if (is_channels_last(args_.features[slab.level])) {
      spread_over_cells(slab, image + slab.first);
    } else {
      for (int64_t c = slab.first; c < slab.first + slab.count; ++c) {
        spread_over_plane(slab, c, image + c * height_ * width_);
      }
    }
  }

 private:
  const T* grad_of(int64_t roi, int64_t channel) const {
    return grad_ + (roi * args_.channels + channel) * args_.bins();
  }

  void spread_over_plane(const RoiSlab& slab, int64_t channel, T* plane) {
    const int64_t cells = height_ * width_;
    A* sums = scratch(sums_, width_);
    A* target;
    if constexpr (std::is_same_v<T, A>) {
      target = plane;
    } else {
      target = scratch(cells_, cells);  // half precision is summed in float
    }
    std::fill_n(target, cells, A(0));
    for (const int64_t roi : *slab.rois) {
      spread_rows(grad_of(roi, channel), args_.size, rois_[roi].y, rois_[roi].x, width_, sums, target);
    }
    if constexpr (!std::is_same_v<T, A>) {
      for (int64_t i = 0; i < cells; ++i) plane[i] = static_cast<T>(target[i]);
    }
  }

  void spread_over_cells(const RoiSlab& slab, T* first) {
    const int64_t cells = height_ * width_;
    A* sums = scratch(sums_, width_ * kRoiChannels);
    A* bins = scratch(bins_, args_.bins() * kRoiChannels);
    A* target;
    int64_t step = args_.channels;
    if constexpr (std::is_same_v<T, A>) {
      target = first;
    } else {
      target = scratch(cells_, cells * kRoiChannels);
      step = kRoiChannels;
    }
    for (int64_t i = 0; i < cells; ++i) std::fill_n(target + i * step, slab.count, A(0));
    for (const int64_t roi : *slab.rois) {
      spread_cells(grad_of(roi, slab.first), args_.size, rois_[roi].y, rois_[roi].x, width_ * step, step, slab.count,
                   bins, sums, target);
    }
    if constexpr (!std::is_same_v<T, A>) {
      for (int64_t i = 0; i < cells; ++i) {
        for (int64_t c = 0; c < slab.count; ++c) first[i * args_.channels + c] = static_cast<T>(target[i * step + c]);
      }
    }
  }

  static A* scratch(std::vector<A>& memory, int64_t count) {
    if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
    return memory.data();
  }

  const RoiAlignArguments& args_;
  const std::vector<CpuRoi<A>>& rois_;
  const T* grad_;
  const std::vector<Tensor>& gradients_;
  int64_t height_ = 0;
  int64_t width_ = 0;
  std::vector<A> sums_;
  std::vector<A> bins_;
  std::vector<A> cells_;
};

std::vector<Tensor> roi_align_bwd_cpu(const Tensor& grad_, std::vector<Tensor> features, const Tensor& boxes,
                                      const Tensor& levels, std::vector<int64_t> strides, int64_t size,
                                      int64_t sampling_ratio, bool aligned, bool) {
  const RoiAlignArguments args(features, boxes, levels, strides, size, sampling_ratio, aligned);
  args.check_grad(grad_);
  const Tensor grad = torch::stable::contiguous(grad_);
  std::vector<Tensor> gradients;
  for (size_t level = 0; level < args.features.size(); ++level) {
    gradients.push_back(args.empty_gradient(level, args.type()));
  }
  dispatch_floating(args.type(), "roi_align", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const std::vector<CpuRoi<A>> rois = build_rois<A>(args);
    const RoiSlabs slabs(args, rois);
    const T* values = grad.template const_data_ptr<T>();
    for_each_task(slabs.slabs.size(), [&] {
      return [&slabs, spread = Spreader<T>(args, rois, values, gradients)](int64_t task) mutable {
        spread(slabs.slabs[task]);
      };
    });
  });
  return gradients;
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_IMPL(drcnn, CPU, m) { m.impl("roi_align_bwd", TORCH_BOX(&drcnn::roi_align_bwd_cpu)); }
