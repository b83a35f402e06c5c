"""`runmgr doctor`: what it finds is what the file system does, each fault is found, and nothing is left."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from disk.syscalls import deny, in_child
from processes import LAUNCH_VARIABLES, clean_environment

from runmgr import cli, ranks
from runmgr.disk import probe, probe_host, probe_hosts

DOCTOR = (sys.executable, "-m", "runmgr.cli", "doctor")
MACHINES_OWN = {"file system", "fsync", "bandwidth", "space"}  # not the same everywhere


def _find(folder, *names):
    return {name: probe_host._guarded(name, probe_host.PROBES[name], folder) for name in names}


def test_a_good_disk_is_fine_and_left_as_it_was(tmp_path, capsys):
    (tmp_path / "exp").mkdir()
    status = cli.main(["doctor", str(tmp_path), "--json"])
    told = json.loads(capsys.readouterr().out)
    verdicts = {finding["name"]: finding["verdict"] for finding in told["findings"]}
    assert list(verdicts) == list(probe_host.PROBES)
    assert {name for name, verdict in verdicts.items() if verdict != "fine"} <= MACHINES_OWN
    assert status == int(told["verdict"] != "fine")
    assert all(finding["measured"] for finding in told["findings"])
    assert os.listdir(tmp_path) == ["exp"]


def test_the_table_says_what_runmgr_does_and_what_to_fix(tmp_path):
    """With flock refused in the whole program."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import errno, syscalls; from runmgr import cli; syscalls.deny('flock', error=errno.ENOLCK)\n"
        f"sys.exit(cli.main(['doctor', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=clean_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    row = next(index for index, line in enumerate(lines) if line.startswith("worse   locks "))
    assert lines[row].endswith("flock fails: No locks available")
    assert "runmgr: run ids are claimed by mkdir alone: unique, but no order" in lines[row + 1]
    assert lines[row + 2].strip().startswith("fix: ")
    assert max(map(len, lines)) < 160
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "calls", "error", "verdict", "measured"),
    [
        ("locks", ("flock",), errno.ENOSYS, "worse", "flock fails: Function not implemented"),
        ("locks", ("flock",), 0, "worse", "two processes held one lock at once"),
        ("locks", ("flock",), errno.EWOULDBLOCK, "worse", "stays held"),
        ("hard links", ("link", "linkat"), errno.EPERM, "worse", "fail: Operation not permitted"),
        ("hard links", ("link", "linkat"), errno.EMLINK, "worse", "fail: Too many links"),
        ("rename", ("rename", "renameat", "renameat2"), errno.EEXIST, "unsafe", "over an existing name fails"),
        ("rename", ("rename", "renameat", "renameat2"), 0, "unsafe", "still holds what was replaced"),
        ("rename", ("unlink", "unlinkat"), errno.EACCES, "worse", "a read-only file cannot be removed"),
        ("directory fsync", ("fsync",), errno.EINVAL, "worse", "fails: Invalid argument"),
        ("directory fsync", ("fsync",), errno.EIO, "unsafe", "fails: Input/output error"),
        ("fsync", ("fsync",), errno.EIO, "unsafe", "failed: Input/output error"),
        ("bandwidth", ("fsync",), errno.ENOSPC, "unsafe", "failed: No space left on device"),
        ("server clock", ("utimensat",), errno.EPERM, "unsafe", "failed: Operation not permitted"),
    ],
)
def test_each_fault_is_found(tmp_path, name, calls, error, verdict, measured):
    def look():
        deny(*calls, error=error)
        return _find(tmp_path, name)[name]

    finding = in_child(look)
    assert (finding.name, finding.verdict) == (name, verdict), finding
    assert measured in finding.measured
    assert finding.consequence
    assert finding.advice


def test_two_winners_of_one_name_are_found(tmp_path):
    """mkdir says that it made what it did not: every rival believes to have won."""

    def look():
        own = tmp_path / "mkdir"
        own.mkdir()
        deny("mkdir", "mkdirat", error=0)
        return probe_host._mkdir(own)

    finding = in_child(look)
    assert finding.verdict == "unsafe"
    assert finding.figures["two_winners"] == finding.figures["names"] == 50
    assert "two launches can get one run directory" in finding.consequence


def test_names_without_a_winner_and_other_errors_of_losers_are_told_but_fine():
    finding = probe.judge_race("mkdir", [(3, [0, 2], [errno.EEXIST]), (3, [], [errno.EPERM])], "2 hosts")
    assert finding.verdict == "fine"
    said = "2 hosts, 3 names: 2 with one winner, 1 with none (the next id is tried); losers are told Operation not permitted"
    assert finding.measured == said


def test_little_space_slow_disks_and_wrong_clocks_are_found(tmp_path, monkeypatch):
    space = os.statvfs_result((4096, 4096, 1000, 1000, 1000, 500, 500, 500, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: space)
    true_clock = time.time
    monkeypatch.setattr(time, "time", lambda: true_clock() - 3600)
    monkeypatch.setattr(probe_host, "_SLOW_SYNC_S", 0.0)
    monkeypatch.setattr(probe_host, "_SLOW_WRITE", 1e15)
    found = _find(tmp_path, "space", "server clock", "fsync", "bandwidth")
    assert {name: finding.verdict for name, finding in found.items()} == dict.fromkeys(found, "worse")
    assert abs(found["server clock"].figures["offset_s"] - 3600) < 1
    assert found["space"].measured == "0.0041 GB free, 500 files"


@pytest.mark.parametrize(
    ("mountinfo", "verdict"),
    [
        ("25 1 0:9 / {} rw - tmpfs tmpfs rw", "unsafe"),
        ("25 1 0:9 / {} rw - overlay overlay rw", "worse"),
        ("25 1 0:9 / {} rw - nfs4 a:/b rw,soft", "worse"),
        ("25 1 0:9 / {} rw - nfs4 a:/b rw,hard", "fine"),
        ("24 1 0:8 / {} rw - tmpfs tmpfs rw\n25 1 0:9 / {} rw - xfs /dev/sdb rw", "fine"),
    ],
)
def test_a_file_system_that_keeps_nothing_is_found(tmp_path, monkeypatch, mountinfo, verdict):
    place = tmp_path / "a b"
    place.mkdir()
    text = "1 0 0:1 / / rw - ext4 /dev/sda rw\n" + mountinfo.format(*[str(place).replace(" ", "\\040")] * 2)
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    assert probe_host._file_system(place).verdict == verdict


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after_ctrl_c_or_a_kill(tmp_path, signal_number, delay_s):
    environment = clean_environment()
    process = subprocess.Popen(
        [*DOCTOR, tmp_path], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    with process:
        while not (found := list(tmp_path.glob(".runmgr-doctor-*/*"))):
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(delay_s)
        os.killpg(process.pid, signal_number)
        process.communicate(timeout=120)
    assert process.returncode == (130 if signal_number == signal.SIGINT else -signal_number)
    assert found
    deadline = time.monotonic() + 60
    while os.listdir(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.listdir(tmp_path) == []


def test_a_path_that_cannot_be_used_is_one_clear_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    for name, said in (("missing", "does not exist on host"), ("file", "is not a directory on host")):
        assert cli.main(["doctor", str(tmp_path / name)]) == 1
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert f"{tmp_path / name} {said}" in err

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", read_only)
    assert cli.main(["doctor", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"nothing can be created in {tmp_path}" in err
    assert "Read-only file system" in err


def _as_rank(folder, rank, size, host, **more):
    """Start `runmgr doctor` as one rank on a host of that name."""
    code = f"import socket, sys; socket.gethostname = lambda: {host!r}\nfrom runmgr import cli; sys.exit(cli.main())"
    environ = clean_environment(RANK=str(rank), WORLD_SIZE=str(size), MASTER_PORT="1", **more)
    argv = [sys.executable, "-c", code, "doctor", folder, "--json"]
    return subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ranks_of_two_hosts_meet_in_the_directory_and_end_with_one_status(tmp_path):
    """Two names for this host play two; ranks that do not speak for their host leave at once."""
    places = [("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")]
    started = [_as_rank(tmp_path, rank, 4, host, LOCAL_RANK=local) for rank, (host, local) in enumerate(places)]
    (out, _), *others = [process.communicate(timeout=240) for process in started]
    told = json.loads(out)
    assert told["hosts"] == ["a", "b"]
    found = {finding["name"]: finding["verdict"] for finding in told["findings"]}
    for name in (
        "shared",
        "new name",
        "clocks",
        "late name",
        "replaced file",
        "locks between hosts",
        "mkdir between hosts",
    ):
        assert found[name] == "fine"
    status = int(told["verdict"] != "fine")
    assert [process.returncode for process in started] == [status, 0, status, 0]
    assert others == [("", "")] * 3
    assert os.listdir(tmp_path) == []


def test_a_directory_that_an_earlier_doctor_left_is_not_taken_for_rank_0s(tmp_path):
    word = ranks.step_word({"RANK": "1", "MASTER_PORT": "1"})
    stale = tmp_path / f"{probe.PREFIX}{word}0123456789ab"
    stale.mkdir()
    (stale / "plan").write_text('{"nonces": {"1": "another"}, "peers": [1]}')
    started = [_as_rank(tmp_path, rank, 2, host) for rank, host in enumerate("ab")]
    (out, _), _ = [process.communicate(timeout=240) for process in started]
    assert json.loads(out)["hosts"] == ["a", "b"]
    assert os.listdir(tmp_path) == [stale.name]


def test_a_rank_that_sees_nothing_of_rank_0_says_where_it_looked(tmp_path):
    here = ranks.Ranks(1, 2, 0, "node-b", "a test")
    with pytest.raises(
        probe_hosts.NotShared, match=rf"host node-b \(rank 1\) does not share {tmp_path} with rank 0"
    ) as told:
        probe_hosts.follow(tmp_path, "word-", here, limit_s=0.2)
    assert (told.value.host, told.value.path) == ("node-b", str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_the_word_of_a_step_is_one_for_its_processes_and_another_for_other_steps():
    torchrun = {"RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}
    word = ranks.step_word(torchrun)
    assert word == ranks.step_word(torchrun | {"RANK": "7", "SLURM_STEP_ID": "3"})
    assert word != ranks.step_word(torchrun | {"MASTER_PORT": "2"})
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}
    assert ranks.step_word(slurm) != ranks.step_word(slurm | {"SLURM_STEP_ID": "1"})
    assert set(torchrun) <= {*LAUNCH_VARIABLES}
