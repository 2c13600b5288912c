#!/bin/bash
# The workload of the live-migration document: does the second disk go on saying the same? (equal.sh [DEVICE])
device=${1:-/dev/vdb}
first=$(md5sum "$device")
again=$first
while [[ $again == "$first" ]]; do
  echo equal
  again=$(md5sum "$device")
done
echo "not equal"
echo "first: $first"
echo "again: $again"
