"""Which device each rank takes."""

import pytest
import torch

from drcnn.engine.distributed import pick_device, rank_device
from drcnn.errors import ConfigError


@pytest.fixture
def two_gpus(monkeypatch):
    """What torch says on a machine with two GPUs, to the second of two ranks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


def test_each_rank_has_its_own_gpu(two_gpus):
    assert rank_device("cuda") == rank_device("auto") == torch.device("cuda", 1)
    assert rank_device("cpu") == torch.device("cpu")


def test_ranks_do_not_share_a_gpu(two_gpus, monkeypatch):
    with pytest.raises(ConfigError, match=r"cuda:1 puts all 2 ranks of this machine on one GPU"):
        rank_device("cuda:1")
    assert pick_device("cuda:1") == torch.device("cuda", 1)  # a script may choose for each of its ranks
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert rank_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="there is no cuda:2; torch sees 2 CUDA devices"):
        rank_device("cuda:2")
