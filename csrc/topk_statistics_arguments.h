// The checked arguments and the results of topk_statistics, the same for the CPU and for CUDA.
#pragma once

#include <tuple>

#include "tensors.h"

namespace drcnn {

using TopkResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// One of the two selections: a rank k over values [B, N] that a mask keeps.
struct Selection {
  Tensor values;
  Tensor mask;
  int64_t k;
  Tensor kth;
  Tensor used;

  Selection(const Tensor& values_, const Tensor& mask_, int64_t k_, const Tensor& like, const char* name)
      : k(k_) {
    STD_TORCH_CHECK(values_.dim() == 2 && values_.size(0) == like.size(0) && values_.size(1) == like.size(1),
                    "topk_statistics: ", name, " must have max_iou's shape [B, N]");
    STD_TORCH_CHECK(mask_.dim() == 2 && mask_.size(0) == like.size(0) && mask_.size(1) == like.size(1),
                    "topk_statistics: the mask of ", name, " must have max_iou's shape [B, N]");
    STD_TORCH_CHECK(mask_.scalar_type() == ScalarType::Bool, "topk_statistics: the mask of ", name,
                    " must be bool");
    STD_TORCH_CHECK(same_device(values_, like) && same_device(mask_, like), "topk_statistics: ", name,
                    " and its mask must be on max_iou's device");
    STD_TORCH_CHECK(k >= 1, "topk_statistics: a rank must be at least 1, got ", k);
    values = torch::stable::contiguous(values_);
    mask = torch::stable::contiguous(mask_);
    kth = torch::stable::empty({values.size(0)}, values.scalar_type(), std::nullopt, values.device());
    used = torch::stable::empty({values.size(0)}, ScalarType::Long, std::nullopt, values.device());
  }
};

}  // namespace drcnn
