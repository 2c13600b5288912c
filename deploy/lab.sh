#!/bin/bash
# The lab: lab.sh build | shell | run SCRIPT [ARG...]   (lab.sh --help; deploy/lab/README.md)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=$(bash "$here/setup.sh" | tail -n 1)
export PATH="$PATH:/usr/sbin:/sbin"
exec "$bin/python" -m deploy.lab "$@"
