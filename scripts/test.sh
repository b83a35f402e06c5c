#!/usr/bin/env bash
# Check and test, without a GPU: bash scripts/test.sh [pytest arguments]
# The tests wait for processes most of the time, so three run at once; a file's tests stay together. -n 0: one at a time.
# RUNMGR_THOROUGH=1 makes the tests that can do more do it; it and `-m "long or scales"` are what CI adds.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
extra=test modules=(torch tensorboard filelock rich plotille shtab psutil pynvml sklearn tqdm sphinx myst_parser furo pytest pytest_timeout xdist hypothesis hydra ipykernel ruff mypy)
if [ -n "${RUNMGR_THOROUGH:-}" ]; then extra=browser,wandb modules+=(playwright wandb); fi
setup "$extra" "${modules[@]}"
cd "$repository"
unset PYTHONDONTWRITEBYTECODE # else hundreds of interpreters compile the package anew
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest --numprocesses=3 --dist=loadscope --no-loadscope-reorder "$@"
