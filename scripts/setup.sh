#!/usr/bin/env bash
# Open a session: branch autoresearch/TAG, the dataset in train.py, a fresh results.tsv.
#
# usage: make setup TAG=nov24 [DATASET=climbmix] [BUDGET=300] [TIMEOUT=600] [TUNE=0]
#        [NPROC=2] [HOSTS=mac1.local,mac2.local] [DEVICE=1] [FILES=dir] [COLUMN=name]
#
# What it is given holds for every later command of the session. Where the dataset is prepared, train.py is fitted to this machine (make tune), and that is the session's first
# commit; what was found before for the same machine, dataset and budget is taken over. TUNE=0 leaves it out.
# Tables belong to their tags: an older session's comes back with its branch. At the end it says whether the
# dataset is prepared, and if not, the command that prepares it. What was cut short is completed by the same command.
# exit: 0 the session is open · 1 refused, and why; nothing was changed
. "$(dirname "$0")/lib.sh"

tag=${TAG:-} name=${DATASET:-} branch=refs/heads/$SESSIONS/${TAG:-}
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
if ! [[ "$tag" =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$ ]] || ! git check-ref-format "$branch"; then
  die "TAG=$tag cannot name a branch $SESSIONS/TAG: letters, digits, '.', '_' and '-', please"
fi
# A session in which nothing was done yet: this command was cut short, or is typed twice.
start=$(git rev-parse -q --verify "refs/experiments/$tag/start^{commit}") || start=''
if [ -n "$start" ]; then
  case "$HEAD" in "$start" | "$(git rev-parse -q --verify "$start^")") ;; *) start='' ;; esac
  known=$(git for-each-ref --format='%(objectname) %(refname)' "refs/experiments/$tag/" "$branch" | tr '\n' ' ')
  case $known in "$start refs/experiments/$tag/start " | "$start refs/experiments/$tag/start $start $branch ") ;; *) start='' ;; esac
  [ "$BRANCH" = "$SESSIONS/$tag" ] || ! git worktree list --porcelain | grep -qxF "branch $branch" || start=''
fi
# Compared without case: many file systems hold t and T to be one name.
taken=$(git for-each-ref --format='%(refname:lstrip=2)' "refs/heads/$SESSIONS" refs/experiments |
  grep -ixF -e "$SESSIONS/$tag" -e "$tag/start" | head -n 1) || taken=''
taken=${taken#"$SESSIONS"/}
[ -n "$start" ] || [ -z "$taken" ] ||
  die "TAG=$tag is taken: choose another one, or go on with it: git checkout $SESSIONS/${taken%/start}"
for who in GIT_AUTHOR_IDENT GIT_COMMITTER_IDENT; do # found out now, not at the first experiment
  git var "$who" >/dev/null 2>&1 ||
    die "git knows no author for commits: git config user.name agent && git config user.email agent@localhost"
done
dirty=$(git status --porcelain --untracked-files=no | sed 's/^...//' | tr '\n' ' ')
[ -z "$start" ] || [ "$dirty" != "train.py " ] || [ "$(git hash-object train.py)" != "$(git rev-parse "$start:train.py")" ] || dirty=''
[ -z "$dirty" ] || die "the tree is dirty ($dirty): commit that or put it back, then make setup again"

need_python
dataset_of() { "$PYTHON" -c 'import sys; from harness import project; print(project.dataset_of_train(*sys.argv[1:]))' "$@"; }
name=${name:-$(dataset_of)}
# an unknown name ends here, with the known ones
prepared=$("$PYTHON" -c '
import sys, prepare
print(prepare.is_prepared(prepare.get_dataset(sys.argv[1])))' "$name") || exit 1

fail() { # back to where we came from
  git update-ref -d "$branch" || true # on a full disk it may fail; then the same command goes on
  git update-ref -d "refs/experiments/$tag/start" || true
  [ "$(git hash-object train.py)" = "$(git rev-parse HEAD:train.py)" ] || put_train "$HEAD" || true
  die "the session was not opened (see above)"
}
# What the agent commits outlives a power cut; by default git leaves new commits and refs to the system.
git config --get core.fsync >/dev/null || git config core.fsync committed || say "note: core.fsync could not be set"
if [ -z "$start" ]; then
  start=$HEAD
  if [ "$name" != "$(dataset_of)" ]; then
    tab=$'\t'
    blob=$(git cat-file blob HEAD:train.py | sed "s/^\(DATASET *= *\)[\"'][A-Za-z0-9_]*[\"']/\1\"$name\"/" |
      git hash-object -w --stdin)
    tree=$(git ls-tree HEAD | sed "s/^\([0-9]* blob \)[0-9a-f]*\(${tab}train\.py\)\$/\1$blob\2/" | git mktree)
    start=$(git commit-tree "$tree" -p HEAD -m "Session $tag: train on $name")
  fi
elif [ "$(git cat-file blob "$start:train.py" | dataset_of /dev/stdin)" != "$name" ]; then
  die "TAG=$tag is taken: choose another one, or go on with it: git checkout $SESSIONS/$tag"
fi
# In this order: a branch that is there is a session with a start, and HEAD comes last.
helper session --tag="$tag" --open || exit 1
git update-ref "refs/experiments/$tag/start" "$start" || fail
git update-ref "$branch" "$start" || fail
put_train "$start" || fail
git symbolic-ref HEAD "$branch" || fail

case ${TUNE:-} in 0 | no | No | NO | false | off) tune='' ;; *) tune=1 ;; esac
grep -q '^DEPTH = ' train.py || tune='' # another train.py may have nothing to fit
if [ -n "$tune" ] && [ "$prepared" = True ]; then
  if ! scripts/tune.sh --known 2>&1 | sed 's/^error: /tune     /'; then
    echo "tune     nothing fitted (see above): train.py keeps its presets; make tune fits them, and you commit it"
  elif ! git diff --quiet -- train.py; then
    git commit -q -m "Session $tag: sizes fitted to this machine" train.py ||
      die "the session is open, and train.py was fitted, but git could not commit that (see above): commit it yourself"
    git update-ref "refs/experiments/$tag/start" HEAD
  fi
fi

echo "session  $SESSIONS/$tag, from $(short "$(git rev-parse HEAD)"), dataset $name"
next="make baseline"
if [ "$prepared" != True ]; then # nobody but the caller knows the folder of files, and a download takes its time
  if [ -n "$tune" ]; then
    next="make tune && git commit -q -m 'sizes fitted to this machine' train.py; $next"
    echo "tune     not yet: there is no text to time a step with"
  fi
  case $name:${FILES:-} in files:) next="make prepare FILES=dir && $next" ;; *) next="make prepare && $next" ;; esac
fi
echo "next     $next"
