// The checked, contiguous arguments of ota_assign, the same for the CPU and for CUDA.
#pragma once

#include <tuple>

#include "ota_assign.h"
#include "tensors.h"

namespace drcnn {

using OtaResult = std::tuple<Tensor, Tensor, Tensor>;

inline OtaRule ota_rule(double class_weight, double l1_weight, double giou_weight, double alpha, double gamma,
                        int64_t top_q, int64_t fixed_k, double unit_offset, double max_share, double epsilon,
                        int64_t iterations) {
  return {static_cast<float>(class_weight), static_cast<float>(l1_weight), static_cast<float>(giou_weight),
          static_cast<float>(alpha),        static_cast<float>(gamma),     top_q,
          static_cast<float>(fixed_k),      static_cast<float>(unit_offset), max_share,
          static_cast<float>(epsilon),      iterations};
}

struct OtaArguments {
  Tensor logits, boxes, gt_boxes, gt_labels, gt_valid, image_sizes;
  int64_t images, count, classes, gts;
  OtaRule rule;

  OtaArguments(const Tensor& logits_, const Tensor& boxes_, const Tensor& gt_boxes_, const Tensor& gt_labels_,
               const Tensor& gt_valid_, const Tensor& image_sizes_, const OtaRule& rule_)
      : rule(rule_) {
    STD_TORCH_CHECK(logits_.dim() == 3, "ota_assign: logits must have shape [B, N, K]");
    STD_TORCH_CHECK(gt_valid_.dim() == 2, "ota_assign: gt_valid must have shape [B, G]");
    images = logits_.size(0);
    count = logits_.size(1);
    classes = logits_.size(2);
    gts = gt_valid_.size(1);
    logits = checked(logits_, {images, count, classes}, ScalarType::Float, "logits", logits_);
    boxes = checked(boxes_, {images, count, 4}, ScalarType::Float, "boxes", logits_);
    gt_boxes = checked(gt_boxes_, {images, gts, 4}, ScalarType::Float, "gt_boxes", logits_);
    gt_labels = checked(gt_labels_, {images, gts}, ScalarType::Long, "gt_labels", logits_);
    gt_valid = checked(gt_valid_, {images, gts}, ScalarType::Bool, "gt_valid", logits_);
    image_sizes = checked(image_sizes_, {images, 2}, ScalarType::Float, "image_sizes", logits_);
    STD_TORCH_CHECK(rule.top_q >= 1 && rule.iterations >= 1, "ota_assign: top_q and iterations must be >= 1");
    STD_TORCH_CHECK(rule.epsilon > 0, "ota_assign: epsilon must be above 0");
    STD_TORCH_CHECK(rule.max_share > 0 && rule.max_share < 1, "ota_assign: max_share must be above 0 and below 1");
    STD_TORCH_CHECK(classes > 0 || images * gts == 0, "ota_assign: ground truths need at least one class");
  }

  Tensor make(std::initializer_list<int64_t> shape, ScalarType type) const {
    return torch::stable::empty(shape, type, std::nullopt, logits.device());
  }

 private:
  static Tensor checked(const Tensor& tensor, std::initializer_list<int64_t> shape, ScalarType type, const char* name,
                        const Tensor& like) {
    bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
    int64_t d = 0;
    for (const int64_t size : shape) fits = fits && tensor.size(d++) == size;
    STD_TORCH_CHECK(fits, "ota_assign: ", name, " does not fit the shape of logits and gt_valid");
    STD_TORCH_CHECK(tensor.scalar_type() == type, "ota_assign: ", name, " must be ",
                    torch::headeronly::toString(type));
    STD_TORCH_CHECK(same_device(tensor, like), "ota_assign: ", name, " must be on the device of logits");
    return torch::stable::contiguous(tensor);
  }
};

}  // namespace drcnn
