#!/usr/bin/env bash
# make sample [PROMPT="Once upon"]: a few lines of text from the best weights, so that one sees what a val_bpb reads like.
. "$(dirname "$0")/lib.sh"

export_settings
exec "${LAUNCH[@]}" -m scripts.show.sample --tag="$TAG" --prompt="${PROMPT:-}"
