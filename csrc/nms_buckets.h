// The buckets of groups that the CUDA kernels of nms and soft_nms give a block each.
#pragma once

#include <cuda_runtime.h>

#include "nms.h"

namespace drcnn {

constexpr int kBucketBits = 8;
constexpr int kBuckets = 1 << kBucketBits;  // bucket kBuckets itself holds the boxes that are not valid

__device__ inline uint64_t bucket_of(int64_t group) {
  uint64_t bits = static_cast<uint64_t>(group);
  for (int shift = 32; shift >= kBucketBits; shift /= 2) bits ^= bits >> shift;
  return bits & (kBuckets - 1);
}

// The first entry of [begin, end) that is not below the key.
__device__ inline int64_t lower_bound(const uint64_t* keys, int64_t begin, int64_t end, uint64_t key) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (keys[middle] < key) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

__device__ inline Corners corners_of(const float4& box) { return {box.x, box.y, box.z, box.w}; }

}  // namespace drcnn
