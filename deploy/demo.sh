#!/bin/bash
# The live-migration document's examples, shown while they happen: demo.sh [local|nested] [--report FILE] [--no-lab]
# Installs what is missing, builds images, starts the lab where /dev/kvm can't run Linux. See deploy/demo/.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=$(bash "$here/setup.sh" | tail -n 1) || { echo "demo: setup failed, see above" >&2; exit 1; }
export PATH="$PATH:/usr/sbin:/sbin"
exec "$bin/python" -m deploy.demo "$@"
