#!/usr/bin/env bash
# Run one experiment: the committed train.py, for at most TIMEOUT seconds, then a short summary.
#
# usage: make run [BUDGET=300] [TIMEOUT=600] [SEED=42] [AGAIN=1] [WAIT=1]
#
# The output goes to run.log. AGAIN=1 runs a train.py that was run before; WAIT=1 waits for another
# run on this machine instead of refusing.
# exit: 0 a valid result · 1 refused, and why · 2 it crashed, or a check found it invalid · 3 it ended,
#       but data/last_run.json is missing, stale or not of this run · 124 it ran past TIMEOUT and was
#       killed · 128 + n a signal (Ctrl-C: 130) interrupted it
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

timeout=${TIMEOUT:-600}
positive TIMEOUT "$timeout"
export_settings
[ -f train.py ] || die "train.py is missing: git checkout train.py"
same_dataset
read_git
refuse_detached
if [ -n "$HEAD" ]; then
  [ "$(git rev-parse -q --verify HEAD:train.py)" = "$(git hash-object train.py)" ] ||
    die "train.py is not committed, so the run could not be reproduced: git commit -m 'what it tries' train.py"
  refuse_changed_files
fi
need_python
[ -n "${AGAIN:-}" ] || ledger seen --tag "$TAG" ${START:+--session}

take_lock

# --- processes -----------------------------------------------------------------------------------
child='' watchdog='' marker=data/.timed-out

descendants() { # PID: all that it started, and they, in whatever group
  { ps -A -o pid,ppid 2>/dev/null || ps -o pid,ppid; } | awk -v root="$1" '
    { parent[$1] = $2 }
    END {
      do {
        found = 0
        for (p in parent) if (!(p in below) && (parent[p] == root || parent[p] in below)) below[p] = found = 1
      } while (found)
      for (p in below) print p
    }'
}

kill_tree() { # PID of a group's leader: asked first, killed after three seconds
  local all tries=0
  all=$(descendants "$1" || true)
  kill -TERM -- "-$1" 2>/dev/null || true
  while [ $tries -lt 15 ] && kill -0 -- "-$1" 2>/dev/null; do
    sleep 0.2
    tries=$((tries + 1))
  done
  kill -KILL -- "-$1" 2>/dev/null || true
  # shellcheck disable=SC2086  # a list of numbers
  [ -z "$all" ] || kill -KILL $all 2>/dev/null || true
}

# Ends a run that goes on too long, or whose run.sh was killed. It counts its own sleeps: the clock may jump.
watch() {
  local left
  left=$(awk -v t="$timeout" 'BEGIN { n = int(t); print n + (n < t) }')
  while kill -0 "$child" 2>/dev/null; do
    if ! kill -0 $$ 2>/dev/null; then
      kill_tree "$child"
    elif [ "$left" -le 0 ]; then
      : >"$marker"
      kill_tree "$child"
      return
    fi
    sleep 1
    left=$((left - 1))
  done
}

interrupted() { # EXIT CODE
  trap '' INT TERM HUP
  [ -z "$child" ] || kill_tree "$child"
  [ -z "$watchdog" ] || kill_tree "$watchdog"
  [ ! -t 1 ] || echo # after the progress line
  attempt end --interrupted --exit-code "$1" || true
  exit "$1"
}

rm -f "$marker"
attempt begin --tag "$TAG" --head "$HEAD" --pid $$
trap 'interrupted 130' INT
trap 'interrupted 143' TERM
trap 'interrupted 129' HUP

exec 8>&2 2>/dev/null # or bash would report a killed child in words of its own
set -m # each job its own process group, so that all of it can be ended, and Ctrl-C comes to us alone
if [ -t 1 ]; then # a person watches: progress on the terminal, the rest in run.log as well
  "$PYTHON" scripts/console.py run.log "${LAUNCH[@]}" train.py </dev/null 8>&- &
else
  "${LAUNCH[@]}" train.py >run.log 2>&1 </dev/null 8>&- &
fi
child=$!
watch 8>&- 9<&- &
watchdog=$!
if command -v caffeinate >/dev/null; then
  caffeinate -i -w "$child" 8>&- 9<&- &
elif command -v systemd-inhibit >/dev/null && systemd-inhibit --what=sleep true 2>/dev/null; then
  # shellcheck disable=SC2016  # $1 is the inner shell's
  systemd-inhibit --what=sleep:idle --who=autoresearch --why="an experiment runs" \
    bash -c 'while kill -0 "$1" 2>/dev/null; do sleep 2; done' - "$child" >/dev/null 2>&1 8>&- 9<&- &
fi
set +m

code=0
wait "$child" || code=$?
if [ -e "$marker" ]; then
  wait "$watchdog" || true # it may still be killing
else
  kill -KILL -- "-$watchdog" 2>/dev/null || true
  wait "$watchdog" || true
fi
trap - INT TERM HUP
exec 2>&8 8>&-
kill -KILL -- "-$child" 2>/dev/null || true # what train.py left behind in its group
timed_out=''
[ ! -e "$marker" ] || timed_out=$timeout
attempt end --child "$child" --exit-code "$code" --timed-out "$timed_out" ${BASELINE:+--baseline}
