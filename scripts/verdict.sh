#!/usr/bin/env bash
# Compare the newest run with the last kept one: keep, discard, rerun or judge, and the rule that decided.
#
# usage: make verdict
#
# It changes nothing. A marginal win asks to be run again (make run AGAIN=1); then the mean decides.
# exit: 0 a verdict · 1 none, and why
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

read_git
refuse_detached
need_python
ledger verdict --tag "$TAG"
