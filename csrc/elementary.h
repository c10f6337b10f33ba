// Elementary functions of operations that vectorize, for the CPU and for CUDA: libm's are a call per value.
#pragma once

#include <cmath>

#include "portable.h"

namespace drcnn {

// log(x) of a positive normal number within 2 ulp. x = 2^k m with m in [sqrt(1/2), sqrt(2)), and
// log m = 2 atanh s with s = (m - 1) / (m + 1), |s| <= 0.172: the series to s^9 is exact to 2e-9.
DRCNN_HOST_DEVICE float log_of_normal(float x, float power_of_two = 0.0f) {
  constexpr uint32_t kRootOfHalf = 0x3f3504f3u;
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const int32_t exponent = static_cast<int32_t>(bits - kRootOfHalf) >> 23;
  const uint32_t mantissa_bits = bits - (static_cast<uint32_t>(exponent) << 23);
  float mantissa;
  __builtin_memcpy(&mantissa, &mantissa_bits, sizeof(mantissa));
  const float k = static_cast<float>(exponent) + power_of_two;
  const float s = (mantissa - 1.0f) / (mantissa + 1.0f);
  const float z = s * s;
  const float series = z * (0.666666667f + z * (0.4f + z * (0.285714286f + z * 0.222222222f)));
  // ln 2 in two parts: k times the first is exact.
  return k * 0.693145752f + (k * 1.42860677e-6f + (s * series + 2.0f * s));
}

// log(x) of any number.
DRCNN_HOST_DEVICE float natural_log(float x) {
  constexpr float kSmallest = 1.17549435e-38f;  // of the normal numbers
  const bool is_subnormal = x < kSmallest;
  const float value = log_of_normal(is_subnormal ? x * 8388608.0f : x, is_subnormal ? -23.0f : 0.0f);
  const float infinity = HUGE_VALF;
  return x > 0.0f ? (x < infinity ? value : infinity) : (x == 0.0f ? -infinity : x - x + NAN);
}

// exp(x) for x <= 0 within 2 ulp. With k the whole number nearest to x / ln 2 and r = x - k ln 2, exp(x) is
// 2^k exp(r), a polynomial of degree 6. Below -87, and for NaN, the result is exp(-87), which is normal.
DRCNN_HOST_DEVICE float exp_of_negative(float x) {
  x = x > -87.0f ? x : -87.0f;
  const int32_t k = static_cast<int32_t>(x * 1.44269504f - 0.5f);
  const float whole = static_cast<float>(k);
  const float r = x - whole * 0.693359375f - whole * -2.12194440e-4f;  // the product with the first part is exact
  float p = r * 1.98756915e-4f + 1.39819995e-3f;
  p = p * r + 8.33345191e-3f;
  p = p * r + 4.16657959e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 5.00000012e-1f;
  p = r * r * p + r + 1.0f;
  const int32_t bits = (k + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return p * power;
}

}  // namespace drcnn
