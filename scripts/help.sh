#!/usr/bin/env bash
# make help: list what make can do, read from the Makefile itself.
. "$(dirname "$0")/lib.sh"

echo "usage: make TARGET [NAME=value …]        (README.md has a table of the variables)"
sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do printf '  %-12s %s\n' "$name" "$text"; done
