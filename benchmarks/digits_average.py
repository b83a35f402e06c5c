"""Whether averaging the ten best epochs helps: the demo with five seeds, chosen on validation, measured on test.

python benchmarks/digits_average.py [--seeds 5] [--epochs 30] [--ranks 2]
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile


def main() -> None:
    """Train and print each seed's pair, and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    given = parser.parse_args()
    pairs = []
    print("seed   last epoch, %   average of the ten best, %")
    for seed in range(given.seeds):
        with tempfile.TemporaryDirectory() as root:
            pairs.append(_train(seed, given, root))
        print(f"{seed:<7}{pairs[-1][0]:<16.2f}{pairs[-1][1]:.2f}", flush=True)
    last, averaged = (statistics.mean(column) for column in zip(*pairs, strict=True))
    print(f"mean   {last:<16.2f}{averaged:.2f}")


def _train(seed: int, given: argparse.Namespace, root: str) -> tuple[float, float]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.ranks}",
        "-m", "runmgr.examples.digits", f"--seed={seed}", f"--epochs={given.epochs}",
    ]  # fmt: skip
    environ = os.environ | {"RUNMGR_CKPT_ROOT_DIR": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = re.search(r"test accuracy: ([\d.]+)% after the last epoch, ([\d.]+)% for the BestAverage", done.stdout)
    assert found is not None, done.stdout
    return float(found[1]), float(found[2])


if __name__ == "__main__":
    main()
