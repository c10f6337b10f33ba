// collage on the CPU, and the schema of the operator. Rows of the canvas are shared out among threads; where the
// columns of a component come from is computed once for all rows.

#include <cstring>
#include <type_traits>

#include "collage_arguments.h"

namespace drcnn {
namespace {

constexpr int64_t kPixelsPerTask = 1 << 15;

// Nearest interpolation only moves bits.
template <typename T>
using bits_t = std::conditional_t<sizeof(T) == 1, uint8_t, std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>>;

template <int kStep, typename B>
inline __attribute__((always_inline)) void take_every(const B* __restrict__ row, int64_t count, B* __restrict__ out) {
  for (int64_t x = 0; x < count; ++x) out[x] = row[kStep * x + kStep / 2];
}

// out[x] = row[nearest[x]]; the steps that a collage of equal shapes takes need no table.
template <typename B>
inline __attribute__((always_inline)) void take(const B* __restrict__ row, const int32_t* __restrict__ nearest,
                                                int32_t step, int64_t count, B* __restrict__ out) {
  if (step == 1) {
    std::memcpy(out, row, count * sizeof(B));
  } else if (step == 2) {
    take_every<2>(row, count, out);
  } else if (step == 3) {
    take_every<3>(row, count, out);
  } else {
    for (int64_t x = 0; x < count; ++x) out[x] = row[nearest[x]];
  }
}

template <typename T>
inline __attribute__((always_inline)) void blend(const T* __restrict__ low, const T* __restrict__ high, float share,
                                                 int64_t count, float* __restrict__ out) {
  for (int64_t x = 0; x < count; ++x) {
    out[x] = collage_blend(static_cast<float>(low[x]), static_cast<float>(high[x]), share);
  }
}

// Blends each pixel of a row, to which its last pixel was appended once more, with the next.
template <typename T>
inline __attribute__((always_inline)) void shrink(const float* __restrict__ row, const int32_t* __restrict__ low,
                                                  const float* __restrict__ share, int32_t step, int64_t count,
                                                  T* __restrict__ out) {
  if (step == 2) {
    for (int64_t x = 0; x < count; ++x) out[x] = collage_rounded<T>(collage_blend(row[2 * x], row[2 * x + 1], 0.5f));
  } else {
    for (int64_t x = 0; x < count; ++x) {
      out[x] = collage_rounded<T>(collage_blend(row[low[x]], row[low[x] + 1], share[x]));
    }
  }
}

// target_clones wants plain functions, hence one for each type.
#define DRCNN_COLLAGE_TAKE(B)                                                                                         \
  DRCNN_CPU_CLONES void take_columns(const B* row, const int32_t* nearest, int32_t step, int64_t count, B* out) {     \
    take(row, nearest, step, count, out);                                                                             \
  }
#define DRCNN_COLLAGE_BLEND(T)                                                                                        \
  DRCNN_CPU_CLONES void blend_rows(const T* low, const T* high, float share, int64_t count, float* out) {             \
    blend(low, high, share, count, out);                                                                              \
  }                                                                                                                   \
  DRCNN_CPU_CLONES void blend_columns(const float* row, const int32_t* low, const float* share, int32_t step,         \
                                      int64_t count, T* out) {                                                        \
    shrink(row, low, share, step, count, out);                                                                        \
  }

DRCNN_COLLAGE_TAKE(uint8_t)
DRCNN_COLLAGE_TAKE(uint16_t)
DRCNN_COLLAGE_TAKE(uint32_t)
DRCNN_COLLAGE_BLEND(uint8_t)
DRCNN_COLLAGE_BLEND(torch::headeronly::Half)
DRCNN_COLLAGE_BLEND(torch::headeronly::BFloat16)
DRCNN_COLLAGE_BLEND(float)
#undef DRCNN_COLLAGE_TAKE
#undef DRCNN_COLLAGE_BLEND

// Where the drawn columns of a component come from.
struct Columns {
  int32_t step;  // from one to the next; 0 if it varies
  std::vector<int32_t> nearest;
  std::vector<int32_t> low;
  std::vector<float> share;

  Columns(CollageAxis axis, bool is_bilinear) : step(axis.source % axis.drawn == 0 ? axis.source / axis.drawn : 0) {
    for (int32_t x = 0; x < axis.drawn; ++x) {
      nearest.push_back(collage_nearest(axis, x));
      if (!is_bilinear) continue;
      const CollageTap tap = collage_tap(axis, x);
      low.push_back(tap.low);
      share.push_back(tap.share);
    }
  }

  // How many drawn columns come from the first `content` pixels.
  int64_t count(int64_t content) const {
    return std::lower_bound(nearest.begin(), nearest.end(), content) - nearest.begin();
  }
};

template <typename T>
class Stitcher {
 public:
  Stitcher(const CollageArguments& args, const std::vector<Columns>& columns, T* canvas)
      : args_(args), columns_(columns), canvas_(canvas) {}

  // Writes one row of the canvas, of all images' and channels' rows.
  void write_row(int64_t row) {
    const int64_t plane = row / args_.height;
    const int32_t y = static_cast<int32_t>(row % args_.height);
    const int64_t image = plane / args_.channels;
    const int64_t channel = plane % args_.channels;
    const T fill = static_cast<T>(args_.fill[channel]);
    const int32_t first = collage_part(y, args_.parts, args_.height) * args_.parts;
    for (int32_t j = first; j < first + args_.parts; ++j) {
      const CollageComponent& own = args_.components[j];
      T* out = canvas_ + row * args_.width + own.left;
      const int64_t drawn = draw(j, image, channel, y - own.top, out);
      std::fill(out + drawn, out + (own.right - own.left), fill);
    }
  }

 private:
  // Writes the pixels of a component that have content, and returns how many.
  int64_t draw(int32_t j, int64_t image, int64_t channel, int32_t y, T* out) {
    const CollageComponent& own = args_.components[j];
    const Columns& columns = columns_[j];
    const int64_t height = std::min<int64_t>(own.sizes[2 * image], own.y.source);
    const int64_t width = std::min<int64_t>(own.sizes[2 * image + 1], own.x.source);
    if (y >= own.y.drawn || collage_nearest(own.y, y) >= height) return 0;
    const int64_t count = columns.count(width);
    if (count == 0) return 0;
    const T* pixels = static_cast<const T*>(own.pixels) + image * own.image_stride + channel * own.channel_stride;
    if (args_.is_bilinear) {
      const CollageTap tap = collage_tap(own.y, y);
      const int64_t high = std::min<int64_t>(tap.low + 1, height - 1);
      blended_.resize(width + 1);
      blend_rows(pixels + tap.low * own.row_stride, pixels + high * own.row_stride, tap.share, width,
                 blended_.data());
      blended_[width] = blended_[width - 1];
      blend_columns(blended_.data(), columns.low.data(), columns.share.data(), columns.step, count, out);
    } else {
      using B = bits_t<T>;
      take_columns(reinterpret_cast<const B*>(pixels + collage_nearest(own.y, y) * own.row_stride),
                   columns.nearest.data(), columns.step, count, reinterpret_cast<B*>(out));
    }
    return count;
  }

  const CollageArguments& args_;
  const std::vector<Columns>& columns_;
  T* canvas_;
  std::vector<float> blended_;  // a row of a component
};

Tensor collage_cpu(std::vector<Tensor> images, std::vector<Tensor> sizes, std::vector<int64_t> cells, int64_t height,
                   int64_t width, int64_t mode, std::vector<double> fill) {
  const CollageArguments args(images, sizes, cells, height, width, mode, fill);
  Tensor canvas = args.empty_canvas();
  std::vector<Columns> columns;
  for (const CollageComponent& own : args.components) columns.emplace_back(own.x, args.is_bilinear);
  dispatch_pixels(args.type(), [&](auto type) {
    using T = decltype(type);
    T* pixels = canvas.template mutable_data_ptr<T>();
    const int64_t rows = args.batch * args.channels * args.height;
    const int64_t rows_per_task = std::max<int64_t>(1, kPixelsPerTask / args.width);
    torch::stable::parallel_for(0, rows, rows_per_task, [&](int64_t first, int64_t last) {
      Stitcher<T> stitcher(args, columns, pixels);
      for (int64_t row = first; row < last; ++row) stitcher.write_row(row);
    });
  });
  return canvas;
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_FRAGMENT(drcnn, m) {
  m.def(
      "collage(Tensor[] images, Tensor[] sizes, int[] cells, SymInt height, SymInt width, int mode, float[] fill) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(drcnn, CPU, m) { m.impl("collage", TORCH_BOX(&drcnn::collage_cpu)); }
