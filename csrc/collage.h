// The mathematics of collage, once for the C++ and the CUDA kernel: whole numbers for positions, and float32
// products and sums that are rounded one by one, so that all backends return equal bits.
#pragma once

#include "portable.h"

namespace drcnn {

// Sides are at most this, so that twice a position times a side stays within 32 bits.
constexpr int64_t kCollageMaxSide = 32767;

// One side of a component: its pixels, and those in which it is drawn.
struct CollageAxis {
  int32_t source;
  int32_t drawn;
};

// Two neighbouring pixels of a component, blended by the share of the second.
struct CollageTap {
  int32_t low;
  float share;
};

// Where part `index` of a side that is cut into `parts` begins.
DRCNN_HOST_DEVICE int32_t collage_line(int32_t index, int32_t parts, int32_t length) { return index * length / parts; }

// The part that a position is in.
DRCNN_HOST_DEVICE int32_t collage_part(int32_t position, int32_t parts, int32_t length) {
  return ((position + 1) * parts - 1) / length;
}

// The pixel in which the centre of a drawn pixel lies.
DRCNN_HOST_DEVICE int32_t collage_nearest(CollageAxis axis, int32_t position) {
  const uint32_t centre = (2 * static_cast<uint32_t>(position) + 1) * static_cast<uint32_t>(axis.source);
  return static_cast<int32_t>(centre / (2 * static_cast<uint32_t>(axis.drawn)));
}

// The pixels whose centres are around the centre of a drawn pixel.
DRCNN_HOST_DEVICE CollageTap collage_tap(CollageAxis axis, int32_t position) {
  const uint32_t centre = (2 * static_cast<uint32_t>(position) + 1) * static_cast<uint32_t>(axis.source);
  const uint32_t unit = 2 * static_cast<uint32_t>(axis.drawn);
  const uint32_t from_first = centre > unit / 2 ? centre - unit / 2 : 0;
  const uint32_t low = from_first / unit;
  return {static_cast<int32_t>(low), static_cast<float>(from_first - low * unit) / static_cast<float>(unit)};
}

DRCNN_HOST_DEVICE float collage_blend(float low, float high, float share) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fmul_rn(low, 1.0f - share), __fmul_rn(high, share));
#else
  return low * (1.0f - share) + high * share;
#endif
}

// The nearest value of a type; a half becomes the even neighbour.
template <typename T>
DRCNN_HOST_DEVICE T collage_rounded(float value) {
  return static_cast<T>(value);
}

template <>
DRCNN_HOST_DEVICE uint8_t collage_rounded<uint8_t>(float value) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint8_t>(__float2uint_rn(value));
#else
  constexpr float kNoFraction = 12582912.0f;  // 1.5 * 2^23: a sum with it has no bits for a fraction
  return static_cast<uint8_t>(static_cast<int32_t>((value + kNoFraction) - kNoFraction));
#endif
}

}  // namespace drcnn
