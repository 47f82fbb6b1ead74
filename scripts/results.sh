#!/usr/bin/env bash
# Show results.tsv as an aligned table, the best kept run marked.
#
# usage: make results
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

need_python
ledger results
