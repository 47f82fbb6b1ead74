#!/usr/bin/env bash
# Show the session's table with runs, spread and gain, the best marked, and where the session stands.
#
# usage: make results
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

read_git
need_python
helper results --tag="$TAG"
