#!/bin/bash
# Verified load on a disk, for ever: passes of random writes, eight at a time, each read back (fio.sh DEVICE). A pass ends with
# "fio: ok N"; the first error of any kind with "fio: BAD", what fio said, and exit code 1.
pass=0
while :; do
  fio --name=verified --filename="$1" --size=8M --bs=4k --rw=randwrite --direct=1 --ioengine=libaio --iodepth=8 --fsync=64 \
    --verify=crc32c --verify_fatal=1 --randseed=$((++pass)) > /tmp/fio.log 2>&1 || break
  echo "fio: ok $pass"
done
echo "fio: BAD pass $pass"
cat /tmp/fio.log
exit 1
