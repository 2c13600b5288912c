#!/bin/bash
# Fuzz what guests and peers write: deploy/fuzz.sh [--jobs N] MINUTES [TARGET…], each target that long, N at a time (1).
#
# Sets up first, clang too (deploy/setup.sh leaves that out). Exits 1 at a finding and says where the input is and how it is
# replayed; the other targets still run. `deploy/fuzz.sh --list` names the targets. Leave the machine some room: nice -n 15.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/.."
python=$(bash deploy/setup.sh | tail -n 1)/python
exec "$python" -m deploy.fuzz "$@"
