// The order of topk_statistics, once for the C++ and the CUDA kernel.
#pragma once

#include "portable.h"

namespace drcnn {

template <typename A>
struct KeyOf {
  using type = uint32_t;
};

template <>
struct KeyOf<double> {
  using type = uint64_t;
};

template <typename A>
using rank_key_t = typename KeyOf<A>::type;

// An unsigned number that orders like the value; inverted, so that the smallest value has the largest key, for
// ranks from the smallest. NaN has no rank and must be left out.
template <typename A>
DRCNN_HOST_DEVICE rank_key_t<A> key_of(A value, bool from_smallest) {
  using K = rank_key_t<A>;
  constexpr K kSign = K(1) << (8 * sizeof(K) - 1);
  K bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const K key = (bits & kSign) != 0 ? ~bits : bits | kSign;
  return from_smallest ? ~key : key;
}

template <typename A>
DRCNN_HOST_DEVICE A value_of(rank_key_t<A> key, bool from_smallest) {
  using K = rank_key_t<A>;
  constexpr K kSign = K(1) << (8 * sizeof(K) - 1);
  if (from_smallest) key = ~key;
  const K bits = (key & kSign) != 0 ? key & ~kSign : ~key;
  A value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace drcnn
