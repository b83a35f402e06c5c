"""A captured console: everything that was written is in the file, whatever ended the process, and the terminal shows it."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
from kernels import kernel
from processes import clean_environment, run, torchrun
from worker.faults import fill, small_disk

import runmgr
from runmgr.worker import console

LIBC = ctypes.CDLL(None)
BLOCK = ctypes.create_string_buffer(1 << 13)


class Ended(NamedTuple):
    out: str
    err: str
    status: int  # negative: the signal that ended it


def trained(body, *args, both=False, terminal=False, closed=(), until=None, timeout_s=60.0) -> Ended:
    """Run `body` in a process whose standard output and error are pipes (one for both, or a terminal); all it showed.

    `until(text)` says when to stop reading and close the pipes instead of waiting for the end.
    """
    outs = pty.openpty() if terminal else os.pipe()
    errs = outs if both or terminal else os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            faulthandler.disable()  # pytest's
            LIBC.setvbuf(ctypes.c_void_p.in_dll(LIBC, "stdout"), BLOCK, 0, len(BLOCK))  # in blocks, as in a batch job
            os.dup2(outs[1], 1)
            os.dup2(errs[1], 2)
            for descriptor in {*outs, *errs}:
                os.close(descriptor)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # in blocks, where it is no terminal
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            for descriptor in closed:
                os.close(descriptor)
                if descriptor == 1:
                    sys.stdout = sys.__stdout__ = None
            body(*args)
            status = 0
        except BaseException:  # noqa: BLE001  # as the interpreter does
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, AttributeError):
                sys.stdout.flush()
            os._exit(status)
    for descriptor in {outs[1], errs[1]}:
        os.close(descriptor)
    try:
        texts = _read(dict.fromkeys([outs[0], errs[0]], b""), until, time.monotonic() + timeout_s)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(pid, 0)
    return Ended(texts[outs[0]].decode(), texts[errs[0]].decode(), os.waitstatus_to_exitcode(status))


def _read(texts, until, deadline) -> dict[int, bytes]:
    left = set(texts)
    while left and not (until and until(b"".join(texts.values()).decode())):
        ready = select.select(list(left), [], [], max(0.0, deadline - time.monotonic()))[0]
        assert ready, texts
        for descriptor in ready:
            try:
                part = os.read(descriptor, 1 << 16)
            except OSError:  # a terminal that everybody has closed
                part = b""
            texts[descriptor] += part
            if not part:
                left.discard(descriptor)
    for descriptor in texts:
        os.close(descriptor)
    return texts


def consoles(root) -> dict[int, str]:
    """rank → what its console log holds, several attempts and runs one after another."""
    found: dict[int, str] = {}
    for path in sorted(root.glob("*/RUN_*/console_*.txt")):
        rank = int((re.findall(r"_rank(\d+)\.txt", path.name) or [0])[0])
        found[rank] = found.get(rank, "") + path.read_bytes().decode()
    return found


def start(**options):
    return runmgr.start_run("x", capture_console=True, **options)


def make_noise():
    print("from print")
    print("to stderr", file=sys.stderr)
    LIBC.puts(b"from C's buffer")
    os.write(2, b"straight to the descriptor\n")
    subprocess.run(["echo", "from a child"])
    if not os.fork():
        print("from a fork", flush=True)
        os._exit(0)
    os.wait()
    sys.stderr.write("\r 10%\r100%")
    sys.stdout.buffer.write(b" junk: \x00\x1b[1m\n")


NOISE = (
    "from print\nto stderr\nfrom C's buffer\nstraight to the descriptor\nfrom a child\nfrom a fork\n"
    "\r 10%\r100% junk: \x00\x1b[1m\n"
)


def test_python_c_children_and_forks_are_captured_in_their_order_and_shown(root):
    def body():
        print("before")
        with start():
            make_noise()
        print("after")

    shown = trained(body, both=True)
    assert (shown.out, shown.status) == ("before\n" + NOISE + "after\n", 0)
    assert consoles(root) == {0: NOISE}
    (path,) = root.glob("x/RUN_*/console_*.txt")
    assert path.name == next(path.parent.glob("log_*.txt")).name.replace("log_", "console_")


def test_output_and_error_that_lead_to_different_places_still_do(root):
    def body():
        with start():
            make_noise()

    out, err, _ = trained(body)
    assert out == "from print\nfrom C's buffer\nfrom a child\nfrom a fork\n junk: \x00\x1b[1m\n"
    assert err == "to stderr\nstraight to the descriptor\n\r 10%\r100%"
    assert sorted(consoles(root)[0]) == sorted(NOISE)


def test_a_terminal_stays_one(root):
    def body():
        with start():
            size = os.get_terminal_size(1)
            print(sys.stdout.isatty(), os.isatty(2), size.columns, "\r 50%\r100%")

    def on_a_terminal():
        import fcntl
        import struct
        import termios

        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("4H", 30, 123, 0, 0))
        body()

    assert trained(on_a_terminal, terminal=True).out == "True True 123 \r 50%\r100%\r\n"
    assert consoles(root) == {0: "True True 123 \r 50%\r100%\n"}


ENDS = {
    "abort": (LIBC.abort, -signal.SIGABRT),
    "kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
    "segfault": (lambda: ctypes.string_at(0), -signal.SIGSEGV),
    "exit": (lambda: os._exit(3), 3),
}


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("end", ENDS)
def test_a_crash_leaves_all_that_was_written_before_it(root, end, terminal):
    def body():
        start()
        for number in range(20_000):
            print(number)
        LIBC.puts(b"last")
        ENDS[end][0]()

    shown = trained(body, both=True, terminal=terminal)
    wanted = [*map(str, range(20_000)), "last"]
    assert shown.status == ENDS[end][1]
    assert [line for line in shown.out.splitlines() if line[:1].isdecimal() or line == "last"] == wanted
    assert [line for line in consoles(root)[0].splitlines() if line[:1].isdecimal() or line == "last"] == wanted


SCRIPT = """
import ctypes, os, sys
import torch.distributed as dist
import runmgr
dist.init_process_group("gloo")
run = runmgr.start_run("x", capture_console=True)
for number in range(1000):
    print("rank", run.rank, "line", number)
print("err", run.rank, file=sys.stderr)
dist.barrier()
ctypes.CDLL(None).puts(b"last")
ctypes.CDLL(None).abort() if run.rank else os.kill(os.getpid(), 9)
"""


def test_two_ranks_of_torchrun_that_die_leave_a_file_each_and_its_own_redirection_goes_on(tmp_path, root):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    options = ("--redirects", "3", "--tee", "3", "--log-dir", str(tmp_path / "logs"))
    done = torchrun(str(path), options=options, RUNMGR_CKPT_ROOT_DIR=str(root))
    assert done.returncode != 0
    found = consoles(root)
    assert sorted(found) == [0, 1]
    for rank in (0, 1):
        wanted = "".join(f"rank {rank} line {number}\n" for number in range(1000)) + "last\n"
        (out,) = (tmp_path / "logs").glob(f"*/attempt_0/{rank}/stdout.log")
        assert out.read_text() == wanted
        assert f"err {rank}\n" in out.with_name("stderr.log").read_text()
        assert "".join(line for line in found[rank].splitlines(True) if line in wanted.splitlines(True)) == wanted
        assert f"[default{rank}]:rank {rank} line 999" in done.stdout


def test_the_traceback_that_ends_a_run_ends_its_file(root):
    def body():
        with start():
            print("begun")
            raise ValueError("unlucky")

    shown = trained(body, both=True)
    assert shown.out.count("ValueError: unlucky") == consoles(root)[0].count("ValueError: unlucky") == 1
    assert consoles(root)[0].startswith("begun\nTraceback (most recent call last):\n")


def test_without_with_the_traceback_is_there_once_as_well(tmp_path, root):
    script = tmp_path / "script.py"
    script.write_text("import runmgr\nrunmgr.start_run('x', capture_console=True)\nraise ValueError('unlucky')\n")
    done = run(sys.executable, str(script), RUNMGR_CKPT_ROOT_DIR=str(root))
    assert done.stderr.count("Traceback") == consoles(root)[0].count("Traceback") == 1
    assert consoles(root)[0] == done.stderr


def _state():
    return sorted(os.listdir("/proc/self/fd")), os.fstat(1), os.fstat(2), sys.stdout.line_buffering


def _without_access_times(state):
    return state[0], *(status[:3] for status in state[1:3]), state[3]


def _has_child() -> bool:
    """Whether this process would have one to wait for, dead or alive."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def test_two_runs_of_one_process_have_their_own_files_and_leave_nothing_behind(root):
    def body():
        with runmgr.start_run("warm-up"):
            pass
        before = _without_access_times(_state())
        for number in (1, 2):
            with start():
                print("run", number)
            assert _without_access_times(_state()) == before
            print("between")
        with start():
            deadline = time.monotonic() + 30
            while _has_child():
                assert time.monotonic() < deadline, "a training may wait for all of its children"
                time.sleep(0.01)

    assert trained(body) == Ended("run 1\nbetween\nrun 2\nbetween\n", "", 0)
    assert [path.read_text() for path in sorted(root.glob("x/*/console_*"))] == ["run 1\n", "run 2\n"], (
        "none of the third"
    )


def test_a_child_that_outlives_the_run_is_not_disturbed_and_still_captured(root):
    def body():
        with start():
            child = subprocess.Popen(["sh", "-c", "read line; echo late $line"], stdin=subprocess.PIPE)
        print("ended", flush=True)
        child.communicate(b"and well\n")
        assert child.returncode == 0

    shown = trained(body)
    assert (sorted(shown.out.splitlines()), shown.err, shown.status) == (["ended", "late and well"], "", 0)
    assert consoles(root) == {0: "late and well\n"}


def test_a_program_that_replaces_the_process_is_shown(root):
    def body():
        start()
        print("before")
        os.execvp("echo", ["echo", "the next program"])

    assert trained(body) == Ended("before\nthe next program\n", "", 0)
    assert consoles(root) == {0: "before\nthe next program\n"}


def test_ctrl_c_hangup_and_termination_are_for_the_training_alone(root):
    """They come to whole process groups, and from Slurm to every process of a step."""

    def body():
        run = start()
        print("before", flush=True)
        for helper in _helpers(run):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                os.kill(helper, number)
            assert os.getsid(helper) != os.getsid(0)
        print("after")
        run.finish()

    assert trained(body) == Ended("before\nafter\n", "", 0)


def _helpers(run) -> list[int]:
    """The process that copies, once it is at work."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = []
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if process.name.isdecimal() and str(run.run_dir).encode() in (process / "cmdline").read_bytes():
                    parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                    found += [int(process.name)] if parent != os.getpid() else []
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError


@pytest.mark.parametrize("moment", ["while idle", "while it copies"])
def test_a_killed_helper_does_not_stop_the_training(root, moment):
    lines = 0 if moment == "while idle" else 60_000

    def body():
        run = start()
        helpers = _helpers(run)
        for number in range(lines):
            print("line", number)
        for helper in helpers:
            os.kill(helper, signal.SIGKILL)
        for number in range(lines, 160_000):
            print("line", number)
        run.finish()
        print("after")

    shown = trained(body)
    assert (shown.status, shown.out.splitlines()[-2:]) == (0, ["line 159999", "after"])
    (log,) = root.glob("x/RUN_*/log_*.txt")
    assert "the process that copies the console was killed" in log.read_text()
    wanted = [f"line {number}" for number in range(160_000)]
    found = [line for line in consoles(root)[0].splitlines() if not line.startswith("runmgr: ")]
    if lines:  # what it held in its hands is gone with it: 64 KiB at most
        assert (found[0], found[-1]) == (wanted[0], wanted[-1])
        assert sum(map(len, wanted)) - sum(map(len, found)) <= 1 << 16
    else:
        assert found == wanted


def test_without_a_process_to_be_had_the_training_goes_on_uncaptured(root, monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    before = _without_access_times(_state())
    with start():
        print("seen")
    assert _without_access_times(_state()) == before
    assert "are not captured: [Errno 2] No such file or directory" in caplog.text
    assert consoles(root) == {}


def test_closed_standard_input_is_no_obstacle_and_closed_output_is_told(root):
    path = root.parent / "console.txt"

    def body():
        captured = console.capture(path, logging.getLogger("x"))
        print("seen")
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(0)  # or input() would read from what took its number
        captured.close()

    assert trained(body, closed=(0,)) == Ended("seen\n", "", 0)
    assert path.read_text() == "seen\n"

    def silent():
        with start():
            pass

    assert trained(silent, closed=(1,)).status == 0
    log = max(root.glob("x/RUN_*/log_*.txt"))
    assert "standard output and error are not captured: [Errno 9] one of them was closed" in log.read_text()


def test_a_reader_that_goes_away_ends_the_copy_there_and_not_the_training(root):
    def body():
        with start():
            for number in range(100_000):
                print(number)

    trained(body, both=True, until=lambda text: "\n" in text)
    assert consoles(root)[0] == "".join(f"{number}\n" for number in range(100_000))


def test_a_full_disk_costs_what_has_no_room_and_is_told_once(tmp_path):
    with small_disk(tmp_path / "disk", 3 << 20) as disk:

        def body():
            with start(ckpt_root_dir=disk):
                print("begun")
                while not list(disk.glob("x/RUN_*/console_*.txt")):
                    time.sleep(0.01)
                time.sleep(0.01)
                ballast = fill(disk)
                for number in range(100_000):
                    print(number)
                time.sleep(0.2)
                ballast.unlink()
                print("there is room again")

        shown = trained(body)
        (path,) = disk.glob("x/RUN_*/console_*.txt")
        content = path.read_text()
    assert shown.out == "begun\n" + "".join(f"{n}\n" for n in range(100_000)) + "there is room again\n"
    assert shown.err.count("cannot be written: No space left on device") == 1
    assert content.startswith("begun\n")
    assert content.endswith("there is room again\n")
    (missing,) = re.findall(r"\[runmgr: (\d+) bytes are missing here: No space left on device\]\n", content)
    note = f"[runmgr: {missing} bytes are missing here: No space left on device]\n"
    assert len(content.replace(note, "").replace("\0", "")) + int(missing) == len(shown.out)


def test_python_streams_that_lead_elsewhere_are_named(root):
    def body():
        sys.stdout = io.StringIO()
        with start():
            print("into a notebook")
            os.write(1, b"from C++\n")

    assert trained(body).out == "from C++\n"
    assert consoles(root)[0].endswith("from C++\n")
    (log,) = root.glob("x/RUN_*/log_*.txt")
    assert "sys.stdout (StringIO) does not lead to the descriptors that are captured" in log.read_text()


@pytest.mark.needs("ipykernel")
def test_a_notebook_shows_once_what_it_prints_and_the_file_has_it_once(root, tmp_path):
    with kernel(tmp_path, clean_environment()) as notebook:
        told = notebook.run(
            "import os, sys, runmgr\nrun = runmgr.start_run('x', capture_console=True)\nprint('from Python')\n"
            "print('to stderr', file=sys.stderr)\nos.write(1, b'from C++\\n')\nos.system('echo from a child');"
        )
        told += notebook.run("!echo from a shell") + notebook.run("print('unfinished', end=''); run.finish()")
        shown = notebook.run("print('after the run'); sys.stdout")
        with_second = notebook.run("with runmgr.start_run('y', capture_console=True):\n    print('of y')\n    1 / 0")
    printed, under_it = ["from Python", "to stderr", "from a shell", "unfinished"], ["from C++", "from a child"]
    assert [told.count(line) for line in printed] == [1] * len(printed)
    x, y = (next(root.glob(f"{name}/RUN_*/console_*.txt")).read_text() for name in "xy")
    assert sorted(x.replace("\r", "").splitlines()) == sorted(printed + under_it)
    assert "OutStream" in shown
    assert "of y" in with_second
    assert y.startswith("of y\nTraceback (most recent call last):\n")
    assert y.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.long
@pytest.mark.needs("ipykernel")
def test_what_a_killed_kernel_printed_is_in_the_file(root, tmp_path):
    with kernel(tmp_path, clean_environment()) as notebook:
        notebook.run("import runmgr\nrun = runmgr.start_run('x', capture_console=True)\nprint('last words')")
        notebook.restart(now=True)  # SIGKILL
        deadline = time.monotonic() + 10
        while consoles(root) != {0: "last words\n"}:
            assert time.monotonic() < deadline, consoles(root)
            time.sleep(0.01)
