#!/usr/bin/env bash
# Open a session: branch autoresearch/TAG, the dataset in train.py, a fresh results.tsv.
#
# usage: make setup TAG=nov24 [DATASET=climbmix]
#
# Tables belong to their tags: an older session's comes back with its branch. At the end it says whether the
# dataset is prepared, and if not, the command that prepares it.
# exit: 0 the session is open · 1 refused, and why; nothing was changed
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

tag=${TAG:-} name=${DATASET:-}
read_git
[ -n "$tag" ] || die "TAG is missing: make setup TAG=nov24 [DATASET=climbmix]"
if [ -z "$HEAD" ]; then
  command -v git >/dev/null || die "git is missing on this machine, and a session needs it: install it"
  [ ! -e .git ] || die "the repository has no commit yet: git add -A && git commit -m start"
  top=$(git rev-parse --show-toplevel 2>/dev/null) || top=''
  [ -z "$top" ] || die "this folder lies inside the repository $top, and a session needs one of its own:" \
    "move the folder out of it, then git init && git add -A && git commit -m start"
  die "a session needs a git repository with a commit: git init && git add -A && git commit -m start"
fi
if ! [[ "$tag" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || ! git check-ref-format "refs/heads/autoresearch/$tag"; then
  die "TAG=$tag cannot name a branch autoresearch/TAG: letters, digits, '.', '_' and '-', please"
fi
# Compared without case: many file systems hold t and T to be one name. A slash ends each, so that all is compared.
lower() { tr '[:upper:]' '[:lower:]'; }
low=$(printf '%s/' "$tag" | lower) line=$'\n'
refs=$line$(git for-each-ref --format='%(refname)/' refs/heads refs/experiments | lower)$line
case $refs in
  *"${line}refs/heads/autoresearch/$low"* | *"${line}refs/experiments/$low"*)
    known=$(git for-each-ref --format='%(refname:lstrip=3)' refs/heads/autoresearch | grep -ixF -e "$tag" | head -n 1) || known=$tag
    die "TAG=$tag is taken: choose another one, or go on with it: git checkout autoresearch/$known"
    ;;
  *"${line}refs/heads/autoresearch/$line"*)
    die "a branch called 'autoresearch' is in the way of autoresearch/$tag: git branch -m autoresearch NAME"
    ;;
  *"${line}refs/heads/$low$line"*) # runs outside a session go by the branch's name
    die "TAG=$tag is the name of a branch, and their results would be mixed: choose another one"
    ;;
esac
case $low in none/ | detached/) die "TAG=$tag is what runs outside a session are called: choose another one" ;; esac
for who in GIT_AUTHOR_IDENT GIT_COMMITTER_IDENT; do # found out now, not at the first experiment
  git var "$who" >/dev/null 2>&1 ||
    die "git knows no author for commits: git config user.name agent && git config user.email agent@localhost"
done
dirty=$(git status --porcelain --untracked-files=no | sed 's/^...//' | tr '\n' ' ')
[ -z "$dirty" ] || die "the tree is dirty ($dirty): commit that or put it back, then make setup again"
refuse_changed_files

export_settings
need_python
name=${name:-$(dataset_of_train)}
# an unknown name ends here, with the known ones
prepared=$("$PYTHON" -c '
import sys, prepare
print(prepare.is_prepared(prepare.get_dataset(sys.argv[1])))' "$name") || exit 1

undo() { # the branch we came from, and no trace of the new one
  rm -f .train.py.new
  git checkout -q --force "${BRANCH:-$HEAD}" --
  git branch -q -D "autoresearch/$tag"
  die "the session was not opened (see above)"
}
git checkout -q -b "autoresearch/$tag" || die "the session was not opened (see above)"
if [ "$name" != "$(dataset_of_train)" ]; then
  sed "s/^\(DATASET *= *\)[\"'][A-Za-z0-9_]*[\"']/\1\"$name\"/" train.py >.train.py.new || undo
  cat .train.py.new >train.py && rm .train.py.new # not moved: the file keeps its mode
  git commit -q -m "Session $tag: train on $name" train.py || undo
fi
helper log_result --tag="$tag" --open-table || undo
git update-ref "refs/experiments/$tag/start" HEAD || undo

echo "session  autoresearch/$tag, from $(short "$(git rev-parse HEAD)"), dataset $name"
next="make baseline"
if [ "$prepared" != True ]; then # of files nobody but the caller knows the folder, and a download takes its time
  [ "$name" != files ] || name="files FILES=dir"
  next="make prepare DATASET=$name && make baseline"
fi
if [ -f .git ]; then # a linked worktree: nothing of a session goes with it
  echo "results  are kept in $(dirname "$(git rev-parse --path-format=absolute --git-common-dir)")/data, not in this worktree"
fi
echo "next     $next"
