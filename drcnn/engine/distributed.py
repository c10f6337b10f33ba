"""Ranks as torchrun starts them, and nothing home-made: gloo on CPU, nccl on CUDA, native DDP.

Without torchrun every function answers as for a single rank.
"""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from drcnn.engine.rank_watch import RankWatch
from drcnn.errors import ConfigError


def rank() -> int:
    """Returns the number of this process among all, 0 for the main one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Tells whether this process writes the run folder."""
    return rank() == 0


def pick_device(name: str) -> torch.device:
    """Resolves ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` to the device of this rank.

    Raises:
        ConfigError: if the device does not exist here.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise ConfigError(f"there is no device {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {name}: torch sees no CUDA here; run drcnn doctor, or use cpu")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"there is no {device}; torch sees {torch.cuda.device_count()} CUDA devices")
    elif device.type != "cpu":
        raise ConfigError(f"device {name} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def rank_device(name: str) -> torch.device:
    """Resolves a device as :func:`pick_device` does, for a rank that torchrun may have started.

    Raises:
        ConfigError: as there, or if the ranks of this machine would share one GPU.
    """
    device, ranks = pick_device(name), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > 1 and device.type == "cuda" and ":" in name:
        raise ConfigError(
            f"--train.device {name} puts all {ranks} ranks of this machine on one GPU; "
            "pass cuda, which gives each its own"
        )
    return device


@contextmanager
def process_group(device: torch.device, minutes: float = 30.0) -> Iterator[None]:
    """Joins the ranks that torchrun started for as long as the block runs; does nothing without torchrun.

    The ranks end as one, see :mod:`drcnn.engine.rank_watch`.

    Args:
        device (torch.device): of this rank; nccl joins CUDA devices, gloo CPUs.
        minutes (float): how long a rank waits for the others in one collective.

    Raises:
        RankStopped: if another rank failed or died, which has been said.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    cuda, limit = device.type == "cuda", timedelta(minutes=minutes)
    if cuda:
        torch.cuda.set_device(device)
    store, own_rank, ranks = next(rendezvous("env://"))
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=own_rank,
        world_size=ranks,
        timeout=limit,
        device_id=device if cuda else None,
    )
    if ranks == 1:
        yield
    else:
        watch = RankWatch(store, limit)
        try:
            yield
        except Exception as error:
            found = watch.explain(error)
            if found is error:
                raise
            raise found from error
        watch.leave()
    dist.destroy_process_group()


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """Wraps ``model`` for native data-parallel training when there is more than one rank.

    Buffers are not broadcast at each step: the dynamics all-reduce their own state, and batch norm is frozen,
    synchronized (:func:`synchronize_batch_norm`) or local to its rank.
    """
    if world_size() == 1:
        return model
    options = inspect.signature(DistributedDataParallel).parameters
    exchange_buffers = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{exchange_buffers: False},
    )


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Makes batch norm that is trained take its statistics over the images of all ranks; in place.

    Frozen batch norm stays as it is. A single rank needs nothing.

    Raises:
        ConfigError: if there is none that is trained, or if the ranks are on CPUs, where torch cannot do it.
    """
    trained = [
        (parent, name, part)
        for parent in model.modules()
        for name, part in parent.named_children()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.weight.requires_grad
    ]
    if not trained:
        raise ConfigError(
            "train.sync_bn has nothing to do: this model trains no batch norm; "
            "leave it out, or set --model.backbone.norm bn"
        )
    if world_size() == 1:
        return
    if device.type != "cuda":
        raise ConfigError(f"train.sync_bn needs ranks on GPUs, torch cannot do it on {device}; leave it out")
    for parent, name, part in trained:
        setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(part))


def share_of(sums: list[torch.Tensor]) -> torch.Tensor:
    """Gives this rank its part of sums that each of some ranks had, so that their mean stays what it was."""
    return sums[rank()] if len(sums) == world_size() else torch.stack(sums).mean(dim=0)


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Averages each value over the ranks; waits for the device, so it is for log events only."""
    if world_size() == 1:
        return values
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(values, (total / world_size()).tolist(), strict=True))


def first_over_ranks(value: int | None) -> int | None:
    """Returns the least value of the ranks that have one, or None."""
    return min((v for v in gather_objects(value) if v is not None), default=None)


def from_main(value: object) -> object:
    """Gives every rank the ``value`` of the main one."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather_to_main(values: list, chunk: int = 256) -> Iterator[object]:
    """Brings the values of all ranks to the main one, a few at a time, so that little is in memory twice.

    Every rank has to iterate to the end.

    Args:
        values (list): those of this rank; the ranks may have different numbers of them.
        chunk (int): values of each rank at a time.

    Yields:
        On the main rank the values of all, in no order to rely on; on the others nothing.
    """
    longest = max(gather_objects(len(values)))
    for start in range(0, longest, chunk):
        part = values[start : start + chunk]
        parts = [part] * world_size() if is_main() else None
        if world_size() > 1:
            dist.gather_object(part, parts)
        for share in parts or ():
            yield from share


def gather_objects(value: object) -> list:
    """Gives every rank the list of the ``value`` of each rank, by rank."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits for every rank."""
    if world_size() > 1:
        dist.barrier()
