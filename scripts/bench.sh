#!/usr/bin/env bash
# Profile the present train.py on this machine; archived in data/bench_*.json.
#
# usage: make bench [WAIT=1]
#
# exit: 0 done · 1 refused or failed, and why
. "$(dirname "$0")/lib.sh"

read_git
need_python
export_settings
exec "$PYTHON" -m scripts.run.lock -- "${LAUNCH[@]}" bench.py
