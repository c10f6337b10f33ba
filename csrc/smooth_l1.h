// The mathematics of smooth_l1, once for the C++ and the CUDA kernel.
#pragma once

#include "portable.h"

namespace drcnn {

// SmoothL1(difference, beta). Beta 0 never takes the first branch and gives the L1 loss; a NaN difference
// takes the second and stays NaN. The quotient is not hoisted as 1 / beta, which overflows for a tiny beta.
template <typename A>
DRCNN_HOST_DEVICE A smooth_l1_value(A difference, A beta) {
  const A distance = difference < A(0) ? -difference : difference;
  const A quadratic = A(0.5) * distance * (distance / beta);
  const A linear = distance - A(0.5) * beta;
  return distance < beta ? quadratic : linear;
}

// The derivative of smooth_l1_value by its first argument; 0 where the difference is 0.
template <typename A>
DRCNN_HOST_DEVICE A smooth_l1_slope(A difference, A beta) {
  const A distance = difference < A(0) ? -difference : difference;
  const A sign = A(difference > A(0)) - A(difference < A(0));
  return distance < beta ? difference / beta : sign;
}

}  // namespace drcnn
