"""Restoring: all ranks of a host check a file together, what is not whole is passed over, and nothing of the file is held."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from disk.shelves import damage
from processes import run_ranks, values
from torch import nn

import runmgr
from runmgr.disk import checkpoints, directory, integrity
from runmgr.errors import CheckpointCorrupt
from runmgr.worker import agreement, loading

_TENSORS = 6


def test_restore_falls_back_past_damage_and_writes_down_what_it_rejected():
    model = nn.Linear(3, 3)
    with runmgr.start_run("damage", keep=runmgr.Keep(last=None)) as run:
        for epoch in (1, 2, 3):
            run.save({"net": model}, epoch=epoch)
    for name, change in (("ckpt_epoch_3.pth", 0), ("ckpt_epoch_2.pth", -30)):
        path = run.run_dir / name
        path.chmod(0o644)
        content = bytearray(path.read_bytes())
        content[change] ^= 1
        path.write_bytes(content)
    with runmgr.start_run("damage", run_id=run.run_id) as again:
        assert again.restore({"net": model}).epoch == 1
        attempt = json.loads((run.run_dir / ".runmgr/attempts/0002.json").read_text())
        assert [text.split(" is damaged")[0].rpartition("/")[2] for text in attempt["rejected"]] == [
            "0001-000003.pth",
            "0001-000002.pth",
        ]
        with pytest.raises(CheckpointCorrupt):
            again.restore({"net": model}, "ckpt_epoch_2.pth")


def _state(value):
    return {f"part{index}": torch.full((256,), float(value)) for index in range(_TENSORS)}


def _records_of(path):
    with path.open("rb", buffering=0) as file:
        return list(integrity.records_in(file))


def _problem(run, entry, share):
    try:
        checkpoints.verify(run, entry, share=share)
    except CheckpointCorrupt as error:
        return str(error)
    return None


def test_each_damaged_record_is_noticed_by_exactly_one_of_the_shares():
    with runmgr.start_run("shares") as run:
        run.save(_state(1), epoch=1)
    found = directory.RunDirectory(run.run_dir)
    entry = checkpoints.read_all(found)[0]
    path = entry.path_in(found)
    for record in _records_of(path):
        damage(path, record.start)
        noticed = [problem for index in range(3) if (problem := _problem(found, entry, (index, 3)))]
        assert len(noticed) == 1
        assert repr(record.name) in noticed[0]
        damage(path, record.start)
    checkpoints.verify(found, entry)


def test_the_ranks_of_each_host_divide_the_whole_file_among_them():
    assert loading._shares(["a", "b", "a", "b", "a"]) == [(0, 3), (0, 2), (1, 3), (1, 2), (2, 3)]


def _restore_on_two_hosts(rank, root, damaged_for):
    """Ranks 2 and 3 say that they are on another host; the rank `damaged_for` sees a damaged file."""
    connect, verify = agreement.connect, checkpoints.verify
    host = "here" if rank < 2 else "there"
    seen = []

    def connect_from_host(timeout_s):
        found = connect(timeout_s)
        found.ranks = found.ranks._replace(host=host)
        return found

    def look(run, entry, on_bytes=None, *, share=(0, 1)):
        seen.append((entry.epoch, share))
        if rank == damaged_for and entry.epoch == 2:
            raise CheckpointCorrupt("its bytes are wrong here", path="", reason="")
        verify(run, entry, share=share)

    agreement.connect, checkpoints.verify = connect_from_host, look
    with runmgr.start_run("hosts", ckpt_root_dir=root, resume="latest") as run:
        progress = run.restore({"w": torch.zeros(1)})
        return progress.epoch, progress.values["w"].item(), seen


def test_what_only_one_host_reads_wrong_is_restored_on_none(root):
    with runmgr.start_run("hosts", ckpt_root_dir=root, keep=runmgr.Keep(last=None)) as run:
        for epoch in (1, 2):
            run.save({"w": torch.full((1,), float(epoch))}, epoch=epoch)
    for rank, (epoch, value, seen) in enumerate(values(run_ranks(4, _restore_on_two_hosts, root, 3))):
        assert (epoch, value) == (1, 1.0)
        assert seen == [(2, (rank % 2, 2)), (1, (rank % 2, 2))]
    record = json.loads((run.run_dir / ".runmgr/attempts/0002.json").read_text())
    assert record["rejected"] == ["its bytes are wrong here (read on there)"]


def _restore_foreign(_, root):
    with runmgr.start_run("foreign", ckpt_root_dir=root, run_id="RUN_20240101_000000_000000") as run:
        state = {"net": nn.Linear(2, 2)}
        run.restore(state)
        return state["net"].weight.sum().item()


def test_a_checkpoint_of_another_program_is_restored_unchecked(root):
    run_dir = root / "foreign" / "RUN_20240101_000000_000000"
    run_dir.mkdir(parents=True)
    torch.save({"net": {"weight": torch.full((2, 2), 3.0), "bias": torch.zeros(2)}}, run_dir / "ckpt_latest.pth")
    assert values(run_ranks(2, _restore_foreign, root)) == [12.0, 12.0]


class _Foreign:
    pass


def _save_the_second_unloadably():
    """As a newer torch might, with what this one's weights_only loading does not know; every byte is as it was saved."""
    from runmgr.worker import gathering

    with runmgr.start_run("unloadable", keep=runmgr.Keep(last=None)) as run, pytest.MonkeyPatch.context() as patch:
        run.save({"x": 1}, epoch=1)
        patch.setattr(gathering, "loadable", lambda value, _: value)
        run.save({"x": _Foreign()}, epoch=2)
    return run


def _restore_past(rank, root, run_id):
    with runmgr.start_run("unloadable", ckpt_root_dir=root, run_id=run_id) as run:
        return run.restore({"x": 0}).epoch


def test_restore_falls_back_past_a_checkpoint_that_is_whole_but_cannot_be_loaded(root):
    run = _save_the_second_unloadably()
    assert values(run_ranks(2, _restore_past, root, run.run_id)) == [1, 1]
    attempt = json.loads((run.run_dir / ".runmgr/attempts/0002.json").read_text())
    assert "0001-000002.pth holds what torch.load(weights_only=True) of torch" in attempt["rejected"][0]
    assert "does not read: Unsupported global: GLOBAL" in attempt["rejected"][0]
    assert "test_loading._Foreign was not an allowed global by default." in attempt["rejected"][0]
    assert "Please use" not in attempt["rejected"][0]
    with runmgr.start_run("unloadable", run_id=run.run_id) as again:
        again.restore({"x": 0})
        with pytest.raises(CheckpointCorrupt, match="does not read: Unsupported global"):
            again.restore({"x": 0}, "ckpt_epoch_2.pth")
        with pytest.raises(CheckpointCorrupt, match="does not read: Unsupported global"):
            again.load("ckpt_epoch_2.pth")


def test_a_checkpoint_of_another_program_that_cannot_be_loaded_is_an_error_and_no_other_is_taken():
    with runmgr.start_run("foreign") as run:
        run.save({"x": 1}, epoch=1)
        torch.save({"x": _Foreign()}, run.run_dir / "ckpt_other.pth")
        with pytest.raises(CheckpointCorrupt, match=r"ckpt_other\.pth holds what torch\.load"):
            run.restore({"x": 0}, "ckpt_other.pth")


def _restore_shards(_):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(4)))  # 16 MiB each
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters())
    with runmgr.start_run("shards", resume="latest") as run:
        before, greatest, is_done = _memory_bytes(), [0], threading.Event()

        def watch():
            while not is_done.wait(0.001):
                greatest[0] = max(greatest[0], _memory_bytes() - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        run.restore({"net": model, "optimizer": optimizer})
        is_done.set()
        watcher.join()
    return greatest[0], sum(entry["exp_avg"].to_local().sum().item() for entry in optimizer.state.values())


def _memory_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def test_a_rank_that_restores_shards_holds_no_whole_state_at_any_moment():
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2048)).sum().backward()
    optimizer.step()
    with runmgr.start_run("shards") as run:
        run.save({"net": model, "optimizer": optimizer}, epoch=1)
    found = values(run_ranks(4, _restore_shards, store="group"))
    whole = sum(entry["exp_avg"].sum().item() for entry in optimizer.state.values())
    assert sum(part for _, part in found) == pytest.approx(whole, rel=1e-4)
    mib = [most >> 20 for most, _ in found]
    assert max(mib) < 96, (
        mib
    )  # its shards of both moments are 32, of the model 16; the moments alone are 128 when whole
