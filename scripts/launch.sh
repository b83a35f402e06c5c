#!/usr/bin/env bash
# Train: bash scripts/launch.sh [--dry-run] [torchrun options] [script.py [args] | -m module [args]]
# Without a script it runs the demo on all local GPUs, or with two processes on the CPU. --help says more.
# Under Slurm: sbatch [options] scripts/launch.sh …, or the same inside salloc or srun.
scripts=$(dirname "${BASH_SOURCE[0]}")
if [ ! -e "$scripts/setup.sh" ] && [ -n "${SLURM_JOB_ID:-}" ]; then # sbatch runs a copy; Slurm knows of what
  scripts=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=||p')
  scripts=${scripts%%/launch.sh*}
  if [ ! -e "$scripts/setup.sh" ]; then scripts=${SLURM_SUBMIT_DIR:-.}/scripts; fi
fi
source "$scripts/setup.sh"
case "${1:-}" in
  -h | --help) setup examples ;; # needs a Python, nothing to install
  *) setup examples torch tensorboard filelock rich plotille shtab sklearn tqdm ;;
esac
exec "$python" -m runmgr.launch "$@"
