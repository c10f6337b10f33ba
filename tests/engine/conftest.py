"""A run that is as light as one can be and still has every part that moves."""

from dataclasses import replace
from pathlib import Path

import pytest

from drcnn import presets
from drcnn.config import Config
from drcnn.data import DataConfig, SplitConfig
from drcnn.dynamics import DynamicTrainingConfig, ScaleTrainingConfig
from drcnn.engine.trainer import TrainConfig
from drcnn.models import AnchorConfig, BoxHeadConfig, FasterRCNNConfig, FPNConfig, RPNConfig, TimmConfig


@pytest.fixture(scope="module")
def light_run(tmp_path_factory, tiny_coco, write_config) -> str:
    """Config file of a run of 60 iterations.

    Dynamic R-CNN and dynamic scale training, on a backbone with batch norm, in bfloat16, with two
    micro-batches an iteration and averaged weights. Two workers, a record every 3 iterations, a checkpoint
    every 5, an evaluation every 20.
    """
    pytest.importorskip("timm", reason="the light run needs the extra timm")
    model = FasterRCNNConfig(
        4,
        TimmConfig("test_resnet"),
        FPNConfig(channels=16),
        RPNConfig(AnchorConfig(sizes=(16, 32, 64, 128, 256)), pre_nms=50, post_nms=20, test_post_nms=20),
        BoxHeadConfig(channels=32, samples=16, sampling_ratio=1),
        training=DynamicTrainingConfig(
            window=5, iou_top_k=3, error_top_k=2, min_iou_threshold=0.05, max_beta=100.0
        ),
        scale=ScaleTrainingConfig(threshold=0.4, small_area=200.0, medium_area=600.0),
    )
    splits = [SplitConfig(f"images/{s}", f"annotations/instances_{s}.json") for s in ("train", "val", "test")]
    sizes = dict(short_sides=(64,), max_size=96, test_short_side=64, test_max_size=96, pad_step=32)
    data = DataConfig(str(tiny_coco), *splits, batch_size=4, workers=2, **sizes)
    optim = replace(presets.short_schedule(60), warmup_iterations=5, accumulate=2, ema=0.9)
    train = TrainConfig(amp="bf16", threads=1, pictures=0, log_every=3, checkpoint_every=5, eval_every=20)
    path: Path = tmp_path_factory.mktemp("light") / "light.py"
    return write_config(path, Config(model, data, optim, train))
