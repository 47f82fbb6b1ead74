#!/usr/bin/env bash
# make results [ALL=1]: show the session's table with each row's runs and gain, the best marked, and where it stands.
# ALL=1 shows the tables of every session of this clone.
. "$(dirname "$0")/lib.sh"

read_git
helper show.terminal --tag="$TAG" --view=results ${ALL:+--all}
