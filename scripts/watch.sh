#!/usr/bin/env bash
# make watch: one screen on the running experiment and the last results; Ctrl-C leaves it, and the run alone.
# Where the output is no terminal, it prints once.
. "$(dirname "$0")/lib.sh"

read_git
helper show.terminal --tag="$TAG" --view=watch
