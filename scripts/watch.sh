#!/usr/bin/env bash
# One screen on the running experiment and the last results; Ctrl-C leaves it, and the run alone.
#
# usage: make watch
#
# Where the output is no terminal, it prints once.
. "$(dirname "$0")/lib.sh"

read_git
need_python
helper show.watch --tag="$TAG"
