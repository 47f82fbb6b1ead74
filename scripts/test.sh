#!/usr/bin/env bash
# make test [ALL=1]: run the tests; ALL=1 the slow ones as well. scripts/test.sh takes pytest's arguments.
. "$(dirname "$0")/lib.sh"

need_python
[ -n "${ALL:-}" ] || set -- -m "not slow" "$@"
# the tests set these themselves
unset ALL AUTORESEARCH_BUDGET AUTORESEARCH_SEED AUTORESEARCH_FILES AUTORESEARCH_COLUMN AUTORESEARCH_CACHE AUTORESEARCH_LOCK
exec "${LAUNCH[@]}" -m pytest -n auto --dist worksteal "$@"
