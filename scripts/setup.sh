#!/usr/bin/env bash
# make setup TAG=nov24 [DATASET=climbmix] [BUDGET=300] [TIMEOUT=600] [TUNE=0] [NPROC=2] [HOSTS=mac1.local,mac2.local]
#            [DEVICE=1] [FILES=dir] [COLUMN=name]: open a session.
#
# That is a branch autoresearch/TAG, the dataset in train.py, and a fresh results.tsv. What it is given holds for every
# later command of the session. Where the dataset is prepared, train.py is fitted to this machine (make tune), and that
# is the session's first commit; TUNE=0 leaves it out. At the end it says what to type next.
# What was cut short is completed by the same command.
. "$(dirname "$0")/lib.sh"

tag=${TAG:-} branch=refs/heads/$SESSIONS/${TAG:-}
read_git
[ -n "$tag" ] || die "TAG is missing: make setup TAG=nov24 [DATASET=climbmix]"
[ -n "$HEAD" ] ||
  die "a session needs git, and here a repository with a commit: git init && git add -A && git commit -m start"
if ! [[ "$tag" =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$ ]] || ! git check-ref-format "$branch"; then
  die "TAG=$tag cannot name a branch $SESSIONS/TAG: letters, digits, '.', '_' and '-', please"
fi
# A session in which nothing was done yet is begun anew: this command was cut short, or is typed twice.
begun=$(git rev-parse -q --verify "refs/experiments/$tag/start^{commit}") || begun=''
only="$begun refs/experiments/$tag/start "
case $(git for-each-ref --format='%(objectname) %(refname)' "refs/experiments/$tag/" "$branch" | tr '\n' ' ') in
  '' | "$only" | "$only$begun $branch ") ;;
  *) die "TAG=$tag is taken: choose another one, or go on with that session: git checkout $SESSIONS/$tag" ;;
esac
git var GIT_COMMITTER_IDENT >/dev/null 2>&1 || # found out now, not at the first experiment
  die "git knows no author for commits: git config user.name agent && git config user.email agent@localhost"
dirty=$(git status --porcelain --untracked-files=no | sed 's/^...//' | tr '\n' ' ')
[ "${begun:+begun} $dirty" != "begun train.py " ] ||
  [ "$(git hash-object train.py)" != "$(git rev-parse "$begun:train.py")" ] || dirty='' # that much was done
[ -z "$dirty" ] || die "the tree is dirty ($dirty): commit that or put it back, then make setup again"

# What the agent commits outlives a power cut; by default git leaves new commits and refs to the system.
git config --get core.fsync >/dev/null || git config core.fsync committed || say "note: core.fsync could not be set"
opened=$(helper run.setup --tag="$tag" --head="$HEAD" --dataset="${DATASET:-}") || exit 1
read -r name prepared start <<<"$opened"
# In this order: a branch that is there is a session with a start, and HEAD comes last.
{ git update-ref "refs/experiments/$tag/start" "$start" && git update-ref "$branch" "$start" &&
  put_train "$start" && git symbolic-ref HEAD "$branch"; } ||
  die "the session is not open yet (see above): mend that, and run the same again"

case ${TUNE:-} in 0 | no | No | NO | false | off) tune='' ;; *) tune=1 ;; esac
grep -q '^DEPTH = ' train.py || tune='' # another train.py may have nothing to fit
if [ -n "$tune" ] && [ "$prepared" = True ]; then
  if ! scripts/tune.sh --known 2>&1 | sed 's/^error: /tune     /'; then
    echo "tune     nothing was fitted: train.py keeps its presets"
  elif ! git diff --quiet -- train.py; then
    git commit -q -m "Session $tag: sizes fitted to this machine" train.py
    git update-ref "refs/experiments/$tag/start" HEAD
  fi
fi

echo "session  $SESSIONS/$tag, from $(short "$(git rev-parse HEAD)"), dataset $name"
next="make baseline"
if [ "$prepared" != True ]; then # nobody but the caller knows the folder of files, and a download takes its time
  [ -z "$tune" ] || next="make tune && git commit -q -m 'sizes fitted to this machine' train.py; $next"
  case $name:${FILES:-} in files:) next="make prepare FILES=dir && $next" ;; *) next="make prepare && $next" ;; esac
fi
echo "next     $next"
