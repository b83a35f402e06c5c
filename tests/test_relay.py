"""SIGUSR1 and SIGUSR2 to torchrun reach the ranks, and end nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from processes import clean_environment, descendants

from runmgr import relay

LISTENER = """
import os, signal, sys, time
heard = []
time.sleep(float(sys.argv[2]) * (1 + int(os.environ["RANK"])))  # one listens later than the other
signal.signal(getattr(signal, sys.argv[1]), lambda *_: heard.append(1))
deadline = time.monotonic() + 120
while not heard and time.monotonic() < deadline:
    time.sleep(0.01)
os.write(1, f"rank {os.environ['RANK']} heard {bool(heard)}\\n".encode())  # one piece
"""


def start(script, *arguments, options=()):
    return subprocess.Popen(
        [sys.executable, "-m", "runmgr.relay", "--standalone", "--nproc-per-node=2", *options, str(script), *arguments],
        env=clean_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_a_signal_to_torchrun_reaches_its_ranks_even_before_they_listen(name, tmp_path):
    script = tmp_path / "listener.py"
    script.write_text(LISTENER)
    with start(script, name, "0.7") as agent:
        wait_until(lambda: len(descendants(agent.pid)) >= 2)
        agent.send_signal(getattr(signal, name))
        out, err = agent.communicate(timeout=180)
    assert agent.returncode == 0, err
    assert sorted(out.splitlines()) == ["rank 0 heard True", "rank 1 heard True"]


def test_a_signal_goes_to_the_nearest_descendants_that_catch_it_and_to_no_other(tmp_path):
    inner = "import signal, time; signal.signal(signal.SIGUSR1, lambda *_: print('inner', flush=True)); time.sleep(30)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True) as process:
        try:
            told = set()
            wait_until(lambda: relay.offer(signal.SIGUSR1, os.getpid(), told) or told)
            assert process.stdout.readline() == "inner\n"
            assert process.poll() is None
            assert told == {process.pid}
            nobody = set()
            assert not relay.offer(signal.SIGUSR2, os.getpid(), nobody)
            assert not nobody
        finally:
            for pid in [*descendants(process.pid), process.pid]:
                os.kill(pid, signal.SIGKILL)
