// The checked, contiguous arguments of hungarian_assign, the same for the CPU and for CUDA.
#pragma once

#include "tensors.h"

namespace drcnn {

struct HungarianArguments {
  Tensor cost;
  Tensor gt_valid;
  int64_t images;
  int64_t count;
  int64_t gts;

  HungarianArguments(const Tensor& cost_, const Tensor& gt_valid_) {
    STD_TORCH_CHECK(cost_.dim() == 3, "hungarian_assign: cost must have shape [B, N, G]");
    images = cost_.size(0);
    count = cost_.size(1);
    gts = cost_.size(2);
    STD_TORCH_CHECK(gt_valid_.dim() == 2 && gt_valid_.size(0) == images && gt_valid_.size(1) == gts,
                    "hungarian_assign: gt_valid must have shape [", images, ", ", gts, "]");
    STD_TORCH_CHECK(gt_valid_.scalar_type() == ScalarType::Bool, "hungarian_assign: gt_valid must be bool");
    STD_TORCH_CHECK(same_device(gt_valid_, cost_), "hungarian_assign: gt_valid must be on the device of cost");
    cost = torch::stable::contiguous(cost_);
    gt_valid = torch::stable::contiguous(gt_valid_);
  }

  Tensor new_output() const {
    return torch::stable::empty({images, count}, ScalarType::Long, std::nullopt, cost.device());
  }
};

}  // namespace drcnn
