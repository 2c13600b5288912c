#!/bin/bash
# Set up, then check everything: ruff, mypy --strict, and the tests of every floor that this machine can run.
#
#   deploy/test.sh                      all floors
#   deploy/test.sh unit|probe|lab ...   some of them
#   deploy/test.sh FLOOR -- PYTEST-ARGUMENTS
#
# unit needs nothing; probe a /dev/kvm; lab builds and starts the lab (see deploy/lab/README.md). The lab emulates one
# CPU, so its tests run beside the others; their lines begin with "lab:".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

floors=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    unit | probe | lab) floors+=("$1") ;;
    *) echo "test: no floor is called $1; there are unit, probe and lab" >&2; exit 2 ;;
  esac
  shift
done
[ "${1:-}" = -- ] && shift
[ ${#floors[@]} -gt 0 ] || floors=(unit probe lab)

python=$(bash deploy/setup.sh | tail -n 1)/python

here=() lab=''
for floor in "${floors[@]}"; do
  case $floor in
    unit) here+=("(not probe and not lab and not external)") ;;
    *)
      if ! reason=$("$python" -m deploy.floors "$floor"); then
        echo "test: no $floor floor: $reason"
      elif [ "$floor" = probe ]; then
        here+=(probe)
      else
        bash deploy/lab.sh build # before pytest, whose limits are for tests and not for debootstrap
        lab=yes
      fi ;;
  esac
done
[ ${#here[@]} -gt 0 ] || [ -n "$lab" ] || { echo "test: no floor can run here" >&2; exit 1; }

# tests EXPRESSION PYTEST-ARGUMENT...
tests() {
  local code=0
  "$python" -m pytest -q -m "$1" --durations=15 "${@:2}" || code=$?
  # Exit code 5: nothing was selected. With arguments of the user's own that may be meant.
  [ "$code" -eq 5 ] && [ $# -gt 1 ] && code=0
  return "$code"
}

beside='' code=0
if [ -n "$lab" ]; then
  tests lab "$@" 2>&1 | sed -u 's/^/lab: /' &
  beside=$!
fi
if [ ${#here[@]} -gt 0 ]; then
  printf -v expression '%s or ' "${here[@]}"
  # By whole lines: two of these write here side by side.
  tests "${expression% or }" "$@" 2>&1 | sed -u '' || code=$?
fi
if [ -n "$beside" ]; then
  wait "$beside" || code=$?
fi
exit "$code"
