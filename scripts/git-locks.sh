#!/usr/bin/env bash
# Remove the lock files of a git that was killed, for which every later one would refuse.
#
# usage: scripts/git-locks.sh GIT_DIR GIT_COMMON_DIR
#
# What stays where no git is at work is nobody's. While one is, it is waited for (PATIENCE).
# exit: 0 there is none any more · 1 a git is at work, or was cut off
. "$(dirname "$0")/lib.sh"

own=$1 common=$2
PATIENCE=10 # seconds
locks() {
  find "$own"/*.lock "$common"/*.lock "$common/refs/heads" "$common/refs/experiments" -name '*.lock' 2>/dev/null | sort -u || true
}
gits() { # the processes of git that run; one that has ended and was not collected yet (state Z) holds nothing
  if [ -r /proc/self/stat ]; then
    sed -nE 's,^([0-9]+) \(git\) [^ZX] .*,\1,p' /proc/[0-9]*/stat 2>/dev/null || true
  else
    ps -A -o pid= -o stat= -o comm= | sed -nE 's,^ *([0-9]+) +[^Z ][^ ]* +(.*/)?git$,\1,p'
  fi
}
git_runs_here() {
  local pid folder
  for pid in $(gits); do
    folder=$(exec 2>/dev/null && { readlink "/proc/$pid/cwd" || lsof -a -p "$pid" -d cwd -Fn | sed -n 's/^n//p'; })
    case $folder/ in "$PWD"/*) return 0 ;; esac
    [ -n "$folder" ] || ! kill -0 "$pid" 2>/dev/null || return 0 # it may be here
  done
  return 1
}

[ -n "$(locks)" ] || exit 0
for ((second = 0; second < PATIENCE; second++)); do
  sleep 1
  git_runs_here || break
done
found=$(locks)
[ -n "$found" ] || exit 0
listed=$(printf '%s' "$found" | tr '\n' ' ')
! git_runs_here || die "git is at work, or was cut off; if it was, remove $listed"
printf '%s\n' "$found" | while IFS= read -r name; do rm -f "$name"; done
say "note: a git that was killed left its lock, which is removed: $listed"
