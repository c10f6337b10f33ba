// A block of boxes as columns, for CPU loops that the compiler turns into vector instructions.
#pragma once

#include <algorithm>

#include "box_iou.h"

namespace drcnn {

constexpr int64_t kLanes = 16;  // floats of the widest vector; columns are padded to a multiple of it

template <typename A, int64_t kCount>
struct BoxColumns {
  static_assert(kCount % kLanes == 0);
  alignas(64) A x1[kCount];
  alignas(64) A y1[kCount];
  alignas(64) A x2[kCount];
  alignas(64) A y2[kCount];
  alignas(64) A area[kCount];
  int64_t padded = 0;

  // Loads `count` <= kCount boxes; empty boxes, which overlap nothing, fill up the last vector.
  template <typename T>
  inline __attribute__((always_inline)) void load(const T* boxes, int64_t count) {
    padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = 0; i < count; ++i) {
      x1[i] = static_cast<A>(boxes[4 * i]);
      y1[i] = static_cast<A>(boxes[4 * i + 1]);
      x2[i] = static_cast<A>(boxes[4 * i + 2]);
      y2[i] = static_cast<A>(boxes[4 * i + 3]);
    }
    for (int64_t i = count; i < padded; ++i) x1[i] = y1[i] = x2[i] = y2[i] = A(0);
    for (int64_t i = 0; i < padded; ++i) area[i] = box_area(Box<A>{x1[i], y1[i], x2[i], y2[i]});
  }
};

}  // namespace drcnn
