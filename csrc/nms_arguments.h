// The checked, contiguous arguments of nms and soft_nms and their empty outputs, the same for the CPU and for CUDA.
#pragma once

#include "nms.h"
#include "tensors.h"

namespace drcnn {

struct NmsArguments {
  const char* op;
  Tensor boxes;
  Tensor scores;
  Tensor groups;
  Tensor valid;
  float threshold;
  int64_t images;
  int64_t count;  // boxes per image
  int64_t slots;

  NmsArguments(const char* op_, const Tensor& boxes_, const Tensor& scores_, const Tensor& groups_,
               const Tensor& valid_, double iou_threshold, int64_t slots_)
      : op(op_),
        boxes(torch::stable::contiguous(boxes_)),
        scores(torch::stable::contiguous(scores_)),
        groups(torch::stable::contiguous(groups_)),
        valid(torch::stable::contiguous(valid_)),
        threshold(nms_threshold(iou_threshold)),
        slots(slots_) {
    STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4, op, ": boxes must have shape [B, N, 4]");
    STD_TORCH_CHECK(boxes.scalar_type() == ScalarType::Float, op, ": boxes must be float32");
    images = boxes.size(0);
    count = boxes.size(1);
    check(scores, "scores", ScalarType::Float, "float32");
    check(groups, "groups", ScalarType::Long, "int64");
    check(valid, "valid", ScalarType::Bool, "bool");
    STD_TORCH_CHECK(slots >= 0, op, ": slots must be >= 0");
    STD_TORCH_CHECK(count <= std::numeric_limits<int32_t>::max(), op, ": more than 2^31 - 1 boxes per image");
  }

  Tensor new_output(ScalarType type) const {
    return torch::stable::empty({images, slots}, type, std::nullopt, boxes.device());
  }

 private:
  void check(const Tensor& tensor, const char* name, ScalarType type, const char* type_name) const {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == images && tensor.size(1) == count, op, ": ", name,
                    " must have shape [B, N] of boxes");
    STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", name, " must be ", type_name);
    STD_TORCH_CHECK(same_device(boxes, tensor), op, ": ", name, " must be on the device of boxes");
  }
};

}  // namespace drcnn
