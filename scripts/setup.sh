#!/usr/bin/env bash
# Open a session: branch autoresearch/TAG, the dataset in train.py, a fresh results.tsv.
#
# usage: make setup TAG=nov24 [DATASET=climbmix]
#
# Tables belong to their tags: an older session's comes back with its branch. At the end it says whether the dataset is prepared, and if
# not, the command that prepares it.
# exit: 0 the session is open · 1 refused, and why; nothing was changed
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

tag=${TAG:-} name=${DATASET:-}
read_git
[ -n "$tag" ] || die "TAG is missing: make setup TAG=nov24 [DATASET=climbmix]"
[ -n "$HEAD" ] || die "a session needs a git repository with a commit: git init && git add -A && git commit -m start"
if ! [[ "$tag" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || ! git check-ref-format "refs/heads/autoresearch/$tag"; then
  die "TAG=$tag cannot name a branch autoresearch/TAG: letters, digits, '.', '_' and '-', please"
fi
if git show-ref -q --verify "refs/heads/autoresearch/$tag" || [ -n "$(git for-each-ref "refs/experiments/$tag/")" ]; then
  die "TAG=$tag is taken: choose another one, or go on with it: git checkout autoresearch/$tag"
fi
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
  git checkout -q --force "${BRANCH:-$HEAD}"
  git branch -q -D "autoresearch/$tag"
  die "the session was not opened (see above)"
}
git checkout -q -b "autoresearch/$tag"
if [ "$name" != "$(dataset_of_train)" ]; then
  sed "s/^\(DATASET *= *\)[\"'][A-Za-z0-9_]*[\"']/\1\"$name\"/" train.py >.train.py.new || undo
  cat .train.py.new >train.py && rm .train.py.new # not moved: the file keeps its mode
  git commit -q -m "Session $tag: train on $name" train.py || undo
fi
helper log_result --tag="$tag" --open-table || undo
git update-ref "refs/experiments/$tag/start" HEAD || undo

echo "session  autoresearch/$tag, from $(short "$(git rev-parse HEAD)"), dataset $name"
if [ "$prepared" != True ]; then
  folder=''
  [ "$name" != files ] || folder=" FILES=dir"
  echo "data     not prepared: make prepare DATASET=$name$folder"
fi
if [ -f .git ]; then # a linked worktree: nothing of a session goes with it
  echo "results  are kept in $(dirname "$(git rev-parse --path-format=absolute --git-common-dir)")/data, not in this worktree"
fi
echo "next     make baseline"
