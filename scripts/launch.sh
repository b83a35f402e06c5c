#!/usr/bin/env bash
# Train: bash scripts/launch.sh [--dry-run] [torchrun options] [script.py [args] | -m module [args]]
# Without a script it runs the demo on all local GPUs, or with two processes on the CPU. --help says more.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
case "${1:-}" in
  -h | --help) setup examples ;; # needs a Python, nothing to install
  *) setup examples torch tensorboard filelock sklearn tqdm ;;
esac
exec "$python" -m runmgr.launch "$@"
