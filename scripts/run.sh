#!/usr/bin/env bash
# make run [SEED=42] [AGAIN=1 | REFERENCE=1 | PAIR=1] [N=3] [WAIT=1]: run one experiment, the committed train.py, for at
# most TIMEOUT seconds, then print a short summary.
#
# AGAIN=1 runs the same train.py once more, with the next seed that it has not had; REFERENCE=1 runs the last
# kept program once more, without touching branch or tree; both until there are N runs, where N is given.
# PAIR=1 runs the two in turn. README.md tells of the other variables. The output goes to run.log. To stop a run: Ctrl-C,
# or a plain kill of make or of this (INT is ignored by what a script started in the background).
# exit: 0 a valid result · 1 refused, and why · 2 it crashed, or a check found it invalid · 3 it ended,
#       but data/last_run.json is missing, stale or not of this run · 124 it ran past TIMEOUT and was
#       killed · 128 + n a signal (Ctrl-C: 130) interrupted it
. "$(dirname "$0")/lib.sh"

# What nobody changes during a session. Words without blanks, so it may stand unquoted.
FROZEN="Makefile harness prepare.py data_sources.py bench.py scripts pyproject.toml requirements.lock requirements-cuda.lock"
case ${AGAIN:+1}${REFERENCE:+1}${PAIR:+1} in 11*) die "AGAIN, REFERENCE and PAIR exclude each other: give one" ;; esac
export_settings
refuse_off_branch
if [ -n "$HEAD" ]; then
  [ "$(git rev-parse -q --verify HEAD:train.py)" = "$(git hash-object train.py)" ] ||
    die "train.py is not committed, so the run could not be reproduced: git commit -m 'what it tries' train.py"
  base=${START:-$HEAD} where="where the session began" put_back=''
  [ -n "$START" ] || where="the last commit"
  # shellcheck disable=SC2086  # FROZEN is a list
  changed=$(git diff --name-only "$base" -- $FROZEN | tr '\n' ' ')
  # shellcheck disable=SC2086
  git diff --quiet "$base" "$HEAD" -- $FROZEN || put_back=" && git commit -m 'put back'"
  [ -z "$changed" ] || die "only train.py may change, and this differs from $where: ${changed% }. Put back:" \
    "git restore --source=$(short "$base") --staged --worktree -- ${changed% }$put_back"
  tracked=$(git ls-files -- results.tsv run.log data internal | cut -d / -f 1 | sort -u | tr '\n' ' ')
  [ -z "$tracked" ] || die "git tracks results (${tracked% }), and a reset would take them along:" \
    "git rm -r -q --cached -- ${tracked% } && git commit -q -m 'results stay outside of git'"
fi
exec "${LAUNCH[@]}" -m scripts.run.experiment --tag="$TAG" --head="$HEAD" ${START:+--session} ${AGAIN:+--again} \
  ${REFERENCE:+--reference} ${PAIR:+--pair} ${N:+--runs="$N"} "$@"
