"""A trained detector as an ONNX file, with its operators as those of ONNX."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from onnxscript import opset18 as op
from onnxscript.ir import DataType
from torch.export import ExportedProgram

from drcnn.engine.exporting import INPUTS, METADATA, ExportInfo
from drcnn.errors import ConfigError
from drcnn.ops.nms import float32_floor

OUTPUTS = ("boxes", "scores", "labels", "valid", "masks")
_LEAST = -3e38
"""Below every score that counts."""


def save_onnx(program: ExportedProgram, file: Path, info: ExportInfo, opset: int = 18) -> None:
    """Writes one ONNX file; ``info`` is its metadata ``drcnn``.

    Args:
        program: traced with the reference backend of the operators.
        file: to write.
        info: what a reader needs besides the graph.
        opset: version of ONNX's operators, at least 18.

    Raises:
        ConfigError: if the detector has an operator that ONNX lacks.
    """
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    if torch.ops.drcnn_python.soft_nms.default in called:
        raise ConfigError(
            "ONNX has no Soft-NMS; switch it off, as by --model.box-head.soft-nms off, or pass --format torch"
        )
    outputs = OUTPUTS[: len(program.graph_signature.user_outputs)]
    exported = translate(program, opset, input_names=INPUTS, output_names=outputs)
    exported.model.metadata_props[METADATA] = info.to_json()
    exported.save(file, external_data=False)


def translate(program: ExportedProgram, opset: int = 18, **names: Sequence[str]) -> torch.onnx.ONNXProgram:
    """Translates a program to ONNX.

    Args:
        program: traced with the reference backend of the operators.
        opset: version of ONNX's operators.
        names: ``input_names`` and ``output_names``.
    """
    operators = torch.ops.drcnn_python
    table = {operators.nms.default: nms, operators.roi_align.default: roi_align}
    return torch.onnx.export(
        program, opset_version=opset, custom_translation_table=table, dynamo=True, verbose=False, **names
    )


def nms(boxes: Any, scores: Any, groups: Any, valid: Any, iou_threshold: Any, slots: Any) -> tuple[Any, Any]:
    """Translates :func:`drcnn.ops.nms`.

    NonMaxSuppression takes a row of scores for each group, and gives what it keeps group by group; the best
    of them all are the result, ties by rising position, as there.

    Args:
        boxes: float32 [B, N, 4].
        scores: float32 [B, N].
        groups: int64 [B, N], from 0.
        valid: bool [B, N].
        iou_threshold: IoU above which the lower score is dropped.
        slots: M, most boxes kept per image.

    Returns:
        Positions [B, M] and validity [B, M].
    """
    nothing = op.Constant(value_float=float("-inf"))
    scores = op.Where(valid, scores, nothing)
    groups_of_batch = op.Range(0, op.Add(op.ReduceMax(groups, keepdims=0), 1), 1)
    own = op.Equal(op.Unsqueeze(groups, [1]), op.Unsqueeze(groups_of_batch, [0, 2]))
    by_group = op.Where(own, op.Unsqueeze(scores, [1]), nothing)
    threshold = op.Constant(value_floats=[float32_floor(iou_threshold)])
    least = op.Constant(value_floats=[_LEAST])
    chosen = op.NonMaxSuppression(boxes, by_group, op.Reshape(slots, [-1]), threshold, least)
    places = op.Gather(chosen, [0, 2], axis=1)
    kept = op.Expand(nothing, op.Shape(scores))
    kept = op.ScatterND(kept, places, op.GatherND(scores, places))
    best, index = op.TopK(kept, op.Reshape(slots, [-1]), axis=1)
    found = op.Greater(best, least)
    return op.Where(found, index, 0), found


def roi_align(
    features: Sequence[Any],
    rois: Any,
    levels: Any,
    scales: Sequence[float],
    size: Any,
    sampling_ratio: Any,
    aligned: Any,
) -> Any:
    """Translates ``drcnn_python::roi_align``: each level pools its own boxes; those of no level get zeros.

    Args:
        features: float32 [B, C, H_l, W_l].
        rois: float32 [R, 5], image and box in pixels.
        levels: int64 [R], -1 for none.
        scales: cells per pixel of each level.
        size: side S of the pooled square.
        sampling_ratio: samples per cell and side; 0 adapts to the box.
        aligned: shift by half a pixel.

    Returns:
        Float32 [R, C, S, S].
    """
    image = op.Cast(op.Gather(rois, 0, axis=1), to=DataType.INT64)
    boxes = op.Slice(rois, [1], [5], [1])
    channels = op.Shape(features[0], start=1, end=2)
    shape = op.Concat(op.Shape(levels), channels, op.Constant(value_ints=[size, size]), axis=0)
    pooled = op.Expand(op.Constant(value_float=0.0), shape)
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        rows = op.Transpose(op.NonZero(op.Equal(levels, op.Constant(value_int=level))), perm=[1, 0])
        found = op.RoiAlign(
            feature,
            op.GatherND(boxes, rows),
            op.GatherND(image, rows),
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
            output_height=size,
            output_width=size,
            sampling_ratio=sampling_ratio,
            spatial_scale=scale,
        )
        pooled = op.ScatterND(pooled, rows, found)
    return pooled
