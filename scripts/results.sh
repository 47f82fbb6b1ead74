#!/usr/bin/env bash
# Show the session's table with runs, spread and gain, the best marked, and where the session stands.
#
# usage: make results [ALL=1]
#
# ALL=1 shows the tables of every session of this clone.
. "$(dirname "$0")/lib.sh"

read_git
need_python
helper show.results --tag="$TAG" ${ALL:+--all}
