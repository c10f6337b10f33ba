"""The search for the largest batch, without a GPU: what fits is scripted."""

from dataclasses import replace

import pytest
import torch

from drcnn.config import Config
from drcnn.data import canvas_ladder
from drcnn.engine import batch_size
from drcnn.engine.batch_size import (
    find_share,
    largest_canvas,
    largest_fitting,
    trial_step,
    with_earlier_batch,
    with_share,
)
from drcnn.engine.optim import OptimConfig
from drcnn.engine.run_config import TrainConfig
from drcnn.errors import ConfigError
from drcnn.models import AnchorConfig, BoxHeadConfig, FasterRCNNConfig, FPNConfig, ResNetConfig, RPNConfig

TINY = FasterRCNNConfig(
    4,
    ResNetConfig("resnet18", norm="gn", frozen_stages=3),
    FPNConfig(channels=8),
    RPNConfig(AnchorConfig(sizes=(16, 32, 64, 128, 256)), pre_nms=60, post_nms=30),
    BoxHeadConfig(channels=16, samples=16, sampling_ratio=1),
)


class Memory:
    """Holds so many images."""

    def __init__(self, images):
        self.images, self.tried = images, []

    def __call__(self, images):
        self.tried.append(images)
        if images > self.images:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("images", [0, 1, 2, 3, 5, 7, 8, 12, 63, 64, 65, 99, 100, 101, 5000])
def test_the_largest_that_fits_is_found_in_few_tries(images):
    memory = Memory(images)
    assert largest_fitting(memory, most=100) == min(images, 100)
    assert max(memory.tried) <= min(100, max(2 * images, 1)) and len(memory.tried) <= 15
    assert len(set(memory.tried)) == len(memory.tried)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def broken(images):
        raise RuntimeError("cuBLAS error")

    with pytest.raises(RuntimeError, match="cuBLAS"):
        largest_fitting(broken)


@pytest.fixture
def config(tiny_data):
    train = TrainConfig(auto_batch=True, pictures=0)
    return Config(TINY, tiny_data, OptimConfig(accumulate=3, reference_batch=16), train)


def test_a_cpu_is_refused(config):
    config = replace(config, train=replace(config.train, device="cpu"))
    with pytest.raises(ConfigError, match=r"this run is on the cpu; set --data\.batch-size instead"):
        find_share(config)
    assert find_share(replace(config, train=replace(config.train, auto_batch=False))) == 0


def test_the_batch_found_sets_the_lr_and_is_kept_on_resume(config, tmp_path, monkeypatch):
    memory = Memory(5)
    monkeypatch.setattr(batch_size.distributed, "rank_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(batch_size, "trial_step", lambda config, device, images: memory(images))
    found, lines = with_share(config, find_share(config))
    assert found.data.batch_size == 15  # three micro-batches of five
    assert "5 images of the largest size fit at once, so a step has 15 images" in lines[0]
    assert "lr 0.02 for 16 images -> 0.01875 for 15 images" in lines[0]
    with pytest.raises(ConfigError, match="cannot read the batch of the run from"):
        with_earlier_batch(config, tmp_path)
    (tmp_path / "config.json").write_text('{"data": {"batch_size": 9}}')
    assert with_earlier_batch(config, tmp_path).data.batch_size == 9
    memory.images = 0
    with pytest.raises(ConfigError, match="not even one image of 64 x 96 fits"):
        find_share(config)


def test_a_trial_step_runs_on_the_largest_images(config, monkeypatch):
    height, width = largest_canvas(config.data)
    ladder = canvas_ladder(config.data.short_sides, config.data.max_size, 32, config.data.pad_step)
    assert (height, width) == (64, max(ladder))
    seen, build = [], batch_size.build_model

    def spy(config):
        model = build(config)
        model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].tensor.shape))
        return model

    monkeypatch.setattr(batch_size, "build_model", spy)
    optim = replace(config.optim, ema=0.9)
    trial_step(replace(config, optim=optim), torch.device("cpu"), 2)
    assert seen == [(2, 3, 64, 96)] * 2
