#!/usr/bin/env bash
# Fetch the dataset, train its tokenizer, write its token cache; do nothing where all is there.
#
# usage: make prepare [DATASET=name] [FILES=dir]
#
# Without DATASET it is the one that train.py names. FILES is the folder of text for DATASET=files.
# exit: 0 ready · 1 not prepared, and why
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

export_settings
need_python
exec "${LAUNCH[@]}" prepare.py ${DATASET:+--dataset "$DATASET"}
