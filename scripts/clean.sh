#!/usr/bin/env bash
# make clean: remove what can be built again, the environment and caches; never results, nor prepared datasets.
. "$(dirname "$0")/lib.sh"

rm -rf .venv .pytest_cache .ruff_cache .hypothesis
find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
