// The mathematics of focal_loss, once for the C++ and the CUDA kernel.
//
// z is a logit, negated for the class of its row: the loss is alpha_t sigmoid(z)^gamma softplus(z). All of it comes
// from exp(-|z|), which never overflows, and has no branch, so that CPU loops over it vectorize.
#pragma once

#include <bit>
#include <cmath>

#include "portable.h"

namespace drcnn {

// What the two kinds of classes weigh, and the power of their sigmoids.
template <typename A>
struct FocalWeights {
  A there, absent, gamma;

  // As the public function has it: alpha < 0 weighs both 1.
  FocalWeights(double alpha, double gamma_)
      : there(static_cast<A>(alpha < 0 ? 1 : alpha)),
        absent(static_cast<A>(alpha < 0 ? 1 : 1 - alpha)),
        gamma(static_cast<A>(gamma_)) {}
};

DRCNN_HOST_DEVICE double exp_of_negative(double a) { return ::exp(-a); }

// exp(-a) for a >= 0, within 2 ulp; 0 where it is hardly a normal number.
DRCNN_HOST_DEVICE float exp_of_negative(float a) {
#if defined(__CUDA_ARCH__)
  return ::expf(-a);
#else
  constexpr float kMost = 87.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: a number added to it loses its fraction
  const float x = a > kMost ? -kMost : -a;
  const float shifted = x * 1.44269504f + kRound;
  const float whole = shifted - kRound;
  const float r = x - whole * 0.693359375f - whole * -2.12194440e-4f;  // ln 2 in two parts
  float p = r * 1.98756915e-4f + 1.39819995e-3f;
  p = p * r + 8.33345191e-3f;
  p = p * r + 4.16657959e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 5.00000012e-1f;
  p = r * r * p + r + 1.0f;
  // 2^whole: the low bits of `shifted` are the whole number.
  const uint32_t power = a > kMost ? 0 : (std::bit_cast<uint32_t>(shifted) + 127) << 23;
  return p * std::bit_cast<float>(power);
#endif
}

// Of one z: sigmoid(z), 1 - sigmoid(z), softplus(z) and -log(sigmoid(z)).
template <typename A>
struct Sigmoid {
  A value, rest, softplus, softplus_of_negative;
};

DRCNN_HOST_DEVICE Sigmoid<double> sigmoid_of(double z) {
  const double e = ::exp(z < 0 ? z : -z);
  const double larger = 1 / (1 + e), smaller = e * larger, logarithm = ::log1p(e);
  const bool positive = z > 0;
  return {positive ? larger : smaller, positive ? smaller : larger, logarithm + (positive ? z : 0),
          logarithm + (positive ? 0 : -z)};
}

// log(1 + e) = 2 atanh s with s = e / (2 + e) <= 1/3; the polynomial in s^2 is exact to 2e-8. The quotients by 1 + e
// and by 2 + e share one division.
DRCNN_HOST_DEVICE Sigmoid<float> sigmoid_of(float z) {
  const float e = exp_of_negative(z < 0 ? -z : z);
  const float one = 1.0f + e, two = 2.0f + e;
#if defined(__CUDA_ARCH__)
  const float inverse = __fdividef(1.0f, one * two);
#else
  const float inverse = 1.0f / (one * two);
#endif
  const float larger = two * inverse, smaller = e * larger, s = e * (one * inverse);
  const float q = s * s;
  const float series = q * (0.666666403f + q * (0.400075606f + q * (0.282366198f + q * 0.26851498f)));
  const float logarithm = s * series + 2.0f * s;
  const bool positive = z > 0;
  return {positive ? larger : smaller, positive ? smaller : larger, logarithm + (positive ? z : 0.0f),
          logarithm + (positive ? 0.0f : -z)};
}

// sigmoid^gamma. By its logarithm, it is as exact for a sigmoid near 0 as for any other; for gamma 0 it is 1, even
// where that is infinite.
template <bool kSquare, typename A>
DRCNN_HOST_DEVICE A focal_power(const Sigmoid<A>& sigmoid, A gamma) {
  if constexpr (kSquare) return sigmoid.value * sigmoid.value;
  constexpr A kMost = A(1e30);
  const A exponent = sigmoid.softplus_of_negative;
  return exp_of_negative(gamma * (exponent < kMost ? exponent : kMost));
}

// The loss without alpha; kSquare tells that gamma is 2.
template <bool kSquare, typename A>
DRCNN_HOST_DEVICE A focal_value(A z, A gamma) {
  const Sigmoid<A> sigmoid = sigmoid_of(z);
  return focal_power<kSquare>(sigmoid, gamma) * sigmoid.softplus;
}

// The derivative of focal_value by z.
template <bool kSquare, typename A>
DRCNN_HOST_DEVICE A focal_slope(A z, A gamma) {
  const Sigmoid<A> sigmoid = sigmoid_of(z);
  return focal_power<kSquare>(sigmoid, gamma) * (gamma * (sigmoid.rest * sigmoid.softplus) + sigmoid.value);
}

}  // namespace drcnn
