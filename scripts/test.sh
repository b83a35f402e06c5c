#!/usr/bin/env bash
# Check and test, without a GPU: bash scripts/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup test torch tensorboard filelock sklearn tqdm pytest pytest_timeout hypothesis hydra ruff mypy
cd "$repository"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest "$@"
