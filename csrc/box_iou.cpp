// box_iou on the CPU, and the schema of the operator.

#include <type_traits>

#include "batched_boxes.h"
#include "box_columns.h"

namespace drcnn {
namespace {

constexpr int64_t kTile = 256;          // boxes of b that are held as columns
constexpr int64_t kRows = 32;           // boxes of a that are converted at once
constexpr int64_t kPadding = 8;         // columns of a row are computed in multiples of it
constexpr int64_t kChunkPairs = 32768;  // unit of work of a thread

// The overlaps of one box with the first `count` of a tile.
template <typename A>
inline __attribute__((always_inline)) void row_chunk(const Box<A>& a, const BoxColumns<A, kTile>& b, int64_t count,
                                                     bool giou, A* __restrict out) {
  const A area = box_area(a);
  if (giou) {
    for (int64_t m = 0; m < count; ++m) {
      out[m] = giou_of(a, area, Box<A>{b.x1[m], b.y1[m], b.x2[m], b.y2[m]}, b.area[m]);
    }
  } else {
    for (int64_t m = 0; m < count; ++m) {
      out[m] = iou_of(a, area, Box<A>{b.x1[m], b.y1[m], b.x2[m], b.y2[m]}, b.area[m]);
    }
  }
}

#define DRCNN_BOX_IOU_CPU(A)                                                                                 \
  DRCNN_CPU_CLONES void rows_of(const Box<A>* a, int64_t rows, const BoxColumns<A, kTile>& b, int64_t count, \
                                bool giou, A* out, int64_t stride) {                                         \
    for (int64_t n = 0; n < rows; ++n) row_chunk(a[n], b, count, giou, out + n * stride);                    \
  }

DRCNN_BOX_IOU_CPU(float)
DRCNN_BOX_IOU_CPU(double)
#undef DRCNN_BOX_IOU_CPU

// out[n, m] of some rows of one image. The last vector of a row may reach beyond it, into the next row, which is
// computed later. Where it must not, the row passes through a buffer: at the end, if the dtype differs, and if
// the columns need several tiles.
template <typename T>
void overlap_rows(const T* a, int64_t rows, const T* b, int64_t columns, bool giou, T* out) {
  using A = accumulate_t<T>;
  BoxColumns<A, kTile> tile;
  Box<A> boxes[kRows];
  alignas(64) A buffer[kTile];
  for (int64_t start = 0; start < columns; start += kTile) {
    const int64_t count = std::min(kTile, columns - start);
    const int64_t padded = (count + kPadding - 1) / kPadding * kPadding;
    tile.load(b + 4 * start, count);
    for (int64_t first = 0; first < rows; first += kRows) {
      const int64_t block = std::min(kRows, rows - first);
      for (int64_t n = 0; n < block; ++n) {
        const T* box = a + 4 * (first + n);
        boxes[n] = {static_cast<A>(box[0]), static_cast<A>(box[1]), static_cast<A>(box[2]), static_cast<A>(box[3])};
      }
      int64_t direct = 0;
      if constexpr (std::is_same_v<T, A>) {
        const int64_t with_room = (rows * columns - padded) / columns + 1 - first;
        if (count == columns && rows * columns >= padded) direct = std::clamp<int64_t>(with_room, 0, block);
        rows_of(boxes, direct, tile, padded, giou, out + first * columns, columns);
      }
      for (int64_t n = direct; n < block; ++n) {
        rows_of(boxes + n, 1, tile, padded, giou, buffer, kTile);
        T* const target = out + (first + n) * columns + start;
        for (int64_t m = 0; m < count; ++m) target[m] = static_cast<T>(buffer[m]);
      }
    }
  }
}

Tensor box_iou_cpu(const Tensor& a_, const Tensor& b_, bool giou) {
  const BatchedBoxes a(a_, "box_iou", "a");
  const BatchedBoxes b(b_, "box_iou", "b");
  STD_TORCH_CHECK(a.batch == b.batch, "box_iou: a and b must have the same batch size");
  check_same_kind(b_, a_, "box_iou", "b");
  Tensor out = torch::stable::empty({a.batch, a.count, b.count}, a_.scalar_type(), std::nullopt, a_.device());
  if (out.numel() == 0) return out;
  const int64_t rows = std::max<int64_t>(kChunkPairs / b.count, 1);
  const int64_t chunks = (a.count + rows - 1) / rows;
  dispatch_floating(a_.scalar_type(), "box_iou", [&](auto type) {
    using T = decltype(type);
    const T* a_data = a.data<T>();
    const T* b_data = b.data<T>();
    T* out_data = out.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, a.batch * chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / chunks;
        const int64_t first = task % chunks * rows;
        overlap_rows(a_data + image * a.stride + 4 * first, std::min(rows, a.count - first),
                     b_data + image * b.stride, b.count, giou,
                     out_data + (image * a.count + first) * b.count);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace drcnn

STABLE_TORCH_LIBRARY_FRAGMENT(drcnn, m) { m.def("box_iou(Tensor a, Tensor b, bool giou) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(drcnn, CPU, m) { m.impl("box_iou", TORCH_BOX(&drcnn::box_iou_cpu)); }
