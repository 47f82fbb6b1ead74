#!/usr/bin/env bash
# make baseline [SEED=42] [AGAIN=1]: prepare where needed, run train.py as it is, and log it as the baseline.
# Where results.tsv holds runs that cannot be compared with this one (another budget, dataset, machine), it is archived
# in data/ and a new table begins. exit: as `make run`
. "$(dirname "$0")/lib.sh"

export_settings
export PYTHON # built once, known to the others
scripts/prepare.sh
scripts/run.sh --baseline
STATUS=keep DESC=baseline scripts/log-result.sh --new-table
