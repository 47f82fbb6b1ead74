#!/usr/bin/env bash
# Run every test.
#
# usage: make test
#        scripts/test.sh [pytest's arguments]
#
# exit: pytest's
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

need_python
# the tests set these themselves
unset AUTORESEARCH_BUDGET AUTORESEARCH_SEED AUTORESEARCH_FILES AUTORESEARCH_COLUMN AUTORESEARCH_CACHE AUTORESEARCH_LOCK
exec "${LAUNCH[@]}" -m pytest "$@"
