#!/usr/bin/env bash
# List what make can do, read from the Makefile itself.
#
# usage: make help
. "$(dirname "$0")/lib.sh"

list() { # a line for each that the pattern finds: NAME|TEXT
  echo
  sed -n "s/$1/\1|\2/p" Makefile | while IFS='|' read -r name text; do printf '  %-12s %s\n' "$name" "$text"; done
}
echo "usage: make TARGET [NAME=value …]"
list '^\([a-z-]*\):.*## \(.*\)'
list '^#   \([A-Z_]*\)  *\(.*\)'
