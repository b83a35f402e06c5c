"""Start-up of the command line: `python -m runmgr.cli latest` against a bare interpreter.

    python benchmarks/cli.py [--rounds 31]

The limit is `python -c pass`: nothing that starts an interpreter can be faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BARE = [sys.executable, "-c", "pass"]
COMMANDS = {
    "bare interpreter": BARE,
    "runmgr latest": [sys.executable, "-m", "runmgr.cli", "latest", "experiment"],
    "runmgr ls": [sys.executable, "-m", "runmgr.cli", "ls", "experiment"],
    "runmgr show": [sys.executable, "-m", "runmgr.cli", "show", "experiment"],
}


def seconds(command: list[str], environ: dict[str, str]) -> float:
    """How long one command takes, from its start to its end."""
    start = time.perf_counter()
    subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    """Run all commands in turn, again and again, and print medians, spread and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as root:
        for number in range(20):
            run = Path(root, "experiment", f"RUN_20260101_0000{number:02d}_000000")
            run.mkdir(parents=True)
            (run / "ckpt_latest.pth").touch()
        environ = os.environ | {"RUNMGR_CKPT_ROOT_DIR": root, "PYTHONPYCACHEPREFIX": f"{root}/byte code"}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed has its byte code
        times: dict[str, list[float]] = {name: [] for name in COMMANDS}
        for number in range(rounds + 2):
            for name, command in COMMANDS.items():
                took = seconds(command, environ)
                if number >= 2:  # the first rounds write byte code and warm the page cache
                    times[name].append(took * 1000)
    print(f"python {sys.version.split()[0]}, {os.cpu_count()} cores, {rounds} interleaved rounds")
    print(f"{'':<18}{'median ms':>11}{'quartiles':>16}{'ratio':>8}")
    bare = statistics.median(times["bare interpreter"])
    for name, taken in times.items():
        low, median, high = statistics.quantiles(taken, n=4)
        print(f"{name:<18}{median:>11.1f}{f'{low:.1f} to {high:.1f}':>16}{median / bare:>8.2f}")


if __name__ == "__main__":
    main()
