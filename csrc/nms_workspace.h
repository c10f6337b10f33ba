// What the CUDA kernels of nms and soft_nms work in: memory of one call, and radix sorts of positions in it.
#pragma once

#include <cub/device/device_radix_sort.cuh>

#include "launch.h"
#include "tensors.h"

namespace drcnn {

// Holds the memory of a Workspace for `total` boxes; torch keeps it until the stream has passed.
//
// A Workspace has `kBytes` for each box, `place(memory, total)`, which lays its parts out by falling alignment
// (torch aligns the whole to more than 16 bytes), and among them `keys`, `sorted_keys` and `values`.
template <typename Workspace>
struct WorkspaceMemory {
  int64_t total;
  Tensor memory;
  Tensor temporary;
  size_t temporary_bytes = 0;
  Workspace work;

  WorkspaceMemory(int64_t total, const Tensor& boxes)
      : total(total),
        memory(torch::stable::empty({total * Workspace::kBytes}, ScalarType::Byte, std::nullopt, boxes.device())) {
    work.place(memory.mutable_data_ptr(), total);
    radix_sort(nullptr, work.keys, work.values, 64, nullptr);  // only finds out how much memory it needs
    temporary = torch::stable::empty({static_cast<int64_t>(temporary_bytes)}, ScalarType::Byte, std::nullopt,
                                     boxes.device());
  }

  // Sorts the values by the low bits of `keys` into `into`, and the keys into `sorted_keys`; stable.
  void sort(const uint64_t* keys, uint32_t* into, int bits, cudaStream_t stream) {
    radix_sort(temporary.mutable_data_ptr(), keys, into, bits, stream);
  }

 private:
  void radix_sort(void* with, const uint64_t* keys, uint32_t* into, int bits, cudaStream_t stream) {
    STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(with, temporary_bytes, keys, work.sorted_keys, work.values, into,
                                                   total, 0, bits, stream));
  }
};

}  // namespace drcnn
