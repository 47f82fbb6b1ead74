#!/usr/bin/env bash
# make ablate [N=1] [WAIT=1]: measure what each kept change is still worth, taken back alone from the best program.
# A run for each kept change, N times, with the seeds of the best. What was run is not run again, so after a kill the
# same command goes on. What carries nothing is named, with the command that tries the best without it.
. "$(dirname "$0")/lib.sh"

export_settings
refuse_off_branch
exec "${LAUNCH[@]}" -m scripts.judge.ablate --tag="$TAG" --head="$HEAD" ${N:+--runs="$N"}
