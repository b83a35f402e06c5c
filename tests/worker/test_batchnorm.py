"""BatchNorm's statistics made anew: those of all batches of all ranks, the same bits everywhere, or the old ones."""

from __future__ import annotations

import pytest
import torch
from processes import run_ranks, values
from test_averaging import assert_same_bits, copied
from torch import nn
from torch.optim.swa_utils import update_bn

import runmgr
from runmgr.errors import InvalidInput, RunError


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3, momentum=0.3)
    )


def batches(count):
    random = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 1, 9, 9, generator=random) * 3 + 1, torch.zeros(5)) for _ in range(count)]


def test_one_rank_gets_what_torch_computes():
    model, reference = build(), build()
    model(torch.randn(2, 1, 9, 9))
    model.train()
    model[0].eval()
    runmgr.recalibrate_batch_norm(model, batches(7))
    update_bn(batches(7), reference)
    assert_same_bits(copied(model.state_dict()), copied(reference.state_dict()))
    assert [part.training for part in model] == [False, True, True, True, True]
    assert (model[1].momentum, model[4].momentum) == (0.1, 0.3)


def test_layers_that_do_more_than_normalise_still_do_it():
    class Activated(nn.SyncBatchNorm):
        def forward(self, inputs):
            return super().forward(inputs).relu()

    model = nn.Sequential(Activated(2), nn.BatchNorm1d(2))
    own = model[1].forward = model[1].forward  # as a library's hook leaves it
    runmgr.recalibrate_batch_norm(model, [torch.randn(64, 2)])
    assert model[1].running_mean.min() > 0.2, "of what the activation gave"
    assert vars(model[1])["forward"] == own


def test_no_random_number_is_drawn_and_dropout_is_off():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2))
    before = torch.get_rng_state()
    runmgr.recalibrate_batch_norm(model, [torch.ones(4, 2)])
    assert torch.equal(torch.get_rng_state(), before)
    assert model[1].running_mean.tolist() == [1, 1]


@pytest.mark.parametrize("kind", [nn.parallel.DistributedDataParallel, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_ranks_with_unequal_shares_get_the_statistics_of_all_batches(kind):
    def recalibrate(rank):
        model = kind(build())
        own = batches(7)[:2] if rank == 0 else batches(7)[2:] if rank == 1 else []
        runmgr.recalibrate_batch_norm(model, own)
        assert not any("forward" in vars(part) for part in model.modules())
        return copied(getattr(model, "module", model).state_dict())

    found = values(run_ranks(3, recalibrate, store="group"))
    reference = build()
    update_bn(batches(7), reference)
    for state in found:
        assert_same_bits(state, found[0])
        for key, tensor in reference.state_dict().items():
            assert torch.allclose(state[key], tensor, rtol=1e-6, atol=1e-7), key


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loader_that_fails_on_one_rank_raises_on_all_and_changes_nothing(ranks):
    def recalibrate(rank):
        model = build()
        before = copied(model.state_dict())

        def loader():
            yield from batches(2)
            if rank == ranks - 1:
                raise OSError("the disk is gone")

        try:
            runmgr.recalibrate_batch_norm(model, loader())
        except (RunError, OSError) as error:
            text = str(error)
        assert_same_bits(copied(model.state_dict()), before)
        assert model.training
        assert model[4].momentum == 0.3
        return text

    for text in values(run_ranks(ranks, recalibrate, store="group")):
        assert "the disk is gone" in text


def test_an_empty_loader_is_an_error_and_a_model_without_batch_norm_is_not():
    model = build()
    before = copied(model.state_dict())
    with pytest.raises(InvalidInput, match="no batch"):
        runmgr.recalibrate_batch_norm(model, [])
    assert_same_bits(copied(model.state_dict()), before)
    runmgr.recalibrate_batch_norm(nn.Linear(1, 1), [])


def test_within_an_average_that_is_applied_they_go_with_it():
    model = build()
    average = runmgr.ExponentialAverage(model, 0.5)
    model(torch.randn(3, 1, 9, 9))
    average.update()
    before = copied(model.state_dict())
    with average.applied():
        runmgr.recalibrate_batch_norm(model, batches(3))
        assert model[1].num_batches_tracked == 3
    assert_same_bits(copied(model.state_dict()), before)
