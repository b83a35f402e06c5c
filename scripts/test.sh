#!/usr/bin/env bash
# Check and test, without a GPU: bash scripts/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
extra=test modules=(torch tensorboard filelock sklearn tqdm pytest pytest_timeout hypothesis ruff mypy)
if [ -n "${RUNMGR_BROWSER:-}" ]; then extra=browser modules+=(playwright); fi # tests/browser, which the plain tests skip
setup "$extra" "${modules[@]}"
cd "$repository"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest "$@"
