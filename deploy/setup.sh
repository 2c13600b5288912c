#!/bin/bash
# Install what Flotilla needs and nothing more. The last line on stdout is the folder that holds cloud-hypervisor,
# flotilla, ch-remote and python; every step is said on stderr. The second time it changes nothing.
#
# FLOTILLA_CACHE   where everything is kept (default ${XDG_CACHE_HOME:-~/.cache}/flotilla)
# FLOTILLA_PYTHON  the Python to run with (default: the system's, else the first of PATH that is 3.11 or later)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

recent='import sys; sys.exit(sys.version_info < (3, 11))'
for python in "${FLOTILLA_PYTHON:-/usr/bin/python3}" python3 python3.14 python3.13 python3.12 python3.11; do
  found=$(command -v "$python") && "$found" -IS -c "$recent" 2>/dev/null && exec "$found" -I "$here/install.py" "$@"
done
echo "setup: no Python of version 3.11 or later in PATH; on Debian 12: apt-get install python3" >&2
exit 1
