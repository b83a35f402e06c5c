"""BatchNorm's statistics for weights that no training step has seen, such as an average's."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runmgr.errors import InvalidInput
from runmgr.worker import agreement
from runmgr.worker.sharding import check_group, gathered_rows
from runmgr.worker.state import unwrap

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

_Norm = nn.modules.batchnorm._BatchNorm  # noqa: SLF001  # what all of torch's own, SyncBatchNorm included, derive from


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, loader: Iterable[Any]) -> None:
    """Give the model's BatchNorm layers the mean statistics of all batches of all ranks, each with the same weight.

    Every rank, each with its part of the data; the ranks get the same bits. A batch is the model's input, or a tuple or
    list that begins with it. Only those layers are in training mode meanwhile, so dropout is off and draws no random
    numbers; modes and momenta come back. If it fails on one rank it raises the same error on all, and the statistics are
    the old ones. Inside `with average.applied():` they go again with the average.

    The statistics are those of `torch.optim.swa_utils.update_bn`: a cumulative mean (`momentum=None`) since a reset.
    """
    bare = unwrap(model)  # DDP would send rank 0's buffers to all before each batch
    norms = [part for part in bare.modules() if isinstance(part, _Norm) and part.running_mean is not None]
    if not norms:
        return
    kept = [[buffer.clone() for buffer in _buffers(norm)] for norm in norms]

    ranks = agreement.current_ranks()

    def run() -> int:
        check_group(ranks)
        with _in_training(bare, norms):
            return _forward_all(bare, loader)

    def total(counts: list[int]) -> int:
        if not sum(counts):
            raise InvalidInput("the loader gave no batch on any rank, so there is nothing to take statistics of")
        return sum(counts)

    try:
        if ranks.world_size == 1:
            count = total([run()])
        else:
            count = agreement.shared().agree("take BatchNorm statistics", total, run)
            _mean_over_ranks(norms, count)
    except BaseException:
        for norm, old in zip(norms, kept, strict=True):
            for buffer, value in zip(_buffers(norm), old, strict=True):
                buffer.copy_(value)
        raise
    for norm in norms:
        _buffers(norm)[2].fill_(count)


def _forward_all(model: nn.Module, loader: Iterable[Any]) -> int:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    count = 0
    for batch in loader:
        inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
        model(inputs.to(device))
        count += 1
    return count


@contextmanager
def _in_training(model: nn.Module, norms: list[_Norm]) -> Iterator[None]:
    """Reset these layers, and let them, and no other part of the model, learn a cumulative mean."""
    modes = [(part, part.training) for part in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    # whose forward pass waits for a batch of every rank, and one may have fewer
    synced = [norm for norm in norms if norm.forward == nn.SyncBatchNorm.forward.__get__(norm)]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # what torch calls a cumulative mean
            norm.training = True
        for norm in synced:
            norm.forward = partial(_Norm.forward, norm)  # type: ignore[method-assign]
        yield
    finally:
        for norm in synced:
            vars(norm).pop("forward", None)
        for part, mode in modes:
            part.training = mode
        for norm, momentum in momenta:
            norm.momentum = momentum


def _mean_over_ranks(norms: list[_Norm], count: int) -> None:
    """Weigh each rank's means by its number of batches; in double precision and the ranks' order, so all get the same."""
    own = [buffer.double() * _buffers(norm)[2] for norm in norms for buffer in _buffers(norm)[:2]]
    device = own[0].device
    total = torch.stack(gathered_rows(torch.cat([part.to(device) for part in own]))).sum(0) / count
    parts = torch.split(total, [len(part) for part in own])
    buffers = [buffer for norm in norms for buffer in _buffers(norm)[:2]]
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part)


def _buffers(norm: _Norm) -> tuple[Tensor, Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    return norm.running_mean, norm.running_var, norm.num_batches_tracked
