"""Two hosts that want one run: exactly one gets it, and a rank 0 whose network was cut changes nothing when it is healed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import contextmanager

import inside
import pytest
import torch
import zombies
from hosts import SHARED, hosts

import runmgr
from runmgr.disk import atomic, directory, record
from runmgr.disk import lease as leases

pytestmark = [
    pytest.mark.needs("root"), pytest.mark.needs("nsenter"), pytest.mark.needs("ip"), pytest.mark.needs("nft"),
    pytest.mark.needs("glusterd"), pytest.mark.long, pytest.mark.timeout(900),
]  # fmt: skip
ROUNDS = 50
SHORT_LEASES = 4
HOUR_S = 3600.0


def shift_clock(by_s):
    """Let this process read a clock of its own, and write it where it touches a file: each host has its own."""
    seconds, nanoseconds, utime = time.time, time.time_ns, os.utime
    time.time = lambda: seconds() + by_s
    time.time_ns = lambda: nanoseconds() + int(by_s) * 10**9
    os.utime = lambda path, times=None, **more: utime(path, times or (time.time(), time.time()), **more)


def resume(told, run_id, go_at, clock_s, hold_on):
    """Resume the run at a given moment, with a clock that is wrong; tells what came of it, and how long it took."""
    shift_clock(clock_s)
    time.sleep(max(0.0, go_at - time.monotonic()))
    start = time.monotonic()
    try:
        with runmgr.start_run("rivals", run_id=run_id) as run:
            told(json.dumps(["won", run.attempt, time.monotonic() - start]) + "\n")
            run.restore({})
            os.read(hold_on, 1)  # until the other has lost, or as long as it lives
            run.save({"who": torch.tensor(run.attempt)}, epoch=run.attempt)
            told("saved\n")
    except runmgr.RunBusy as busy:
        told(json.dumps(["busy", busy.holder, time.monotonic() - start]) + "\n")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Three hosts that share a GlusterFS volume; the third has the disk as well."""
    with hosts(3, tmp_path_factory.mktemp("hosts")) as made:
        made.share_by_gluster([1, 2, 3], 3)
        yield made


def new_run():
    with runmgr.start_run("rivals") as run:
        run.save({"who": torch.tensor(1)}, epoch=1)
        return run.run_id


class Rivals:
    """Two that resume a run at the same instant, from hosts 1 and 2."""

    def __init__(self, cluster, run_id):
        self.hold_on, self.let_go = os.pipe()
        go_at = time.monotonic() + 0.1
        self.children = [
            inside.start(cluster, number, resume, run_id, go_at, clock_s, self.hold_on)
            for number, clock_s in ((1, HOUR_S), (2, -HOUR_S))
        ]

    def outcome(self):
        """Return (the winner, its attempt and seconds, the loser's message and seconds); fails unless one wins, one loses."""
        told = [json.loads(child.read_until(lambda text: "\n" in text).splitlines()[0]) for child in self.children]
        assert sorted(word for word, *_ in told) == ["busy", "won"], told
        winner = next(child for child, (word, *_) in zip(self.children, told, strict=True) if word == "won")
        _, (_, attempt, won_s) = sorted(told, key=lambda words: words[0])
        (_, holder, lost_s), _ = sorted(told, key=lambda words: words[0])
        assert holder.startswith(f"pid {winner.pid} on host host{self.children.index(winner) + 1}"), (holder, told)
        return winner, attempt, won_s, lost_s

    def let_end(self, winner):
        """Let the winner save and end its run."""
        os.write(self.let_go, b"x")
        winner.read_until(lambda text: "saved" in text)
        winner.read_rest()

    def end(self):
        os.close(self.let_go)
        for child in self.children:
            child.end()
        os.close(self.hold_on)


@contextmanager
def rivals(cluster, run_id):
    made = Rivals(cluster, run_id)
    try:
        yield made
    finally:
        made.end()


def test_of_two_that_resume_a_run_at_once_exactly_one_goes_on(cluster):
    """Half the winners end well; the others are killed and leave their mark, for the next two to find."""
    dice = random.Random(4)
    run_id = inside.call(cluster, 1, new_run)
    losses_s = []
    for number in range(ROUNDS):
        with rivals(cluster, run_id) as both:
            winner, attempt, _, lost_s = both.outcome()
            assert attempt == number + 2, "the loser began none"
            losses_s.append(lost_s)
            if dice.random() < 0.5:
                both.let_end(winner)
    print(f"{ROUNDS} rounds: the slowest loser knew after {max(losses_s):.1f} s")
    assert max(losses_s) < 10
    assert inside.call(cluster, 2, attempts_in, run_id) == str(list(range(1, ROUNDS + 2)))


def hold(told, run_id):
    """Be the writer, and never end."""
    with runmgr.start_run("rivals", run_id=run_id):
        told("holds\n")
        time.sleep(3600)


def test_of_two_that_watch_a_silent_holder_for_one_lease_exactly_one_goes_on(cluster, monkeypatch):
    """Once with the real lease; then with short ones, since the moment at which both judge is the dangerous one."""
    run_id = inside.call(cluster, 1, new_run)
    for number, (lease_s, heartbeat_s) in enumerate([(30.0, 5.0)] + [(3.0, 0.5)] * SHORT_LEASES):
        monkeypatch.setattr(record, "LEASE_S", lease_s)
        monkeypatch.setattr(leases, "_HEARTBEAT_S", heartbeat_s)
        holder = inside.start(cluster, 3, hold, run_id)
        with inside.ended([holder]):
            holder.read_until(lambda text: "\n" in text)
            os.kill(holder.pid, signal.SIGSTOP)
            time.sleep(1.5)  # a client may show its last sign of life for a second
            with rivals(cluster, run_id) as both:
                winner, attempt, won_s, lost_s = both.outcome()
                both.let_end(winner)
        assert attempt == 2 * number + 3
        assert lease_s < won_s < lease_s + 25, "after one lease, not after a second"
        assert lost_s < lease_s + 25


def attempts_in(run_id):
    return record.attempt_numbers(directory.RunDirectory(SHARED / "rivals" / run_id))


def save_slowly(told, launch, moment):
    """As the first of `zombies`, but from the fifth save on time passes before it commits, or before it swings a name."""
    home, name = {"commit": (record.Attempt, "write"), "swing": (atomic, "point_name")}[moment]
    true, epochs = getattr(home, name), []

    def slow(*args):
        if len(epochs) >= 4:
            told("slow ")
            time.sleep(0.5)
        true(*args)

    def tell(text):
        epochs.append(text)
        told(text)

    setattr(home, name, slow)
    zombies.save_until_superseded(tell, launch)


def newest_run():
    return max((SHARED / "zombies").glob("RUN_*")).name


def who_is_latest(run):
    return zombies.who_saved(run.public_path("latest"))[0]


@pytest.mark.parametrize("moment", ["commit", "swing", *range(6)])
def test_a_rank_0_whose_network_was_cut_changes_nothing_when_it_is_healed(cluster, moment):
    launch = f"launch-{moment}"
    is_slow = isinstance(moment, str)
    go_on, wake = os.pipe()
    job = (save_slowly, launch, moment) if is_slow else (zombies.save_until_superseded, launch)
    first = inside.start(cluster, 1, *job)
    second = inside.start(cluster, 2, after_a_word, go_on, launch)
    with inside.ended([first, second]):
        try:
            first.read_until(lambda text: "slow" in text if is_slow else text.count(" ") >= 3)
            time.sleep(0 if is_slow else random.Random(moment).random() / 5)
            inside.cut(cluster, 1)
            os.write(wake, b"x")
            start = int(second.read_until(lambda text: "took over" in text).split()[0])
            run = directory.RunDirectory(SHARED / "zombies" / inside.call(cluster, 2, newest_run))
            inside.heal(cluster)
            *reported, end = first.read_rest().replace("slow ", "").split(" ")
            assert end == "Superseded", first.text
            assert start - 1 <= max(map(int, reported)) <= start
            inside.call(cluster, 2, zombies.check_what_counts, run, start)
            if moment == "swing":
                assert inside.call(cluster, 3, who_is_latest, run) == "first", "so there is something to repair"
            os.write(wake, b"x")
            second.read_until(lambda text: text.endswith("\n"))
            inside.call(cluster, 3, zombies.check_names, run, start + 3)
        finally:
            inside.heal(cluster)
            os.close(wake)
            os.close(go_on)
    late = int(inside.call(cluster, 3, zombies.restore_once_more, run.run_id, start + 3))
    assert late or moment != "commit", "so there was something to disregard"


def after_a_word(told, go_on, launch):
    os.read(go_on, 1)
    zombies.take_over(told, launch, go_on)
