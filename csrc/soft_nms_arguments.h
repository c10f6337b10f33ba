// The checked, contiguous arguments of soft_nms, the same for the CPU and for CUDA.
#pragma once

#include "nms_arguments.h"
#include "soft_nms.h"

namespace drcnn {

struct SoftNmsArguments : NmsArguments {
  SoftNmsMethod method;
  SoftNmsRule rule;

  SoftNmsArguments(const Tensor& boxes_, const Tensor& scores_, const Tensor& groups_, const Tensor& valid_,
                   int64_t method_, double iou_threshold, double sigma, double min_score, int64_t slots_)
      : NmsArguments("soft_nms", boxes_, scores_, groups_, valid_, iou_threshold, slots_),
        method(static_cast<SoftNmsMethod>(method_)),
        rule{soft_nms_least(iou_threshold), soft_nms_factor(sigma), soft_nms_least(min_score)} {
    STD_TORCH_CHECK(method_ >= 0 && method_ <= 2, op, ": method must be 0 (hard), 1 (linear) or 2 (gaussian)");
    STD_TORCH_CHECK(sigma > 0, op, ": sigma must be above 0");
    STD_TORCH_CHECK(min_score >= 0, op, ": min_score must be >= 0");
  }
};

}  // namespace drcnn
