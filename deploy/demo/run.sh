#!/bin/bash
# The demo's job in the lab: run.sh MODULE [OPTION...]
exec python3 -m "deploy.demo.$1" "${@:2}"
