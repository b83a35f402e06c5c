#!/usr/bin/env bash
# Make the site: bash scripts/docs.sh [DIRECTORY]. A reference that leads nowhere is an error.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup docs torch tensorboard filelock sphinx myst_parser furo
site=$(realpath -m "${1:-$repository/build/site}")
"$python" -m sphinx --fail-on-warning --nitpicky --keep-going --quiet --builder html --conf-dir "$repository/docs" "$repository" "$site"
echo "$site/index.html"
