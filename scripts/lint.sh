#!/usr/bin/env bash
# Check the style of Python (ruff) and bash (shellcheck).
#
# usage: make lint
#
# exit: 0 clean · 1 not clean, or a tool is missing
. "$(dirname "$0")/lib.sh"

need_python
"$PYTHON" -m ruff check .
shellcheck=$(dirname "$PYTHON")/shellcheck
[ -x "$shellcheck" ] || shellcheck=shellcheck
if command -v "$shellcheck" >/dev/null; then
  "$shellcheck" -x scripts/*.sh tests/*.sh .ci/run
  echo "shellcheck: clean"
elif [ "$(uname -sm)" = "Linux aarch64" ]; then
  say "note: shellcheck has no wheel for this machine and is not on the PATH; the scripts were not checked"
else
  die "shellcheck is missing: install it, or unset PYTHON and the project's environment brings it"
fi
