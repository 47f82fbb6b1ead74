#!/usr/bin/env bash
# Compare all runs of the newest program with all of the last kept one: again, keep, discard, rerun or judge.
#
# usage: make verdict
#
# It changes nothing. `rerun` says which run would settle it; `again` is the reference's own text.
# exit: 0 a verdict · 1 none, and why
. "$(dirname "$0")/lib.sh"

read_git
refuse_off_branch
need_python
helper judge.verdict --tag="$TAG"
