// What every operator needs on the host and on the device, without any torch header of its own.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DRCNN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DRCNN_HOST_DEVICE inline __attribute__((always_inline))
#endif

// Compiles a CPU loop for AVX-512, AVX2 and the baseline, and picks one when the library is loaded.
// Contraction into FMA is off (CMakeLists.txt), so that all of them give equal bits.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define DRCNN_CPU_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DRCNN_CPU_CLONES
#endif

namespace drcnn {

// The type in which values of type T are summed: float for half precision, else T itself.
template <typename T>
struct Accumulate {
  using type = float;
};

template <>
struct Accumulate<double> {
  using type = double;
};

template <typename T>
using accumulate_t = typename Accumulate<T>::type;

}  // namespace drcnn
