// The checked, contiguous arguments of smooth_l1, the same for the CPU and for CUDA.
#pragma once

#include "tensors.h"

namespace drcnn {

struct SmoothL1Arguments {
  Tensor pred;
  Tensor target;
  std::optional<Tensor> mask;
  int64_t boxes;

  SmoothL1Arguments(const Tensor& pred_, const Tensor& target_, const Tensor& beta,
                    const std::optional<Tensor>& mask_)
      : pred(torch::stable::contiguous(pred_)), target(torch::stable::contiguous(target_)) {
    STD_TORCH_CHECK(pred.dim() > 0 && pred.size(pred.dim() - 1) == 4, "smooth_l1: pred must have shape [..., 4]");
    STD_TORCH_CHECK(same_shape(pred, target), "smooth_l1: target must have pred's shape");
    STD_TORCH_CHECK(target.scalar_type() == pred.scalar_type(), "smooth_l1: target must have pred's dtype");
    STD_TORCH_CHECK(same_device(pred, target), "smooth_l1: target must be on pred's device");
    check_scalar(beta, "beta");
    boxes = pred.numel() / 4;
    if (!mask_.has_value()) return;
    mask = torch::stable::contiguous(*mask_);
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "smooth_l1: mask must be bool");
    STD_TORCH_CHECK(mask->numel() == boxes, "smooth_l1: mask must hold one value per box");
    STD_TORCH_CHECK(same_device(pred, *mask), "smooth_l1: mask must be on pred's device");
  }

  void check_grad(const Tensor& grad) const { check_scalar(grad, "grad"); }

  const bool* mask_pointer() const { return mask.has_value() ? mask->const_data_ptr<bool>() : nullptr; }

 private:
  void check_scalar(const Tensor& scalar, const char* name) const {
    STD_TORCH_CHECK(scalar.dim() == 0, "smooth_l1: ", name, " must be 0-dim");
    STD_TORCH_CHECK(scalar.scalar_type() == accumulate_type(pred.scalar_type()), "smooth_l1: ", name,
                    " must be float32, or float64 for float64 boxes");
    STD_TORCH_CHECK(same_device(pred, scalar), "smooth_l1: ", name, " must be on pred's device");
  }
};

}  // namespace drcnn
