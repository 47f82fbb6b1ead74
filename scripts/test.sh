#!/usr/bin/env bash
# Run the tests: those that take minutes together as well where ALL=1.
#
# usage: make test [ALL=1]
#        scripts/test.sh [pytest's arguments]
#
# exit: pytest's
. "$(dirname "$0")/lib.sh"

need_python
# the tests set these themselves
unset AUTORESEARCH_BUDGET AUTORESEARCH_SEED AUTORESEARCH_FILES AUTORESEARCH_COLUMN AUTORESEARCH_CACHE AUTORESEARCH_LOCK
[ -n "${ALL:-}" ] || set -- -m "not slow" "$@"
unset ALL
exec "${LAUNCH[@]}" -m pytest -n auto --dist worksteal "$@"
