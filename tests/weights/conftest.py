"""Recorded outputs of MMDetection 3.3.0, and checkpoints made as that system makes them."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from drcnn.structures import ImageBatch

CONFIG_TEXT = {
    # As the published checkpoint of 2020 says it, and as configs of version 3 do.
    "dynamic_rcnn": """
model = dict(type='FasterRCNN', backbone=dict(type='ResNet', depth=50, style='pytorch'),
    roi_head=dict(type='DynamicRoIHead', bbox_head=dict(target_means=[0., 0., 0., 0.])))
test_cfg = dict(
    rpn=dict(
        nms_across_levels=False, nms_pre=1000, nms_post=1000, max_num=1000, nms_thr=0.85, min_bbox_size=0),
    rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_thr=0.5), max_per_img=100))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
""",
    "fcos": """
model = dict(
    type='FCOS',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(type='ResNet', depth=50, style='caffe'),
    bbox_head=dict(type='FCOSHead', loss_bbox=dict(type='IoULoss', loss_weight=1.0)),
    test_cfg=dict(
        max_per_img=100,
        min_bbox_size=0,
        nms=dict(iou_threshold=0.5, type='nms'), nms_pre=1000, score_thr=0.05))
test_cfg = dict(type='TestLoop')
""",
}


class Golden:
    """The recorded outputs, and the code that made their inputs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs, self.weights = (self._module(name) for name in ("det_inputs", "det_weights"))

    def _module(self, name: str):
        spec = importlib.util.spec_from_file_location(name, self.folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def recorded(self, name: str):
        return np.load(self.folder / f"{name}.npz")

    def losses(self, name: str) -> dict:
        return json.loads((self.folder / f"{name}.json").read_text())

    def state_dict(self, name: str) -> dict[str, torch.Tensor]:
        keys = json.loads((self.folder / f"keys_{name}.json").read_text())
        return {key: torch.as_tensor(array) for key, array in self.weights.make_state_dict(keys).items()}

    def checkpoint(self, name: str) -> dict:
        meta = {"mmdet_version": "3.3.0", "seed": 0, "epoch": 12}
        if name in CONFIG_TEXT:
            meta["cfg"] = CONFIG_TEXT[name]
        return {"meta": meta, "state_dict": self.state_dict(name)}

    def batch(self, count: int) -> ImageBatch:
        tensor = torch.zeros(count, 3, 320, 416, dtype=torch.uint8)
        for i in range(count):
            image = torch.from_numpy(self.inputs.image(i)).permute(2, 0, 1)
            tensor[i, :, : image.shape[1], : image.shape[2]] = image
        return ImageBatch(tensor, torch.tensor(self.inputs.IMG_HW[:count]))


@pytest.fixture(scope="session")
def golden(shared_data) -> Golden:
    folder = shared_data.parent / "golden"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return Golden(folder)
