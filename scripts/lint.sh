#!/usr/bin/env bash
# make lint: check the style of Python (ruff) and bash (shellcheck).
. "$(dirname "$0")/lib.sh"

need_python
"$PYTHON" -m ruff check .
shellcheck=$(dirname "$PYTHON")/shellcheck
[ -x "$shellcheck" ] || shellcheck=shellcheck # for Linux on arm64 there is no wheel
"$shellcheck" -x scripts/*.sh tests/*.sh .ci/run
echo "shellcheck: clean"
