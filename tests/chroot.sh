#!/usr/bin/env bash
# Build a clean Debian in a folder and run the loop in it as an ordinary user, from a fresh clone.
#
# usage: sudo tests/chroot.sh [--arch arm64] [--suite trixie] [--folder DIR] [--small] [COMMAND …]
#
# Debian's minbase with git, make, python3, python3-venv and ca-certificates, and nothing else: what a tool
# takes for granted shows there. COMMAND is run in the clone of this repository's last commit; without one it
# is `make baseline BUDGET=20`. --small commits a train.py of one layer and a text of 200 kB first (the
# repository's own files), for a machine that is emulated: another architecture needs qemu-user-static, and
# patience. Without --folder a temporary folder is used and removed; with it Debian is built there once.
#
# Needs root, debootstrap and a network. Debian comes from the mirror that apt uses here (MIRROR overrides),
# packages of Python from where pip finds them here: its system-wide configuration is copied in.
# exit: the command's · 1 not built, and why
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd -P)

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

arch=$(dpkg --print-architecture 2>/dev/null) || die "this needs Debian or a relative of it"
native=$arch suite=trixie folder='' small=''
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help)
      sed -n -e '1d' -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    --arch) arch=$2 && shift 2 ;;
    --suite) suite=$2 && shift 2 ;;
    --folder) folder=$2 && shift 2 ;;
    --small) small=1 && shift ;;
    -*) die "unknown option $1: see $0 --help" ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || set -- make baseline BUDGET=20
[ "$(id -u)" = 0 ] || die "building a chroot needs root"
command -v debootstrap >/dev/null || die "debootstrap is missing: apt-get install debootstrap"

# Mounts and processes of its own, which end with it.
if [ -z "${CHROOT_INSIDE:-}" ]; then
  temporary=''
  if [ -z "$folder" ]; then
    temporary=$(mktemp -d /var/tmp/autoresearch-chroot.XXXXXX)
    folder=$temporary
  fi
  code=0
  CHROOT_INSIDE=1 unshare --mount --pid --fork --kill-child --mount-proc \
    "$0" --arch "$arch" --suite "$suite" --folder "$folder" ${small:+--small} "$@" || code=$?
  [ -z "$temporary" ] || rm -rf --one-file-system "$temporary"
  exit "$code"
fi

if [ "$arch" != "$native" ]; then # the kernel hands foreign programs to qemu
  case $arch in arm64) machine=aarch64 ;; armhf) machine=arm ;; *) machine=$arch ;; esac
  [ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
  if [ ! -e "/proc/sys/fs/binfmt_misc/qemu-$machine" ]; then
    [ -e "/usr/lib/binfmt.d/qemu-$machine.conf" ] || die "no emulator for $arch: apt-get install qemu-user-static"
    cat "/usr/lib/binfmt.d/qemu-$machine.conf" >/proc/sys/fs/binfmt_misc/register
  fi
fi

if [ ! -e "$folder/.complete" ]; then
  # shellcheck disable=SC2016  # apt's own format
  mirror=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)}
  echo "building Debian $suite for $arch in $folder" >&2
  scripts=/usr/share/debootstrap/scripts script=$suite
  [ -e "$scripts/$suite" ] || script=sid # younger than debootstrap
  debootstrap --variant=minbase --arch="$arch" --include=git,make,python3,python3-venv,ca-certificates \
    "$suite" "$folder" "$mirror" "$scripts/$script" >"$folder.log" 2>&1 || die "debootstrap failed: $(tail -n 3 "$folder.log")"
  rm -rf "$folder.log" "$folder"/var/cache/apt/archives/*.deb
  chroot "$folder" useradd --create-home worker
  touch "$folder/.complete"
fi

mountpoint -q "$folder/proc" || mount -t proc proc "$folder/proc"
mountpoint -q "$folder/dev" || mount --rbind /dev "$folder/dev"
for file in /etc/resolv.conf /etc/hosts /etc/pip.conf; do
  [ ! -e "$file" ] || cat "$file" >"$folder$file"
done
# what this machine trusts, the chroot trusts
trusted=/etc/ssl/certs/ca-certificates.crt
[ ! -e $trusted ] || cat $trusted >"$folder$trusted"

clone=/home/worker/autoresearch
rm -rf "${folder:?}$clone"
git clone -q --no-local "$root" "$folder$clone"
if [ -n "$small" ]; then
  texts=$folder/home/worker/texts
  rm -rf "$texts"
  mkdir "$texts"
  cat "$root"/*.py "$root"/*.md "$root"/scripts/* "$root"/tests/*.py >"$texts/all"
  head -c 200000 "$texts/all" | split -b 4000 --additional-suffix=.txt - "$texts/part-"
  rm "$texts/all"
  sed -i -e 's/^DATASET = .*/DATASET = "files"/' -e 's/^\( *\)\(DEPTH = \)[^#]*/\1\21  /' "$folder$clone/train.py"
fi
chroot "$folder" chown -R worker: /home/worker
run=(chroot --userspec=worker:worker "$folder" env -i HOME=/home/worker USER=worker PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8)
# a server's processor, not all that qemu can do: for SME the OpenBLAS of the lock file has no kernels
[ "$arch" != arm64 ] || run=("${run[@]}" "QEMU_CPU=${QEMU_CPU:-neoverse-n1}")
# shellcheck disable=SC2016  # the inner shell's
in_clone=(sh -c 'cd "$0" && exec "$@"' "$clone")
"${run[@]}" git config --global user.name worker
"${run[@]}" git config --global user.email worker@localhost
if [ -n "$small" ]; then
  "${run[@]}" "${in_clone[@]}" git commit -q -m "one layer, a small text" train.py
  "${run[@]}" "${in_clone[@]}" make prepare FILES=/home/worker/texts
fi
# shellcheck disable=SC2016
"${run[@]}" sh -c '. /etc/os-release; echo "$PRETTY_NAME, $(uname -m), $(python3 -V), $(ldd --version | head -n 1)"' >&2
"${run[@]}" "${in_clone[@]}" "$@"
