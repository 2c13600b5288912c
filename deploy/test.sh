#!/bin/bash
# Set up, then check everything: ruff, mypy --strict, and the tests of every floor that this machine can run.
#
#   deploy/test.sh                      all floors
#   deploy/test.sh unit|probe|lab ...   some of them
#   deploy/test.sh soak                 the lab tests that take many minutes each; they are in no other floor
#   deploy/test.sh FLOOR -- PYTEST-ARGUMENTS
#
# unit needs nothing; probe a /dev/kvm; lab builds and starts the lab (see deploy/lab/README.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

floors=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    unit | probe | lab | soak) floors+=("$1") ;;
    *) echo "test: no floor is called $1; there are unit, probe, lab and soak" >&2; exit 2 ;;
  esac
  shift
done
[ "${1:-}" = -- ] && shift
if [ ${#floors[@]} -eq 0 ]; then
  floors=(unit probe lab)
  echo "test: the soak floor is left out: many minutes of an emulated machine (bash deploy/test.sh soak)"
fi

python=$(bash deploy/setup.sh | tail -n 1)/python

selected=()
for floor in "${floors[@]}"; do
  case $floor in
    unit) selected+=("(not probe and not lab and not external)") ;;
    probe)
      if reason=$("$python" -m deploy.floors probe); then selected+=(probe); else echo "test: no probe floor: $reason"; fi ;;
    lab | soak)
      if ! reason=$("$python" -m deploy.floors lab); then
        echo "test: no $floor floor: $reason"
      else
        bash deploy/lab.sh build # before pytest, whose limits are for tests and not for debootstrap
        if [ "$floor" = soak ]; then selected+=(soak); else selected+=("(lab and not soak)"); fi
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
