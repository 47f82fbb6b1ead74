#!/usr/bin/env bash
# make prepare [DATASET=name] [FILES=dir] [COLUMN=name]: fetch the dataset, train its tokenizer, write its token cache.
# Does nothing where all is there. Without DATASET it is the one that train.py names. FILES is the folder of text for
# DATASET=files; COLUMN the parquet column, or the field of a JSON line, that holds the text (text).
. "$(dirname "$0")/lib.sh"

export_settings
exec "${LAUNCH[@]}" prepare.py ${DATASET:+--dataset="$DATASET"}
