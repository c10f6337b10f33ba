// The checked, contiguous arguments of giou_loss, the same for the CPU and for CUDA.
#pragma once

#include "tensors.h"

namespace drcnn {

struct GiouLossArguments {
  Tensor pred;
  Tensor target;
  Tensor weight;
  int64_t pairs;

  GiouLossArguments(const Tensor& pred_, const Tensor& target_, const Tensor& weight_)
      : pred(torch::stable::contiguous(pred_)),
        target(torch::stable::contiguous(target_)),
        weight(torch::stable::contiguous(weight_)) {
    STD_TORCH_CHECK(pred.dim() > 0 && pred.size(pred.dim() - 1) == 4, "giou_loss: pred must have shape [..., 4]");
    STD_TORCH_CHECK(same_shape(pred, target), "giou_loss: target must have pred's shape");
    STD_TORCH_CHECK(target.scalar_type() == pred.scalar_type(), "giou_loss: target must have pred's dtype");
    STD_TORCH_CHECK(same_device(pred, target), "giou_loss: target must be on pred's device");
    pairs = pred.numel() / 4;
    STD_TORCH_CHECK(weight.numel() == pairs, "giou_loss: weight must hold one value per pair");
    check_dtype(weight, "weight");
  }

  void check_grad(const Tensor& grad) const {
    STD_TORCH_CHECK(grad.dim() == 0, "giou_loss: grad must be 0-dim");
    check_dtype(grad, "grad");
  }

 private:
  void check_dtype(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.scalar_type() == accumulate_type(pred.scalar_type()), "giou_loss: ", name,
                    " must be float32, or float64 for float64 boxes");
    STD_TORCH_CHECK(same_device(pred, tensor), "giou_loss: ", name, " must be on pred's device");
  }
};

}  // namespace drcnn
