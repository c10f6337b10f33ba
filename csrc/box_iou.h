// The mathematics of box_iou, once for the C++ and the CUDA kernels of all operators that overlap boxes.
//
// The operations and their order are those of the PyTorch reference, and no product is fused with a sum, so
// that all backends give equal bits and indices agree exactly.
#pragma once

#include "portable.h"

namespace drcnn {

template <typename A>
struct alignas(16) Box {
  A x1, y1, x2, y2;
};

// nvcc fuses x * y + z unless it is told; the host compiler is told by -ffp-contract=off.
template <typename A>
DRCNN_HOST_DEVICE A unfused_product(A x, A y) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(A) == 8) {
    return __dmul_rn(x, y);
  } else {
    return __fmul_rn(x, y);
  }
#else
  return x * y;
#endif
}

template <typename A>
DRCNN_HOST_DEVICE A lesser(A x, A y) {
  return x < y ? x : y;
}

template <typename A>
DRCNN_HOST_DEVICE A greater(A x, A y) {
  return x > y ? x : y;
}

// 0 where x is negative. A NaN stays: it reaches the union through the area, and there the overlap is undefined.
template <typename A>
DRCNN_HOST_DEVICE A not_negative(A x) {
  return x < A(0) ? A(0) : x;
}

template <typename A>
DRCNN_HOST_DEVICE A box_area(const Box<A>& box) {
  return unfused_product(not_negative(box.x2 - box.x1), not_negative(box.y2 - box.y1));
}

template <typename A>
DRCNN_HOST_DEVICE A intersection_of(const Box<A>& a, const Box<A>& b) {
  return unfused_product(not_negative(lesser(a.x2, b.x2) - greater(a.x1, b.x1)),
                         not_negative(lesser(a.y2, b.y2) - greater(a.y1, b.y1)));
}

// IoU, 0 where it is undefined: never negative, never NaN.
template <typename A>
DRCNN_HOST_DEVICE A iou_of(const Box<A>& a, A area_a, const Box<A>& b, A area_b) {
  const A inter = intersection_of(a, b);
#if defined(__CUDA_ARCH__)
  // Most pairs do not touch, and often a whole warp of them: the division is the longest part.
  if (!(inter > A(0))) return A(0);
#endif
  const A iou = inter / (area_a + area_b - inter);
  return iou > A(0) ? iou : A(0);
}

// GIoU, -1 where it is undefined.
template <typename A>
DRCNN_HOST_DEVICE A giou_of(const Box<A>& a, A area_a, const Box<A>& b, A area_b) {
  const A inter = intersection_of(a, b);
  const A both = area_a + area_b - inter;
  const A hull = unfused_product(greater(a.x2, b.x2) - lesser(a.x1, b.x1),
                                 greater(a.y2, b.y2) - lesser(a.y1, b.y1));
  const A giou = inter / both - (hull - both) / hull;
  // Both comparisons are false for NaN; & instead of && leaves no branch in the loop.
  return (giou >= A(-1)) & (giou <= A(1)) ? giou : A(-1);
}

}  // namespace drcnn
