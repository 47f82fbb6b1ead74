#!/usr/bin/env bash
# make help: list what make can do, read from the Makefile itself.
. "$(dirname "$0")/lib.sh"

echo "usage: make TARGET [NAME=value …]        (README.md has a table of the variables)"
awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $1, $2}' Makefile
