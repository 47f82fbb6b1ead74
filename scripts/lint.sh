#!/usr/bin/env bash
# make lint: check the style of Python (ruff) and bash (shellcheck).
. "$(dirname "$0")/lib.sh"

need_python
"$PYTHON" -m ruff check .
PATH=$(dirname "$PYTHON"):$PATH # for Linux on arm64 shellcheck has no wheel
shellcheck -x scripts/*.sh .ci/run
echo "shellcheck: clean"
