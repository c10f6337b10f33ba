// The valid ground truths of an image, in order, on CUDA.
#pragma once

#include "launch.h"

namespace drcnn {

// Called by one whole warp: writes the positions of the valid entries to `rows`, and returns how many there are.
__device__ inline int valid_rows(const bool* valid, int count, int* rows) {
  const int lane = threadIdx.x % kWarp;
  int found = 0;
  for (int first = 0; first < count; first += kWarp) {
    const bool is_valid = first + lane < count && valid[first + lane];
    const unsigned mask = __ballot_sync(0xffffffffu, is_valid);
    if (is_valid) rows[found + __popc(mask & ((1u << lane) - 1u))] = first + lane;
    found += __popc(mask);
  }
  return found;
}

}  // namespace drcnn
