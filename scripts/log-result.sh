#!/usr/bin/env bash
# make log-result STATUS=keep|discard|crash DESC="what was tried" [FOUND="…"] [OPEN="…"]: log the newest run.
# Its row goes to results.tsv, its entry to today's journal, and its commit is kept reachable. val_bpb and speed are those
# of all its runs, memory is this run's; none is typed. A run is logged once; what was cut short the same command completes.
. "$(dirname "$0")/lib.sh"

read_git
refuse_off_branch
helper judge.log_result --tag="$TAG" --status="${STATUS:-}" --description="${DESC:-}" --found="${FOUND:-}" --open="${OPEN:-}" "$@"
