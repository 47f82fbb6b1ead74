#!/usr/bin/env bash
# Tell in at most 60 lines where the session stands: for whoever comes back to it.
#
# usage: make brief
. "$(dirname "$0")/lib.sh"

read_git
need_python
helper show.brief --tag="$TAG"
