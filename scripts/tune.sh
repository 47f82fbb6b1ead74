#!/usr/bin/env bash
# make tune [BUDGET=300] [WAIT=1]: fit depth, step and batch size in train.py to this machine and budget.
# Times steps of the real train.py at a few sizes, one to two minutes, shows the table and why, and writes
# them, with ASPECT_RATIO and NGRAM_ROWS where these pay. Archived in data/tune_*.json. Outside a session commit it yourself.
# --known, for make setup: writes what was found before for this machine, dataset and budget, where it was.
. "$(dirname "$0")/lib.sh"

export_settings
exec "$PYTHON" -m scripts.run.lock -- "${LAUNCH[@]}" -m scripts.run.tune "$@"
