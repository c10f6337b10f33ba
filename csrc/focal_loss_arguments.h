// The checked, contiguous arguments of focal_loss, the same for the CPU and for CUDA.
#pragma once

#include "tensors.h"

namespace drcnn {

struct FocalLossArguments {
  Tensor logits;
  Tensor labels;
  std::optional<Tensor> mask;
  int64_t rows;
  int64_t classes;

  FocalLossArguments(const Tensor& logits_, const Tensor& labels_, const std::optional<Tensor>& mask_)
      : logits(torch::stable::contiguous(logits_)), labels(torch::stable::contiguous(labels_)) {
    STD_TORCH_CHECK(logits.dim() > 0, "focal_loss: logits must have shape [..., K]");
    STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "focal_loss: labels must be int64");
    STD_TORCH_CHECK(same_device(logits, labels), "focal_loss: labels must be on logits' device");
    rows = labels.numel();
    classes = logits.size(logits.dim() - 1);
    STD_TORCH_CHECK(is_of_rows(labels), "focal_loss: labels must have one value per row of logits");
    if (!mask_.has_value()) return;
    mask = torch::stable::contiguous(*mask_);
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "focal_loss: mask must be bool");
    STD_TORCH_CHECK(is_of_rows(*mask), "focal_loss: mask must have one value per row of logits");
    STD_TORCH_CHECK(same_device(logits, *mask), "focal_loss: mask must be on logits' device");
  }

  void check_grad(const Tensor& grad) const {
    STD_TORCH_CHECK(grad.dim() == 0, "focal_loss: grad must be 0-dim");
    STD_TORCH_CHECK(grad.scalar_type() == accumulate_type(logits.scalar_type()),
                    "focal_loss: grad must be float32, or float64 for float64 logits");
    STD_TORCH_CHECK(same_device(logits, grad), "focal_loss: grad must be on logits' device");
  }

  const bool* mask_pointer() const { return mask.has_value() ? mask->const_data_ptr<bool>() : nullptr; }

 private:
  bool is_of_rows(const Tensor& tensor) const {
    if (tensor.dim() != logits.dim() - 1) return false;
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      if (tensor.size(d) != logits.size(d)) return false;
    }
    return true;
  }
};

}  // namespace drcnn
