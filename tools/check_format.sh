#!/usr/bin/env bash
# Fails when clang-format would change a tracked C++ or CUDA file. One major version, since each formats a little differently.
#   check_format.sh              checks the repository
#   check_format.sh --self-test  proves that a badly formatted file, and a missing program, are refused
# CLANG_FORMAT names another program of the same major version.
set -euo pipefail
readonly version=14
cd "$(dirname "$0")/.."

check() {  # check FILE...
  local program=${CLANG_FORMAT:-clang-format-$version}
  if ! command -v "$program" >/dev/null; then
    echo "check_format: $program is not installed; as root: apt-get install clang-format-$version, or set CLANG_FORMAT" >&2
    return 1
  fi
  if ! "$program" --version | grep -q "version $version\."; then
    echo "check_format: $program is '$("$program" --version)', expected major version $version" >&2
    return 1
  fi
  if [ $# = 0 ]; then
    echo "check_format: no C++ file is tracked here: nothing was checked" >&2
    return 1
  fi
  "$program" --dry-run -Werror --style=file:"$PWD/.clang-format" "$@"
}

if [ "${1-}" = --self-test ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  printf 'int f(int a) { return a; }\n' >"$folder/good.cc"
  printf 'int f( int a ) {return a;}\n' >"$folder/bad.cc"
  fail() { echo "check_format --self-test: $1" >&2; exit 1; }
  check "$folder/good.cc" || fail "a well formatted file was refused"
  ! check "$folder/bad.cc" 2>/dev/null || fail "a badly formatted file was let through"
  ! check 2>/dev/null || fail "an empty list of files was let through"
  ! CLANG_FORMAT=$folder/none check "$folder/good.cc" 2>/dev/null || fail "a missing program was let through"
  printf '#!/bin/sh\necho clang-format version 3.0.0\n' >"$folder/old"
  chmod +x "$folder/old"
  ! CLANG_FORMAT=$folder/old check "$folder/good.cc" 2>/dev/null || fail "another major version was let through"
  exit 0
fi

mapfile -t files < <(git ls-files '*.h' '*.cuh' '*.inc' '*.cc' '*.cpp' '*.cu')
check "${files[@]}"
