#!/bin/bash
# Set up, then check everything: ruff, mypy --strict, and the tests of every floor that this machine can run.
#
#   deploy/test.sh                      all floors
#   deploy/test.sh unit|probe|lab ...   some of them
#   deploy/test.sh soak                 hop after hop in the lab, many minutes; in no other floor
#   deploy/test.sh FLOOR -- PYTEST-ARGUMENTS
#
# unit needs nothing; probe a /dev/kvm; lab builds and starts the lab (see deploy/lab/README.md). The floors run side by
# side: the lab emulates one CPU, and much of what the others do is waiting. Each line begins with its floor.
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
  echo "test: the soak floor is left out: twenty hops on an emulated machine (bash deploy/test.sh soak)"
fi
chosen=("$@")

python=$(bash deploy/setup.sh | tail -n 1)/python
said=$(mktemp -d)
trap 'rm -rf "$said"' EXIT

declare -A expression=([unit]="not probe and not lab and not external" [probe]=probe [lab]="lab and not soak" [soak]=soak)
declare -A running=()

# tests FLOOR: its tests, every line with its name, and once more in a file for the sum at the end
tests() {
  local code=0 verbose=()
  [[ "$1" = lab || "$1" = soak ]] && verbose=(-vv) # minutes each: a line when one has ended
  "$python" -m pytest -q -m "${expression[$1]}" --durations=15 "${verbose[@]}" "${chosen[@]}" || code=$?
  # Exit code 5: nothing was selected. With arguments of the user's own that may be meant.
  [ "$code" -eq 5 ] && [ ${#chosen[@]} -gt 0 ] && code=0
  return "$code"
}

for floor in "${floors[@]}"; do
  if [ "$floor" != unit ] && ! reason=$("$python" -m deploy.floors "${floor/soak/lab}"); then
    echo "test: no $floor floor: $reason"
    continue
  fi
  if [[ "$floor" = lab || "$floor" = soak ]]; then
    bash deploy/lab.sh build # before pytest, whose limits are for tests and not for debootstrap
  fi
  tests "$floor" 2>&1 | tee "$said/$floor" | sed -u "s/^/$floor: /" &
  running[$floor]=$!
done
[ ${#running[@]} -gt 0 ] || { echo "test: no floor can run here" >&2; exit 1; }

code=0
for floor in "${!running[@]}"; do
  wait "${running[$floor]}" || { code=$?; echo "test: the $floor floor failed"; }
done

# sum WORD: of what pytest's last lines say
sum() { tail -qn 1 "$said"/* | grep -oE "[0-9]+ $1" | awk '{ n += $1 } END { print n + 0 }'; }
echo "$(sum passed) passed, $(($(sum failed) + $(sum error))) failed, $(sum skipped) skipped"
exit "$code"
