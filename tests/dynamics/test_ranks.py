"""Several ranks: every one holds the state that one rank with all images would hold."""

import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from drcnn.dynamics import Assignment, DynamicTraining, DynamicTrainingConfig

STEPS = 5
PRESETS = ("paper", "mmdet", "author")


def assignment(step: int, images: slice) -> Assignment:
    """Random statistics of two images; in some steps the second has no ground truth, or a NaN."""
    generator = torch.Generator().manual_seed(step)
    max_iou, error = torch.rand(2, 2, 12, generator=generator)
    has_gt = torch.tensor([[True], [step != 1]])
    if step == 2:
        error[1] = math.nan
    everything = torch.ones(2, 12, dtype=torch.bool)
    positive = (max_iou > 0.4) & has_gt
    boxes = torch.rand(2, 12, 4, generator=generator)
    fields = (boxes, boxes[:, :1], has_gt, max_iou, error, everything, ~everything, positive, everything)
    return Assignment(*(field[images] for field in fields))


def train(preset: str, images: slice) -> dict[str, torch.Tensor]:
    config = getattr(DynamicTrainingConfig, preset)()
    # The ranks of the batch-wide readings are over the images of each rank, by their definition.
    config = DynamicTrainingConfig(
        **{**vars(config), "window": 4, "iou_top_k": 3, "iou_scope": "image", "error_scope": "image"}
    )
    policy = DynamicTraining(config)
    for step in range(STEPS):
        policy.record(assignment(step, images))
        policy.update()
    return policy.state_dict()


def _rank(rank: int, port: int, folder) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    states = {preset: train(preset, slice(rank, rank + 1)) for preset in PRESETS}
    torch.save(states, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """The states of two ranks with one image each, by rank and preset."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_rank, (port, folder), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("preset", PRESETS)
def test_ranks_hold_what_one_rank_would(states, preset):
    expected = train(preset, slice(None))
    assert expected["non_finite"] > 0 and expected["iou_threshold"] > 0.4 and expected["beta"] < 1
    for state in states:
        assert state[preset].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state[preset][name], value, equal_nan=True)
    for name in expected:  # bit for bit between the ranks
        torch.testing.assert_close(*(s[preset][name] for s in states), rtol=0, atol=0, equal_nan=True)
