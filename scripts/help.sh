#!/usr/bin/env bash
# List what make can do, read from the Makefile itself.
#
# usage: make help
. "$(dirname "$0")/lib.sh"

echo "usage: make TARGET [NAME=value …]"
echo
sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r target text; do
  printf '  %-12s %s\n' "$target" "$text"
done
echo
sed -n 's/^#   \([A-Z_]*\)  *\(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do
  printf '  %-12s %s\n' "$name" "$text"
done
