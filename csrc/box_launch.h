// Loading boxes on the device, and the shape of a grid.
#pragma once

#include "box_iou.h"
#include "launch.h"

namespace drcnn {

template <bool kAligned, typename T>
__device__ inline Box<accumulate_t<T>> load_box(const T* boxes, int64_t index) {
  using A = accumulate_t<T>;
  const Four<T> four = load_four<kAligned>(boxes + 4 * index);
  return {static_cast<A>(four.values[0]), static_cast<A>(four.values[1]), static_cast<A>(four.values[2]),
          static_cast<A>(four.values[3])};
}

// Blocks along x for `work` items of one image, images along y.
inline dim3 grid_of(int64_t work, int64_t per_block, int64_t images, const char* op) {
  const int64_t blocks = work == 0 ? 1 : (work + per_block - 1) / per_block;
  STD_TORCH_CHECK(blocks <= 2147483647 && images <= 65535, op, ": too many boxes or images, got ", work, " and ",
                  images);
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(images));
}

}  // namespace drcnn
