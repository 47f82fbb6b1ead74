#!/usr/bin/env bash
# make verdict: show the newest run's summary again: all runs of its program against all of the last kept one's.
# It changes nothing. `rerun` says which run would settle it; `again` is the reference's own text.
. "$(dirname "$0")/lib.sh"

read_git
refuse_off_branch
helper show.summary --tag="$TAG"
