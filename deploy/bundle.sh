#!/bin/bash
# One folder that runs on any Debian 12 with its python3, no pip, no compiler: bundle.sh FOLDER [--force]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=$(bash "$here/setup.sh" | tail -n 1)
exec "$bin/python" -m deploy.bundle "$@"
