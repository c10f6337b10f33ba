// The checked arguments of roi_align, the same for the CPU and for CUDA, forward and backward.
#pragma once

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace drcnn {

constexpr int kMaxLevels = 8;

// Whether memory runs over the channels first; an axis of one element has no say in it.
inline bool is_channels_last(const Tensor& t) {
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (t.size(d) == 1) continue;
    if (t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return !t.is_contiguous();
}

struct RoiAlignArguments {
  std::vector<Tensor> features;  // each contiguous or channels-last
  Tensor boxes;
  Tensor levels;
  std::vector<int64_t> strides;
  int32_t size;
  int32_t sampling_ratio;
  bool aligned;
  int64_t images;
  int64_t per_image;
  int64_t channels;

  RoiAlignArguments(const std::vector<Tensor>& features_, const Tensor& boxes_, const Tensor& levels_,
                    const std::vector<int64_t>& strides_, int64_t size_, int64_t sampling_ratio_, bool aligned_)
      : boxes(torch::stable::contiguous(boxes_)),
        levels(torch::stable::contiguous(levels_)),
        strides(strides_),
        size(static_cast<int32_t>(size_)),
        sampling_ratio(static_cast<int32_t>(sampling_ratio_)),
        aligned(aligned_) {
    STD_TORCH_CHECK(!features_.empty() && features_.size() <= kMaxLevels, "roi_align: expected 1 to ", kMaxLevels,
                    " levels of features, got ", features_.size());
    STD_TORCH_CHECK(features_.size() == strides.size(), "roi_align: features and strides must be as many");
    STD_TORCH_CHECK(size_ >= 1 && size_ <= 1024, "roi_align: output_size must be in 1..1024, got ", size_);
    STD_TORCH_CHECK(sampling_ratio_ >= 0 && sampling_ratio_ <= 1024,
                    "roi_align: sampling_ratio must be in 0..1024, got ", sampling_ratio_);
    STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4, "roi_align: boxes must have shape [B, R, 4]");
    images = boxes.size(0);
    per_image = boxes.size(1);
    for (const Tensor& feature : features_) add_level(feature);
    channels = features[0].size(1);
    STD_TORCH_CHECK(boxes.scalar_type() == accumulate_type(type()),
                    "roi_align: boxes must be float32, or float64 for float64 features");
    STD_TORCH_CHECK(levels.scalar_type() == ScalarType::Long, "roi_align: levels must be int64");
    STD_TORCH_CHECK(levels.dim() == 2 && levels.size(0) == images && levels.size(1) == per_image,
                    "roi_align: levels must have shape [B, R]");
    STD_TORCH_CHECK(same_device(features[0], boxes) && same_device(features[0], levels),
                    "roi_align: boxes and levels must be on the features' device");
    for (const int64_t stride : strides) STD_TORCH_CHECK(stride > 0, "roi_align: strides must be positive");
  }

  ScalarType type() const { return features[0].scalar_type(); }
  int64_t rois() const { return images * per_image; }
  int64_t bins() const { return static_cast<int64_t>(size) * size; }

  // The pooled features, without values.
  Tensor empty_pooled() const {
    return torch::stable::empty({images, per_image, channels, size, size}, type(), std::nullopt,
                                features[0].device());
  }

  // The gradient of a level, without values, in the layout of its features.
  Tensor empty_gradient(size_t level, ScalarType dtype) const {
    const Tensor& f = features[level];
    const auto format = is_channels_last(f) ? torch::headeronly::MemoryFormat::ChannelsLast
                                            : torch::headeronly::MemoryFormat::Contiguous;
    return torch::stable::empty({f.size(0), f.size(1), f.size(2), f.size(3)}, dtype, std::nullopt, f.device(),
                                std::nullopt, format);
  }

  void check_grad(const Tensor& grad) const {
    STD_TORCH_CHECK(grad.dim() == 5 && grad.size(0) == images && grad.size(1) == per_image &&
                        grad.size(2) == channels && grad.size(3) == size && grad.size(4) == size,
                    "roi_align: grad must have the shape of the pooled features");
    STD_TORCH_CHECK(grad.scalar_type() == type(), "roi_align: grad must have the features' dtype");
    STD_TORCH_CHECK(same_device(grad, features[0]), "roi_align: grad must be on the features' device");
  }

 private:
  void add_level(const Tensor& feature) {
    STD_TORCH_CHECK(feature.dim() == 4 && feature.size(0) == images,
                    "roi_align: each level of features must have shape [B, C, H, W]");
    const Tensor& first = features.empty() ? feature : features[0];
    STD_TORCH_CHECK(feature.size(1) == first.size(1) && feature.scalar_type() == first.scalar_type() &&
                        same_device(feature, first),
                    "roi_align: all levels must have the same channels, dtype and device");
    STD_TORCH_CHECK(feature.size(2) > 0 && feature.size(3) > 0 && feature.size(2) < (1 << 24) &&
                        feature.size(3) < (1 << 24),
                    "roi_align: each level of features needs at least one cell and fewer than 2^24 a side");
    features.push_back(is_channels_last(feature) ? feature : torch::stable::contiguous(feature));
  }
};

}  // namespace drcnn
