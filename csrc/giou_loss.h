// The mathematics of giou_loss, once for the C++ and the CUDA kernel.
//
// There is no branch, so that CPU loops over it vectorize.
#pragma once

#include "box_iou.h"

namespace drcnn {

constexpr double kGiouEpsilon = 1e-7;  // squared pixels

// Areas of two boxes together, and the sides of their intersection and of their hull.
template <typename A>
struct GiouTerms {
  A inter_width, inter_height, hull_width, hull_height;
  A inter, both, hull;  // areas; `both` is the union
  bool touch;

  DRCNN_HOST_DEVICE GiouTerms(const Box<A>& a, const Box<A>& b) {
    inter_width = lesser(a.x2, b.x2) - greater(a.x1, b.x1);
    inter_height = lesser(a.y2, b.y2) - greater(a.y1, b.y1);
    hull_width = greater(a.x2, b.x2) - lesser(a.x1, b.x1);
    hull_height = greater(a.y2, b.y2) - lesser(a.y1, b.y1);
    touch = (inter_width > A(0)) & (inter_height > A(0));
    inter = touch ? inter_width * inter_height : A(0);
    both = (a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1) - inter;
    hull = hull_width * hull_height;
  }

  // The union where it divides. Boxes that do not touch may have negative sides and a union of -eps.
  DRCNN_HOST_DEVICE A divisor() const { return touch ? both + A(kGiouEpsilon) : A(1); }
};

// 1 - GIoU.
template <typename A>
DRCNN_HOST_DEVICE A giou_loss_value(const Box<A>& a, const Box<A>& b) {
  const GiouTerms<A> terms(a, b);
  return A(1) - terms.inter / terms.divisor() + (terms.hull - terms.both) / (terms.hull + A(kGiouEpsilon));
}

// How the lesser, or the greater, of two numbers follows the first: half where they are equal.
template <typename A>
DRCNN_HOST_DEVICE A share_of_lesser(A x, A y) {
  return x == y ? A(0.5) : A(x < y);
}

// The gradient of giou_loss_value by its first box.
template <typename A>
DRCNN_HOST_DEVICE Box<A> giou_loss_slope(const Box<A>& a, const Box<A>& b) {
  const GiouTerms<A> terms(a, b);
  const A iou_divisor = terms.divisor(), hull_divisor = terms.hull + A(kGiouEpsilon);
  const A by_area = terms.inter / iou_divisor / iou_divisor - A(1) / hull_divisor;
  const A by_inter = terms.touch ? -(A(1) / iou_divisor) - by_area : A(0);
  const A by_hull = (hull_divisor - (terms.hull - terms.both)) / hull_divisor / hull_divisor;
  // By the sides of the box, of the intersection and of the hull.
  const A width = by_area * (a.y2 - a.y1), height = by_area * (a.x2 - a.x1);
  const A inter_width = by_inter * terms.inter_height, inter_height = by_inter * terms.inter_width;
  const A hull_width = by_hull * terms.hull_height, hull_height = by_hull * terms.hull_width;
  const A x1 = share_of_lesser(a.x1, b.x1), y1 = share_of_lesser(a.y1, b.y1);
  const A x2 = share_of_lesser(a.x2, b.x2), y2 = share_of_lesser(a.y2, b.y2);
  return {-(width + inter_width * (A(1) - x1) + hull_width * x1),
          -(height + inter_height * (A(1) - y1) + hull_height * y1),
          width + inter_width * x2 + hull_width * (A(1) - x2),
          height + inter_height * y2 + hull_height * (A(1) - y2)};
}

}  // namespace drcnn
