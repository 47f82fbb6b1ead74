#!/usr/bin/env bash
# make check [WAIT=1]: build the model of the present train.py and ask it what a run asks before its budget: whether
# logits depend on later tokens, on other rows or on earlier calls, and whether one batch of the evaluation fits.
# exit: 0 passed · 1 refused or failed, and why · 2 the model is not valid, and why
. "$(dirname "$0")/lib.sh"

export_settings
exec "$PYTHON" -m scripts.run.lock -- "${LAUNCH[@]}" train.py --check
