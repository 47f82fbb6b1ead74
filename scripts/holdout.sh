#!/usr/bin/env bash
# make holdout [N=3] [WAIT=1]: measure the night's gain anew, on text that nobody selected on.
# Baseline and best kept program run in turn, N pairs with fresh, equal seeds, scored on the validation and on the test
# split, which no other command reads. N=1 shows a direction, and no interval. Every look at the test split is counted.
# exit: 0 measured · 1 refused, and why · otherwise as `make run`
. "$(dirname "$0")/lib.sh"

read_git
refuse_off_branch
export_settings
exec "${LAUNCH[@]}" -m scripts.judge.holdout --tag="$TAG" --head="$HEAD" ${N:+--runs="$N"}
