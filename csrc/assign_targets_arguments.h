// The checked arguments of assign_targets, the same for the CPU and for CUDA.
#pragma once

#include <tuple>

#include "assign_targets.h"
#include "batched_boxes.h"

namespace drcnn {

struct AssignArguments {
  BatchedBoxes boxes;
  BatchedBoxes gt;
  Tensor max_iou;
  Tensor gt_index;
  Tensor gt_labels;
  Tensor labels;
  Tensor deltas;

  AssignArguments(const Tensor& max_iou_, const Tensor& gt_index_, const Tensor& boxes_, const Tensor& gt_boxes,
                  const Tensor& gt_labels_, const Tensor& threshold)
      : boxes(boxes_, "assign_targets", "boxes"), gt(gt_boxes, "assign_targets", "gt_boxes") {
    const char* op = "assign_targets";
    STD_TORCH_CHECK(boxes.batch == gt.batch, "assign_targets: boxes and gt_boxes must have the same batch size");
    check_same_kind(gt_boxes, boxes_, op, "gt_boxes");
    const ScalarType type = boxes_.scalar_type();
    max_iou = checked_rows(max_iou_, boxes.batch, boxes.count, type, boxes_, op, "max_iou");
    gt_index = checked_rows(gt_index_, boxes.batch, boxes.count, ScalarType::Long, boxes_, op, "gt_index");
    gt_labels = checked_rows(gt_labels_, gt.batch, gt.count, ScalarType::Long, boxes_, op, "gt_labels");
    STD_TORCH_CHECK(threshold.dim() == 0, "assign_targets: threshold must be 0-dim");
    STD_TORCH_CHECK(threshold.scalar_type() == accumulate_type(type),
                    "assign_targets: threshold must be float32, or float64 for float64 boxes");
    STD_TORCH_CHECK(same_device(boxes_, threshold), "assign_targets: threshold must be on the boxes' device");
    labels = torch::stable::empty({boxes.batch, boxes.count}, ScalarType::Long, std::nullopt, boxes_.device());
    deltas = torch::stable::empty({boxes.batch, boxes.count, 4}, type, std::nullopt, boxes_.device());
  }

  ScalarType type() const { return boxes.tensor.scalar_type(); }
};

}  // namespace drcnn
