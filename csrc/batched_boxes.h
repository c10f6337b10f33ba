// Boxes [B, N, 4] as the kernels read them.
#pragma once

#include "box_iou.h"
#include "tensors.h"

namespace drcnn {

// Dense within an image; the images are `stride` values apart. One set of anchors for all images, expanded to
// the batch, has stride 0 and is never copied to B x N boxes.
struct BatchedBoxes {
  Tensor tensor;
  int64_t batch;
  int64_t count;
  int64_t stride;

  BatchedBoxes(const Tensor& boxes, const char* op, const char* name) : tensor(boxes) {
    STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4, op, ": ", name, " must have shape [B, N, 4]");
    batch = boxes.size(0);
    count = boxes.size(1);
    const bool is_dense = boxes.stride(2) == 1 && (boxes.stride(1) == 4 || count <= 1);
    const bool is_expanded = batch > 1 && boxes.stride(0) == 0;
    if (!is_dense) tensor = torch::stable::contiguous(is_expanded ? torch::stable::narrow(tensor, 0, 0, 1) : boxes);
    stride = is_expanded ? 0 : tensor.stride(0);
  }

  template <typename T>
  const T* data() const {
    return tensor.const_data_ptr<T>();
  }

  // Whether each box can be loaded as one vector of four values of T.
  template <typename T>
  bool is_aligned() const {
    constexpr uintptr_t kBytes = sizeof(T) >= 4 ? 16 : 8;
    const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr<T>());
    return sizeof(T) <= 4 && address % kBytes == 0 && static_cast<uintptr_t>(stride) * sizeof(T) % kBytes == 0;
  }
};

inline void check_same_kind(const Tensor& tensor, const Tensor& like, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must have the boxes' dtype");
  STD_TORCH_CHECK(same_device(tensor, like), op, ": ", name, " must be on the boxes' device");
}

inline Tensor checked_rows(const Tensor& tensor, int64_t batch, int64_t count, ScalarType type, const Tensor& like,
                           const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == batch && tensor.size(1) == count, op, ": ", name,
                  " must have shape [", batch, ", ", count, "]");
  STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", name, " must be ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(same_device(tensor, like), op, ": ", name, " must be on the boxes' device");
  return torch::stable::contiguous(tensor);
}

}  // namespace drcnn
