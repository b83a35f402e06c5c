#!/usr/bin/env bash
# Check and test, without a GPU: bash scripts/test.sh [pytest arguments]
# The tests wait for processes most of the time, so three run at once; a file's tests stay together. -n 0: one at a time.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
extra=test modules=(torch tensorboard filelock rich plotille shtab psutil pynvml sklearn tqdm sphinx myst_parser furo pytest pytest_timeout xdist hypothesis hydra ipykernel ruff mypy)
if [ -n "${RUNMGR_BROWSER:-}" ]; then extra=browser modules+=(playwright); fi # tests/browser, which the plain tests skip
if [ -n "${RUNMGR_WANDB:-}" ]; then extra+=,wandb modules+=(wandb); fi          # docs/how-to/wandb.md, likewise
setup "$extra" "${modules[@]}"
cd "$repository"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder "$@"
