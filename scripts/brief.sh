#!/usr/bin/env bash
# make brief: tell in at most 60 lines where the session stands, for whoever comes back to it.
. "$(dirname "$0")/lib.sh"

read_git
helper show.terminal --tag="$TAG"
