# shellcheck shell=bash
# What the helpers share; sourced first by each. bash 3.2 and the userland of macOS are all it needs.
set -euo pipefail
# shellcheck disable=SC2046  # a list of names
unset -f $(compgen -A function) # exported by the caller's shell, they would stand in for commands
unset CDPATH # or `cd` prints, and may go elsewhere
# set by a hook, or for another repository; git finds ours by itself
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_NAMESPACE GIT_PREFIX

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
case "${1:-}" in
  -h | --help) # a helper's header is its help
    sed -n -e '1d' -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
cd "$ROOT"
# A run may stand in a worktree of its own, where a relative path would lead elsewhere.
case ${AUTORESEARCH_CACHE:-/} in [/~]*) ;; *) export AUTORESEARCH_CACHE=$ROOT/$AUTORESEARCH_CACHE ;; esac

say() { printf '%s\n' "$*" >&2; }

die() {
  local text="$*" && say "error: ${text//[[:cntrl:]]/ }" # what was typed may hold anything
  exit 1
}

trap '[ $? -ne 128 ] || { say "error: git could not go on (see above), as where the disk is full: mend that, and run the same again"; exit 1; }' EXIT

# --- what a person gives -------------------------------------------------------------------------

for name in AGAIN REFERENCE PAIR WAIT ALL; do # `WAIT=0` is a no
  case ${!name:-} in 0 | no | No | NO | false | off) unset "$name" ;; esac
done

# Reads git, and exports what holds for this command: the session's settings (scripts/settings.py) and a typed SEED.
export_settings() {
  local exports
  read_git
  need_python
  exports=$(helper session --tag="$TAG" --verb="$(basename "$0" .sh)") || exit 1
  eval "$exports"
}

# --- Python --------------------------------------------------------------------------------------

# Set for other programs, these would break a run, or count as its crash.
unset PYTHONHOME PYTHONSAFEPATH PYTHONIOENCODING PYTHONHASHSEED PYTHONWARNINGS PYTHONOPTIMIZE PYTHONSTARTUP PYTHONINSPECT MPLBACKEND
[ -n "${PYTHON:-}" ] || unset PYTHONPATH # it may hold the packages of the Python that is given
# train.py runs one stream a core itself; and without a pool of threads NumPy is there in half the time
export PYTHONUTF8=1 OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"

# Ends with what a given Python lacks, whatever stands in this folder.
probe='
import mlx.core
from importlib.util import find_spec
for name in "numpy psutil pyarrow requests rustbpe tiktoken".split():
    assert find_spec(name), "it lacks " + name'

# Prints the files here that hide a module of Python's own library; those of a few common names nobody imports.
shadows='import os, sys
names = sys.stdlib_module_names - {"code", "profile", "test", "trace"}
print(*sorted(file for file in os.listdir() if file[-3:] == ".py" and file[:-3] in names))'

# Sets PYTHON (the user's, or the project's own, built where needed) and LAUNCH: the words before a
# script's name. What must stand in the environment before Python starts goes to that Python alone.
need_python() {
  [ -z "${LAUNCH[*]:-}" ] || return 0
  local library wrong mend="unset PYTHON, and the project builds its own environment"
  if [ -z "${PYTHON:-}" ]; then
    scripts/environment.sh || exit 1
    PYTHON=$ROOT/.venv/bin/python mend="unset LD_LIBRARY_PATH, if that is set, or make clean"
  fi
  wrong=$("$PYTHON" -P -c "$probe" 2>&1) || die "PYTHON=$PYTHON does not serve (${wrong##*$'\n'}): $mend"
  wrong=$("$PYTHON" -I -c "$shadows")
  [ -z "$wrong" ] || die "$wrong in this folder would stand in for Python's own: give it another name"
  LAUNCH=(env "PYTHONUNBUFFERED=1" "$PYTHON")
  # by its whole path, or a child in another folder does not find it; a path with a blank can only be told from here
  library=$ROOT/.venv/lib/libopenblas.so
  [ -f "$library" ] || library=$(dirname "$(command -v "$PYTHON")")/../lib/libopenblas.so
  case $library in *[\ :]*) library=.venv/lib/libopenblas.so ;; esac # LD_PRELOAD cannot hold a blank or a colon
  # the allocator keeps its pages, or each step faults them in anew
  [ ! -f "$library" ] ||
    LAUNCH=(env "PYTHONUNBUFFERED=1" "LD_PRELOAD=$library" "MALLOC_MMAP_THRESHOLD_=4294967296"
      "MALLOC_TRIM_THRESHOLD_=4294967296" "MALLOC_TOP_PAD_=268435456" "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" "$PYTHON")
}

helper() { # NAME [OPTION …]: a Python module of this folder
  need_python
  "$PYTHON" -m "scripts.$1" "${@:2}"
}

# --- git -----------------------------------------------------------------------------------------

SESSIONS=autoresearch # a session is the branch autoresearch/TAG

# Sets HEAD (empty without git, a repository of our own or a commit), BRANCH (empty where detached),
# TAG (the session's, else the branch) and START (the commit where the session began, else empty).
read_git() {
  HEAD='' BRANCH='' TAG=none START=''
  [ -e .git ] && command -v git >/dev/null || return 0
  local folders
  folders=$(git rev-parse --git-dir --git-common-dir) || die "git does not work in $ROOT (see above)"
  clear_git_locks "${folders%%$'\n'*}" "${folders#*$'\n'}"
  HEAD=$(git rev-parse -q --verify 'HEAD^{commit}') || return 0
  BRANCH=$(git symbolic-ref -q HEAD) || BRANCH='' # not --short: that name depends on which tags exist
  BRANCH=${BRANCH#refs/heads/}
  TAG=${BRANCH#"$SESSIONS"/}
  TAG=${TAG:-detached}
  if [ "$BRANCH" != "$TAG" ]; then
    START=$(git rev-parse -q --verify "refs/experiments/$TAG/start^{commit}") || START=''
  fi
}

# Succeeds where no git is at work in this clone. One whose folder is hidden counts, and so does a hidden list.
no_git_runs='
import pathlib, psutil, sys
gits = [p.info for p in psutil.process_iter(["name", "status", "cwd"]) if p.info["name"] == "git"]
here = pathlib.Path.cwd()
sys.exit(any(g["status"] != "zombie" and pathlib.Path(g["cwd"] or here).is_relative_to(here) for g in gits))'

# Removes what a git that was killed left: every later git would refuse. One at work is waited for.
clear_git_locks() { # GIT_DIR GIT_COMMON_DIR
  local found lock try
  found=$(find "$1"/*.lock "$2"/*.lock "$2/refs/heads" "$2/refs/experiments" -name '*.lock' 2>/dev/null | sort -u) || true
  [ -n "$found" ] || return 0
  need_python
  for try in 1 2 3 4 5 6 7 8 9 last; do
    sleep 1
    "$PYTHON" -c "$no_git_runs" 2>/dev/null && break
    [ "$try" != last ] || die "git is at work, or was cut off; if it was, remove $found"
  done
  say "note: a git that was killed left its lock, which is removed:" "$found"
  while IFS= read -r lock; do rm -f "$lock"; done <<<"$found"
}

# Off its branch a session would go on unseen: where HEAD is detached, or on a branch of the session's own name.
refuse_off_branch() {
  local session=$TAG
  [ -n "$HEAD" ] && [ -z "$START" ] || return 0
  [ -n "$BRANCH" ] ||
    session=$(git for-each-ref --merged=HEAD --sort=-committerdate --format='%(refname:lstrip=2)' 'refs/experiments/*/start' | sed -n '1s,/start$,,p')
  [ -z "$session" ] || ! git rev-parse -q --verify "refs/experiments/$session/start" >/dev/null ||
    die "this is off the session's branch: git checkout $SESSIONS/$session"
}

move='import pathlib, sys; from harness import files; files.move_into_place(*map(pathlib.Path, sys.argv[1:]))'
# COMMIT: train.py as it is there, in the tree and in the index, each whole at any moment: git would write into it.
put_train() {
  need_python
  local new=.train.py.$$.tmp
  { : >"$new"; } 2>/dev/null || die "$ROOT is read-only or full, and train.py is written there: mend that, and again"
  git cat-file blob "$1:train.py" >"$new" && "$PYTHON" -c "$move" "$new" train.py &&
    git -c core.hooksPath=/dev/null restore --source="$1" --staged -- train.py
}

short() { printf '%.7s' "$1"; }
