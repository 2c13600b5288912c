#!/bin/bash
# The demo's job in the lab.
exec python3 -m deploy.demo.inside "$@"
