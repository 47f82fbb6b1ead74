#!/usr/bin/env bash
# make discard: put the branch back on the last kept commit, touching nothing but train.py and the branch.
# The discarded commits stay reachable under refs/experiments/TAG/.
. "$(dirname "$0")/lib.sh"

read_git
refuse_off_branch
[ -n "$START" ] || die "discard works in a session, on a branch $SESSIONS/TAG: make setup TAG=name opens one"
kept=$(helper judge.log_result --tag="$TAG" --kept="$HEAD") || exit 1
kept=$(git rev-parse -q --verify "${kept:-$START}^{commit}") # while nothing was kept, where the session began

others=$(git diff --name-only "$kept" HEAD -- . ':(exclude)train.py' | tr '\n' ' ')
[ -z "$others" ] || die "discard would also change ${others% }, committed since $(short "$kept"). Put back first:" \
  "git restore --source=$(short "$kept") --staged --worktree -- ${others% } && git commit -m 'put back'"
# as HEAD has it, or already put back by a call that was cut short
[ ! -f train.py ] || git diff --quiet HEAD -- train.py || git diff --quiet "$kept" -- train.py ||
  die "train.py has changes that are not committed and would be lost: git commit -m 'what it tries' train.py," \
    "or git checkout HEAD -- train.py"

if [ -z "$(git for-each-ref --contains HEAD "refs/experiments/$TAG/")" ]; then # never run, but never lost
  git update-ref "refs/experiments/$TAG/dropped-$(short "$HEAD")" HEAD
fi
put_train "$kept" # file, index, branch: after each of them the same command goes on
git update-ref -m "discard" "refs/heads/$BRANCH" "$kept" "$HEAD"
echo "train.py and $SESSIONS/$TAG are back on $(short "$kept")"
