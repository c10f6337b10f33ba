// Launching CUDA kernels on the caller's stream, and reductions that give equal bits on every run.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "portable.h"

namespace drcnn {

constexpr int kWarp = 32;

inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Sums one value per thread of a block in a fixed order; the result is valid in thread 0.
template <int kThreads, typename A>
__device__ A block_sum(A value) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp);
  constexpr int kWarps = kThreads / kWarp;
  __shared__ A warp_sums[kWarps];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  if (lane == 0) warp_sums[warp] = value;
  __syncthreads();
  if (warp == 0) {
    value = lane < kWarps ? warp_sums[lane] : A(0);
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  return value;
}

// The second stage of a sum: one block adds what the blocks of the first have written.
template <int kThreads, typename A>
__global__ void __launch_bounds__(kThreads) sum_partial_kernel(const A* partial, int count, A* out) {
  A sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) *out = sum;
}

// Four neighbouring values that are loaded and stored at once.
template <typename T>
struct alignas(sizeof(T) >= 4 ? 16 : 8) Four {
  T values[4];
};

template <typename T>
bool is_aligned_for_four(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Four<T>) == 0;
}

template <bool kAligned, typename T>
__device__ inline Four<T> load_four(const T* pointer) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const Four<T>*>(pointer);
  } else {
    Four<T> four;
#pragma unroll
    for (int c = 0; c < 4; ++c) four.values[c] = pointer[c];
    return four;
  }
}

template <bool kAligned, typename T>
__device__ inline void store_four(T* pointer, const Four<T>& four) {
  if constexpr (kAligned) {
    *reinterpret_cast<Four<T>*>(pointer) = four;
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) pointer[c] = four.values[c];
  }
}

}  // namespace drcnn
