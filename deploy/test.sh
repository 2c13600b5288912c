#!/bin/bash
# Set up, then check everything: ruff, mypy --strict, and the tests of every floor that this machine can run.
#
#   deploy/test.sh                      all floors
#   deploy/test.sh unit|probe|lab ...   some of them
#   deploy/test.sh FLOOR -- PYTEST-ARGUMENTS
#
# unit needs nothing; probe a /dev/kvm; lab builds and starts the lab (see deploy/lab/README.md).
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

selected=()
for floor in "${floors[@]}"; do
  case $floor in
    unit) selected+=("(not probe and not lab and not external)") ;;
    probe)
      if reason=$("$python" -m deploy.floors probe); then selected+=(probe); else echo "test: no probe floor: $reason"; fi ;;
    lab)
      if ! reason=$("$python" -m deploy.floors lab); then
        echo "test: no lab floor: $reason"
      else
        bash deploy/lab.sh build # before pytest, whose limits are for tests and not for debootstrap
        selected+=(lab)
      fi ;;
  esac
done
[ ${#selected[@]} -gt 0 ] || { echo "test: no floor can run here" >&2; exit 1; }

printf -v expression '%s or ' "${selected[@]}"
code=0
"$python" -m pytest -q -m "${expression% or }" --durations=15 "$@" || code=$?
# Exit code 5: nothing was selected. That is no failure of a floor that has no test yet.
[ "$code" -eq 5 ] && [ "${#floors[@]}" -lt 3 ] && code=0
exit "$code"
