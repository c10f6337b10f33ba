// The checked arguments and the results of match_boxes, the same for the CPU and for CUDA.
#pragma once

#include <tuple>

#include "batched_boxes.h"

namespace drcnn {

using MatchPair = std::tuple<Tensor, Tensor>;
using MatchQuad = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct MatchArguments {
  BatchedBoxes boxes;
  BatchedBoxes gt;
  Tensor gt_valid;

  MatchArguments(const Tensor& boxes_, const Tensor& gt_boxes, const Tensor& gt_valid_)
      : boxes(boxes_, "match_boxes", "boxes"), gt(gt_boxes, "match_boxes", "gt_boxes") {
    STD_TORCH_CHECK(boxes.batch == gt.batch, "match_boxes: boxes and gt_boxes must have the same batch size");
    check_same_kind(gt_boxes, boxes_, "match_boxes", "gt_boxes");
    gt_valid = checked_rows(gt_valid_, gt.batch, gt.count, ScalarType::Bool, boxes_, "match_boxes", "gt_valid");
  }

  ScalarType type() const { return boxes.tensor.scalar_type(); }

  Tensor make(int64_t count, ScalarType of) const {
    return torch::stable::empty({boxes.batch, count}, of, std::nullopt, boxes.tensor.device());
  }
};

}  // namespace drcnn
