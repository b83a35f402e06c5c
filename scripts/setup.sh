# Sourced by launch.sh and test.sh: `setup EXTRA MODULE…` sets $python to an interpreter that has MODULE…, which is
# the active one if it does, else that of .venv, made or mended here through constraints.txt.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"

has() { # PYTHON MODULE…: is it 3.11 or newer, and could it import all of them?
  "$1" - "${@:2}" >/dev/null 2>&1 <<'PYTHON'
import sys
from importlib.util import find_spec
sys.exit(sys.version_info < (3, 11) or any(find_spec(name) is None for name in sys.argv[1:]))
PYTHON
}

setup() { # EXTRA MODULE…
  local extra=$1 candidate
  shift
  for python in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" python3 "$repository/.venv/bin/python"; do
    if [ -n "$python" ] && has "$python" "$@"; then return; fi
  done
  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    if has "$candidate"; then break; fi
    candidate=
  done
  if [ -z "${candidate:-}" ]; then
    echo "runmgr needs Python 3.11 or newer; none of python3, python3.14 … python3.11 on PATH is. Install one." >&2
    return 1
  fi
  python="$repository/.venv/bin/python"
  echo "setting up $repository/.venv (once)" >&2
  ( # two first starts at once: the second waits
    if command -v flock >/dev/null; then exec 9>"$repository/.venv.lock"; flock 9; fi
    if ! has "$python" "$@"; then
      has "$python" || "$candidate" -m venv --clear "$repository/.venv"
      "$python" -m pip install --quiet --disable-pip-version-check --constraint "$repository/constraints.txt" \
        --editable "$repository[$extra]" >&2
    fi
  )
}
