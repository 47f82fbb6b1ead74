#!/usr/bin/env bash
# Show the newest run's summary again: all runs of its program against all of the last kept one's, and the verdict.
#
# usage: make verdict
#
# It changes nothing. `rerun` says which run would settle it; `again` is the reference's own text.
# exit: 0 shown · 1 the newest run has no result, and why
. "$(dirname "$0")/lib.sh"

read_git
refuse_off_branch
need_python
helper show.summary --tag="$TAG"
