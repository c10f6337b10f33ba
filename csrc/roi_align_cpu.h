// What the forward and the backward of roi_align on the CPU share: taps of a RoI, levels, and dynamic scheduling.
#pragma once

#include <atomic>
#include <vector>

#include "roi_align.h"
#include "roi_align_arguments.h"

namespace drcnn {

constexpr int64_t kRoiLanes = 8;       // cells of a row that a vector takes
constexpr int64_t kRoiChannels = 32;   // channels of channels-last features that are pooled together
constexpr int64_t kRoiPlanes = 4;      // channels of contiguous features that a task owns

// The taps of one axis of a RoI, bin after bin.
template <typename A>
struct RoiTaps {
  std::vector<int32_t> first;  // [size + 1] of each bin in taps
  std::vector<Tap<A>> taps;
  int32_t begin = 0;  // cells from begin to begin + width hold all taps
  int32_t width = 0;

  void build(const RoiAxis<A>& axis, int32_t size) {
    const int64_t most = 2 * std::min<int64_t>(axis.samples, axis.extent);
    first.assign(size + 1, 0);
    taps.clear();
    begin = axis.extent;
    int32_t end = 0;
    for (int32_t bin = 0; bin < size; ++bin) {
      taps.resize(first[bin] + most);
      const int32_t count = roi_taps(axis, bin, taps.data() + first[bin]);
      first[bin + 1] = first[bin] + count;
      for (int32_t t = first[bin]; t < first[bin + 1]; ++t) {
        begin = std::min(begin, taps[t].cell);
        end = std::max(end, taps[t].cell + 1);
      }
    }
    taps.resize(first[size]);
    width = std::max(end - begin, 0);
  }

  // Widens the range to whole vectors where the level has the cells.
  void widen(int32_t extent, int32_t lanes) {
    const int32_t wide = (width + lanes - 1) / lanes * lanes;
    if (width == 0 || wide > extent) return;
    begin = std::min(begin, extent - wide);
    width = wide;
  }
};

// A RoI that is ready to be pooled, or to spread its gradient.
template <typename A>
struct CpuRoi {
  int32_t level = -1;  // none: pools to zeros
  RoiTaps<A> y;
  RoiTaps<A> x;

  void build(const RoiAlignArguments& args, int64_t roi) {
    const A* box = args.boxes.template const_data_ptr<A>() + 4 * roi;
    const int64_t own = args.levels.template const_data_ptr<int64_t>()[roi];
    level = -1;
    if (!is_poolable(box) || own < 0 || own >= static_cast<int64_t>(args.features.size())) return;
    const Tensor& feature = args.features[own];
    const int32_t height = static_cast<int32_t>(feature.size(2));
    const int32_t width = static_cast<int32_t>(feature.size(3));
    const A scale = A(1) / static_cast<A>(args.strides[own]);
    const RoiAxis<A> vertical =
        roi_axis(box[1], box[3], scale, args.size, args.sampling_ratio, args.aligned, height);
    const RoiAxis<A> horizontal =
        roi_axis(box[0], box[2], scale, args.size, args.sampling_ratio, args.aligned, width);
    if (vertical.samples == 0 || horizontal.samples == 0) return;
    y.build(vertical, args.size);
    x.build(horizontal, args.size);
    if (y.taps.empty() || x.taps.empty()) return;
    if (!is_channels_last(feature)) x.widen(width, kRoiLanes);
    level = static_cast<int32_t>(own);
  }
};

template <typename A>
std::vector<CpuRoi<A>> build_rois(const RoiAlignArguments& args) {
  std::vector<CpuRoi<A>> rois(args.rois());
  torch::stable::parallel_for(0, args.rois(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t roi = begin; roi < end; ++roi) rois[roi].build(args, roi);
  });
  return rois;
}

// A task: channels first..first + count of one image of one level, and the RoIs pooled from there. The thread
// that has it goes through all of them channel by channel, so that a plane stays in its cache.
struct RoiSlab {
  int32_t level;
  int64_t image;
  int64_t first;
  int64_t count;
  const std::vector<int64_t>* rois;
};

struct RoiSlabs {
  std::vector<std::vector<int64_t>> rois;  // of each image of each level, in their order
  std::vector<RoiSlab> slabs;              // the finest level, which is the largest, first

  template <typename A>
  RoiSlabs(const RoiAlignArguments& args, const std::vector<CpuRoi<A>>& all) : rois(args.features.size() * args.images) {
    for (size_t roi = 0; roi < all.size(); ++roi) {
      if (all[roi].level >= 0) rois[all[roi].level * args.images + roi / args.per_image].push_back(roi);
    }
    for (size_t level = 0; level < args.features.size(); ++level) {
      const int64_t step = is_channels_last(args.features[level]) ? kRoiChannels : kRoiPlanes;
      for (int64_t image = 0; image < args.images; ++image) {
        for (int64_t c = 0; c < args.channels; c += step) {
          slabs.push_back(RoiSlab{static_cast<int32_t>(level), image, c, std::min(step, args.channels - c),
                                  &rois[level * args.images + image]});
        }
      }
    }
  }
};

// Calls function(task) for 0..tasks-1; a thread that is done takes the next task, so uneven tasks even out.
// `make` gives each thread a function of its own, which may hold scratch memory.
template <typename Make>
void for_each_task(int64_t tasks, const Make& make) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
    auto function = make();
    for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) function(task);
  });
}

}  // namespace drcnn
