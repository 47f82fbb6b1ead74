#!/usr/bin/env bash
# Build a clean Debian in a temporary folder and run the loop in it as an ordinary user, from a fresh clone.
#
# usage: sudo tests/chroot.sh [--suite trixie] [COMMAND …]
#
# Debian's minbase with git, make, python3, python3-venv and ca-certificates, and nothing else: what a tool takes for
# granted shows there. COMMAND is run in the clone of this repository's last commit (make baseline BUDGET=20).
# Needs root, debootstrap and a network. Debian comes from the mirror that apt uses here (MIRROR overrides), packages
# of Python from where pip finds them here: its system-wide configuration is copied in.
# exit: the command's · 1 not built, and why
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd -P) suite=trixie

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

if [ "${1:-}" = --suite ]; then
  suite=$2
  shift 2
fi
[ $# -gt 0 ] || set -- make baseline BUDGET=20
[ "$(id -u)" = 0 ] || die "building a chroot needs root"
command -v debootstrap >/dev/null || die "debootstrap is missing: apt-get install debootstrap"

if [ -z "${CHROOT_INSIDE:-}" ]; then # mounts and processes of its own, which end with it
  folder=$(mktemp -d /var/tmp/autoresearch-chroot.XXXXXX)
  code=0
  CHROOT_INSIDE=$folder unshare --mount --pid --fork --kill-child --mount-proc "$0" --suite "$suite" "$@" || code=$?
  rm -rf --one-file-system "$folder"
  exit "$code"
fi

folder=$CHROOT_INSIDE
# shellcheck disable=SC2016  # apt's own format
mirror=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)}
echo "building Debian $suite in $folder" >&2
scripts=/usr/share/debootstrap/scripts script=$suite
[ -e "$scripts/$suite" ] || script=sid # younger than debootstrap
debootstrap --variant=minbase --include=git,make,python3,python3-venv,ca-certificates \
  "$suite" "$folder" "$mirror" "$scripts/$script" >&2 || die "debootstrap failed (see above)"
chroot "$folder" useradd --create-home worker
mount -t proc proc "$folder/proc"
mount --rbind /dev "$folder/dev"
# names, and what this machine trusts
for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
  [ ! -e "$file" ] || cat "$file" >"$folder$file"
done

clone=/home/worker/autoresearch
git clone -q --no-local "$root" "$folder$clone"
chroot "$folder" chown -R worker: /home/worker
run=(chroot --userspec=worker:worker "$folder" env -i HOME=/home/worker USER=worker PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8)
"${run[@]}" git config --global user.name worker
"${run[@]}" git config --global user.email worker@localhost
# shellcheck disable=SC2016  # the inner shell's
"${run[@]}" sh -c 'cd "$0" && exec "$@"' "$clone" "$@"
