// The mathematics of roi_align, once for the C++ and the CUDA kernel.
//
// The samples of a RoI lie on a grid and bilinear weights are products of one weight per axis, so that
//   pooled[ph][pw] = sum over y and x of Wy[ph][y] * Wx[pw][x] * feature[y][x].
// A row of Wy or Wx is sparse: its entries are the taps of a bin. Samples that share cells share taps, so a bin
// that covers b x b cells reads about (b + 1)^2 of them instead of four for each of its b^2 samples.
#pragma once

#include "portable.h"

#if !defined(__CUDACC__)
#include <cmath>
#endif

namespace drcnn {

// A coordinate farther from the origin, or none at all (NaN), makes a box pool to zeros.
constexpr float kFarthestPixel = 131072.0f;

template <typename A>
struct Tap {
  int32_t cell;
  A weight;
};

// One axis of a RoI on its level, in cells.
template <typename A>
struct RoiAxis {
  A start;
  A bin;            // length of a bin
  int32_t samples;  // per bin; 0 pools to 0
  int32_t extent;   // cells of the level
};

// nvcc fuses a * b + c, which would move a sample by a rounding error away from where the CPU takes it.
DRCNN_HOST_DEVICE float add_product(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fmul_rn(a, b), c);
#else
  return a * b + c;
#endif
}

DRCNN_HOST_DEVICE double add_product(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(__dmul_rn(a, b), c);
#else
  return a * b + c;
#endif
}

template <typename A>
DRCNN_HOST_DEVICE bool is_poolable(const A* box) {
  bool good = true;
  for (int c = 0; c < 4; ++c) good = good && box[c] >= A(-kFarthestPixel) && box[c] <= A(kFarthestPixel);
  return good;
}

// The axis from `low` to `high` pixels; `scale` is a power of two, so its products are exact.
template <typename A>
DRCNN_HOST_DEVICE RoiAxis<A> roi_axis(A low, A high, A scale, int32_t size, int32_t sampling_ratio, bool aligned,
                                      int32_t extent) {
  const A offset = aligned ? A(0.5) : A(0);
  RoiAxis<A> axis;
  axis.start = low * scale - offset;
  A length = (high * scale - offset) - axis.start;
  if (!aligned && length < A(1)) length = A(1);
  axis.bin = length / static_cast<A>(size);
  axis.extent = extent;
#if defined(__CUDACC__)
  const A ceiled = ceil(axis.bin);
#else
  const A ceiled = std::ceil(axis.bin);
#endif
  axis.samples = sampling_ratio > 0 ? sampling_ratio : ceiled > A(0) ? static_cast<int32_t>(ceiled) : 0;
  return axis;
}

// Finds the cell below a sample of a bin and the share of the next cell; false where the sample is outside.
template <typename A>
DRCNN_HOST_DEVICE bool roi_sample(const RoiAxis<A>& axis, int32_t bin, int32_t sample, int32_t* low, A* share) {
  const A within = (static_cast<A>(sample) + A(0.5)) * axis.bin / static_cast<A>(axis.samples);
  A at = add_product(static_cast<A>(bin), axis.bin, axis.start) + within;
  if (!(at >= A(-1) && at <= static_cast<A>(axis.extent))) return false;
  if (at < A(0)) at = A(0);
  const int32_t cell = static_cast<int32_t>(at);
  const bool is_last = cell >= axis.extent - 1;
  *low = is_last ? axis.extent - 1 : cell;
  *share = is_last ? A(0) : at - static_cast<A>(cell);
  return true;
}

// Adds a weight to one of the last two taps if it has that cell, else as a new tap; returns their number.
template <typename A>
DRCNN_HOST_DEVICE int32_t add_tap(Tap<A>* taps, int32_t count, int32_t cell, A weight) {
  for (int32_t i = count - 1; i >= 0 && i >= count - 2; --i) {
    if (taps[i].cell == cell) {
      taps[i].weight += weight;
      return count;
    }
  }
  taps[count] = Tap<A>{cell, weight};
  return count + 1;
}

// Writes the taps of a bin and returns their number: at most twice the samples, and at most one for each cell
// from the first to the last if samples are at most a cell apart and ascend.
template <typename A>
DRCNN_HOST_DEVICE int32_t roi_taps(const RoiAxis<A>& axis, int32_t bin, Tap<A>* taps) {
  int32_t count = 0;
  for (int32_t sample = 0; sample < axis.samples; ++sample) {
    int32_t low;
    A share;
    if (!roi_sample(axis, bin, sample, &low, &share)) continue;
    count = add_tap(taps, count, low, (A(1) - share) / static_cast<A>(axis.samples));
    if (low + 1 < axis.extent) count = add_tap(taps, count, low + 1, share / static_cast<A>(axis.samples));
  }
  return count;
}

}  // namespace drcnn
