// collage on CUDA: one launch over the parts of all canvases. A thread finds where four neighbouring columns come from
// and then draws them in several rows and all channels.

#include "collage_arguments.h"
#include "launch.h"

namespace drcnn {
namespace {

constexpr int kColumns = 4;
constexpr int kRows = 4;  // of a thread; they share the positions of its columns
constexpr int kBlockColumns = kWarp;
constexpr int kBlockRows = 4;
constexpr int kChannels = 32;  // of a launch

// What a launch draws, by value.
struct CollageGrid {
  CollageComponent components[kCollageMaxComponents];
  float fill[kChannels];
  int32_t component_count;
  int32_t channels;  // of this launch
  int32_t first_channel;
  int32_t all_channels;
  int32_t height;
  int32_t width;
};

template <typename T>
struct alignas(kColumns * sizeof(T)) Pixels {
  T values[kColumns];
};

// Where a drawn pixel comes from along one axis.
struct Source {
  int32_t nearest;  // or the lower one of two
  int32_t high;
  float share;
  bool has_content;
};

template <bool kBilinear>
__device__ Source source_of(CollageAxis axis, int32_t position, int64_t content) {
  const int32_t extent = static_cast<int32_t>(min(max(content, int64_t{0}), static_cast<int64_t>(axis.source)));
  Source source{0, 0, 0.0f, false};
  if (position < 0 || position >= axis.drawn) return source;
  source.nearest = collage_nearest(axis, position);
  source.has_content = source.nearest < extent;
  if constexpr (kBilinear) {
    const CollageTap tap = collage_tap(axis, position);
    source.nearest = tap.low;
    source.high = min(tap.low + 1, extent - 1);
    source.share = tap.share;
  }
  return source;
}

template <typename T, bool kBilinear>
__device__ T pixel_of(const T* plane, int64_t stride, const Source& y, const Source& x) {
  if constexpr (kBilinear) {
    const T* low = plane + y.nearest * stride;
    const T* high = plane + y.high * stride;
    const float left = collage_blend(static_cast<float>(low[x.nearest]), static_cast<float>(high[x.nearest]), y.share);
    const float right = collage_blend(static_cast<float>(low[x.high]), static_cast<float>(high[x.high]), y.share);
    return collage_rounded<T>(collage_blend(left, right, x.share));
  } else {
    return plane[y.nearest * stride + x.nearest];
  }
}

// Blocks go over the columns and rows of a part, and over the components of all images. A thread's columns begin at a
// multiple of four, so that they are stored at once where the rows of the canvas are aligned.
template <typename T, bool kBilinear, bool kAligned>
__global__ void __launch_bounds__(kBlockColumns* kBlockRows)
    collage_kernel(const __grid_constant__ CollageGrid grid, T* canvas) {
  const int32_t image = blockIdx.z / grid.component_count;
  const CollageComponent& own = grid.components[blockIdx.z % grid.component_count];
  const int32_t first = (own.left & ~(kColumns - 1)) + (blockIdx.x * kBlockColumns + threadIdx.x) * kColumns;
  if (first >= own.right) return;
  const int64_t height = own.sizes[2 * image];
  const int64_t width = own.sizes[2 * image + 1];
  Source x[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) x[c] = source_of<kBilinear>(own.x, first + c - own.left, width);
  const bool is_whole = kAligned && first >= own.left && first + kColumns <= own.right;
  const T* pixels = static_cast<const T*>(own.pixels) + image * own.image_stride;
  pixels += grid.first_channel * own.channel_stride;
  canvas += (static_cast<int64_t>(image) * grid.all_channels + grid.first_channel) * grid.height * grid.width;
  for (int32_t r = 0; r < kRows; ++r) {
    const int32_t row = own.top + (blockIdx.y * kRows + r) * kBlockRows + threadIdx.y;
    if (row >= own.bottom) return;
    const Source y = source_of<kBilinear>(own.y, row - own.top, height);
    for (int32_t channel = 0; channel < grid.channels; ++channel) {
      const T* plane = pixels + channel * own.channel_stride;
      T* out = canvas + (static_cast<int64_t>(channel) * grid.height + row) * grid.width + first;
      Pixels<T> drawn;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        drawn.values[c] = static_cast<T>(grid.fill[channel]);
        if (y.has_content && x[c].has_content) {
          drawn.values[c] = pixel_of<T, kBilinear>(plane, own.row_stride, y, x[c]);
        }
      }
      if (is_whole) {
        *reinterpret_cast<Pixels<T>*>(out) = drawn;
      } else {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (first + c >= own.left && first + c < own.right) out[c] = drawn.values[c];
        }
      }
    }
  }
}

template <typename T, bool kBilinear>
void launch(const CollageArguments& args, T* canvas, cudaStream_t stream) {
  const int64_t layers = args.batch * static_cast<int64_t>(args.components.size());
  STD_TORCH_CHECK(layers <= 65535, "collage: too many images for CUDA, got ", args.batch);
  CollageGrid grid{};
  std::copy(args.components.begin(), args.components.end(), grid.components);
  grid.component_count = static_cast<int32_t>(args.components.size());
  grid.all_channels = static_cast<int32_t>(args.channels);
  grid.height = args.height;
  grid.width = args.width;
  // The largest part, with the columns before it that are needed to begin at a multiple of four.
  const int32_t columns = (args.width + args.parts - 1) / args.parts + kColumns - 1;
  const int32_t rows = (args.height + args.parts - 1) / args.parts;
  constexpr int kBlockWidth = kBlockColumns * kColumns;
  constexpr int kBlockHeight = kBlockRows * kRows;
  const dim3 blocks((columns + kBlockWidth - 1) / kBlockWidth, (rows + kBlockHeight - 1) / kBlockHeight,
                    static_cast<unsigned>(layers));
  const dim3 threads(kBlockColumns, kBlockRows);
  const bool is_aligned = args.width % kColumns == 0 && reinterpret_cast<uintptr_t>(canvas) % alignof(Pixels<T>) == 0;
  const auto kernel = is_aligned ? collage_kernel<T, kBilinear, true> : collage_kernel<T, kBilinear, false>;
  for (int32_t first = 0; first < grid.all_channels; first += kChannels) {
    grid.first_channel = first;
    grid.channels = std::min(kChannels, grid.all_channels - first);
    std::copy_n(args.fill.begin() + first, grid.channels, grid.fill);
    kernel<<<blocks, threads, 0, stream>>>(grid, canvas);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

Tensor collage_cuda(std::vector<Tensor> images, std::vector<Tensor> sizes, std::vector<int64_t> cells, int64_t height,
                    int64_t width, int64_t mode, std::vector<double> fill) {
  STD_TORCH_CHECK(!images.empty(), "collage: expected at least one image");
  const torch::stable::accelerator::DeviceGuard guard(images[0].get_device_index());
  const CollageArguments args(images, sizes, cells, height, width, mode, fill);
  Tensor canvas = args.empty_canvas();
  if (canvas.numel() == 0) return canvas;
  const cudaStream_t stream = current_stream(images[0].get_device_index());
  dispatch_pixels(args.type(), [&](auto type) {
    using T = decltype(type);
    T* pixels = canvas.template mutable_data_ptr<T>();
    return args.is_bilinear ? launch<T, true>(args, pixels, stream) : launch<T, false>(args, pixels, stream);
  });
  return canvas;
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_IMPL(drcnn, CUDA, m) { m.impl("collage", TORCH_BOX(&drcnn::collage_cuda)); }
