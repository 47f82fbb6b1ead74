#!/usr/bin/env bash
# make holdout [N=3] [WAIT=1] [BUDGET=1200] [DATASET=tinystories]: measure the night's gain anew, on text that nobody
# selected on; with another budget, or on another prepared dataset, what is left of the gain there.
# Baseline and best kept program run in turn, N pairs with fresh, equal seeds, scored on the validation and on the test
# split, which no other command reads. N=1 leans on the noise that the night saw (not on another dataset: N=3 there). Looks at it are counted.
. "$(dirname "$0")/lib.sh"

export_settings
refuse_off_branch
[ -z "${DATASET:-}" ] || # ends with a line where that is not prepared
  "$PYTHON" -c 'import sys, prepare; prepare.TokenCache.load(prepare.get_dataset(sys.argv[1]))' "$DATASET"
exec "${LAUNCH[@]}" -m scripts.judge.holdout --tag="$TAG" --head="$HEAD" --dataset="${DATASET:-}" ${N:+--runs="$N"}
