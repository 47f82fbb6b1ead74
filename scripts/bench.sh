#!/usr/bin/env bash
# make bench [WAIT=1]: time the parts of a step of the present train.py; archived in data/bench_*.json.
# SCRIPT=probe.py: in its place a script of your own, in the environment of a run: without it a CPU is eight times slower.
. "$(dirname "$0")/lib.sh"

export_settings
exec "$PYTHON" -m scripts.run.lock -- "${LAUNCH[@]}" "${SCRIPT:-bench.py}"
