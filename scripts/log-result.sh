#!/usr/bin/env bash
# Log the newest run: its row in results.tsv, its entry in today's journal, its commit kept reachable.
#
# usage: make log-result STATUS=keep|discard|crash DESC="what was tried" [FOUND="…"] [OPEN="…"]
#
# Every figure comes from the run's own record. A run is logged once; what was cut short is completed
# by the same command.
# exit: 0 logged · 1 refused, and why; nothing is lost
. "$(dirname "$0")/lib.sh"

read_git
refuse_off_branch
need_python
helper judge.log_result --tag="$TAG" --status="${STATUS:-}" --description="${DESC:-}" --found="${FOUND:-}" --open="${OPEN:-}" "$@"
