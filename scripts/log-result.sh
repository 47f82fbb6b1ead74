#!/usr/bin/env bash
# make log-result STATUS=keep|discard|crash DESC="what was tried" [FOUND="…"] [OPEN="…"]: log the newest run.
# Its row goes to results.tsv, its entry to today's journal, and its commit is kept reachable. Every figure comes from the
# run's own record. A run is logged once; what was cut short is completed by the same command.
. "$(dirname "$0")/lib.sh"

read_git
refuse_off_branch
helper judge.log_result --tag="$TAG" --status="${STATUS:-}" --description="${DESC:-}" --found="${FOUND:-}" --open="${OPEN:-}" "$@"
