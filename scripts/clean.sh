#!/usr/bin/env bash
# Remove what can be built again: the environment and caches. Results stay.
#
# usage: make clean
#
# results.tsv, data/, internal/, run.log and the prepared datasets are never touched.
. "$(dirname "$0")/lib.sh"

rm -rf .venv .pytest_cache .ruff_cache .hypothesis
find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
