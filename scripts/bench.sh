#!/usr/bin/env bash
# make bench [WAIT=1]: time the parts of a step of the present train.py; archived in data/bench_*.json.
# SCRIPT=probe.py: in its place a script of your own in this folder, with the fast BLAS that a run has (8 times, on a CPU).
. "$(dirname "$0")/lib.sh"

export_settings
[ -f "${SCRIPT:-bench.py}" ] || die "there is no $SCRIPT: write it into this folder"
exec "$PYTHON" -m scripts.run.lock -- "${LAUNCH[@]}" "${SCRIPT:-bench.py}"
