#!/usr/bin/env bash
# Fetch the dataset, train its tokenizer, write its token cache; do nothing where all is there.
#
# usage: make prepare [DATASET=name] [FILES=dir] [COLUMN=name]
#
# Without DATASET it is the one that train.py names. FILES is the folder of text for DATASET=files.
# COLUMN is the parquet column, or the field of a JSON line, that holds the text of files (text).
# exit: 0 ready · 1 not prepared, and why
. "$(dirname "$0")/lib.sh"

read_git
need_python
ANY_DATASET=1 export_settings
exec "${LAUNCH[@]}" prepare.py ${DATASET:+--dataset="$DATASET"}
