// The checked arguments of collage, the same for the CPU and for CUDA.
#pragma once

#include <algorithm>
#include <vector>

#include "collage.h"
#include "tensors.h"

namespace drcnn {

constexpr int64_t kCollageMaxParts = 5;  // a side
constexpr int64_t kCollageMaxComponents = kCollageMaxParts * kCollageMaxParts;

// A component and its part of the canvas, in which it is drawn from the top left as far as its axes reach.
struct CollageComponent {
  const void* pixels;
  const int64_t* sizes;  // [B][2], height and width of the content
  int64_t image_stride;
  int64_t channel_stride;
  int64_t row_stride;
  CollageAxis y;
  CollageAxis x;
  int32_t top;
  int32_t left;
  int32_t bottom;
  int32_t right;
};

struct CollageArguments {
  std::vector<Tensor> images;  // with contiguous rows; these and the sizes own what the components point to
  std::vector<Tensor> sizes;
  std::vector<CollageComponent> components;
  int32_t parts;  // a side
  int32_t height;
  int32_t width;
  int64_t batch;
  int64_t channels;
  bool is_bilinear;
  std::vector<float> fill;

  CollageArguments(const std::vector<Tensor>& images_, const std::vector<Tensor>& sizes_,
                   const std::vector<int64_t>& cells, int64_t height_, int64_t width_, int64_t mode,
                   const std::vector<double>& fill_)
      : parts(1),
        height(static_cast<int32_t>(height_)),
        width(static_cast<int32_t>(width_)),
        is_bilinear(mode == 1),
        fill(fill_.begin(), fill_.end()) {
    const int64_t count = static_cast<int64_t>(images_.size());
    while (parts < kCollageMaxParts && parts * parts < count) ++parts;
    STD_TORCH_CHECK(parts * parts == count, "collage: expected 1, 4, 9, 16 or 25 images, got ", count);
    STD_TORCH_CHECK(static_cast<int64_t>(sizes_.size()) == count && static_cast<int64_t>(cells.size()) == 4 * count,
                    "collage: expected sizes and four numbers of a cell for each of the images");
    STD_TORCH_CHECK(parts <= height_ && height_ <= kCollageMaxSide && parts <= width_ && width_ <= kCollageMaxSide,
                    "collage: the canvas must have sides in ", parts, "..", kCollageMaxSide);
    STD_TORCH_CHECK(mode == 0 || mode == 1, "collage: mode must be 0 (nearest) or 1 (bilinear), got ", mode);
    STD_TORCH_CHECK(images_[0].dim() == 4, "collage: images must have shape [B, C, H, W]");
    batch = images_[0].size(0);
    channels = images_[0].size(1);
    STD_TORCH_CHECK(static_cast<int64_t>(fill.size()) == channels, "collage: fill must have one value per channel");
    for (int64_t j = 0; j < count; ++j) add(images_[j], images_[0], sizes_[j], cells.data() + 4 * j);
  }

  ScalarType type() const { return images[0].scalar_type(); }

  // The canvas, without values.
  Tensor empty_canvas() const {
    return torch::stable::empty({batch, channels, height, width}, type(), std::nullopt, images[0].device());
  }

 private:
  void add(const Tensor& image, const Tensor& first, const Tensor& size, const int64_t* cell) {
    STD_TORCH_CHECK(image.dim() == 4 && image.size(0) == batch && image.size(1) == channels &&
                        image.scalar_type() == first.scalar_type() && same_device(image, first),
                    "collage: all images must have the same batch, channels, dtype and device");
    STD_TORCH_CHECK(size.dim() == 2 && size.size(0) == batch && size.size(1) == 2 &&
                        size.scalar_type() == ScalarType::Long && same_device(size, first),
                    "collage: each of sizes must be int64 of shape [B, 2] on the images' device");
    for (const int64_t side : {image.size(2), image.size(3)}) {
      STD_TORCH_CHECK(side >= 1 && side <= kCollageMaxSide, "collage: images must have sides in 1..", kCollageMaxSide,
                      ", got ", side);
    }
    const int32_t row = static_cast<int32_t>(components.size()) / parts;
    const int32_t column = static_cast<int32_t>(components.size()) % parts;
    images.push_back(image.stride(3) == 1 ? image : torch::stable::contiguous(image));
    sizes.push_back(torch::stable::contiguous(size));
    CollageComponent own;
    own.pixels = images.back().const_data_ptr();
    own.sizes = sizes.back().const_data_ptr<int64_t>();
    own.image_stride = images.back().stride(0);
    own.channel_stride = images.back().stride(1);
    own.row_stride = images.back().stride(2);
    own.top = collage_line(row, parts, height);
    own.left = collage_line(column, parts, width);
    own.bottom = collage_line(row + 1, parts, height);
    own.right = collage_line(column + 1, parts, width);
    own.y = {static_cast<int32_t>(image.size(2)), static_cast<int32_t>(cell[2])};
    own.x = {static_cast<int32_t>(image.size(3)), static_cast<int32_t>(cell[3])};
    STD_TORCH_CHECK(cell[0] == own.top && cell[1] == own.left && cell[2] >= 1 && cell[2] <= own.bottom - own.top &&
                        cell[3] >= 1 && cell[3] <= own.right - own.left,
                    "collage: cell ", components.size(), " is not at the top left of its part, or leaves it");
    components.push_back(own);
  }
};

// Calls function(T{}) with the C++ type of the images.
template <typename Function>
void dispatch_pixels(ScalarType type, const Function& function) {
  switch (type) {
    case ScalarType::Byte:
      return function(uint8_t{});
    case ScalarType::Half:
      return function(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return function(torch::headeronly::BFloat16{});
    case ScalarType::Float:
      return function(float{});
    default:
      STD_TORCH_CHECK(false, "collage: expected uint8, float16, bfloat16 or float32, got ",
                      torch::headeronly::toString(type));
  }
}

}  // namespace drcnn
