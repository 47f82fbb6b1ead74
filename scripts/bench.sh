#!/usr/bin/env bash
# make bench [WAIT=1]: profile the present train.py on this machine; archived in data/bench_*.json.
. "$(dirname "$0")/lib.sh"

export_settings
exec "$PYTHON" -m scripts.run.lock -- "${LAUNCH[@]}" bench.py
