# The live-migration document's four commands, typed as they stand (with its forgotten backslash), programs from PATH.
. "$LAB/library.sh" || exit 2 # deploy/lab.sh run --put tests/lab/library.sh
mkfifo /tmp/keys
exec 7<> /tmp/keys

cloud-hypervisor \
    --kernel ~/workloads/vmlinux \
    --disk path=~/workloads/focal.raw \
    --cpus boot=1 --memory size=1G,shared=on \
    --cmdline "root=/dev/vda1 console=ttyS0"  \
    --serial tty --console off --api-socket=/tmp/api1 < /tmp/keys > "$OUT/source" 2> "$OUT/source.stderr" &
source=$!
await 240 grep -q 'root@focal' "$OUT/source"
echo 'echo boot=$(cat /proc/sys/kernel/random/boot_id); ./equal.sh /usr/bin/bash' >&7
await 120 grep -q '^equal' "$OUT/source"

cloud-hypervisor --api-socket=/tmp/api2 > "$OUT/destination" 2> "$OUT/destination.stderr" < /tmp/keys &
destination=$!
await 120 test -S /tmp/api2

ch-remote --api-socket=/tmp/api2 receive-migration unix:/tmp/sock &
receive=$!
await 120 test -S /tmp/sock

ch-remote --api-socket=/tmp/api1 send-migration --local unix:/tmp/sock
echo "send $?"
await_end 120 $receive
echo "receive $ended"
await_end 120 $source
echo "source $ended"
[ -e /tmp/api1 ] && echo "the source's API socket is left"

ch-remote --api-socket=/tmp/api2 info | python3 -c 'import json, sys; print("state", json.load(sys.stdin)["state"])'
await 120 grep -q '^equal' "$OUT/destination"
ask() { printf '\003echo boot=$(cat /proc/sys/kernel/random/boot_id)\n' >&7; }
answered() { grep -qa 'boot=[0-9a-f]' "$OUT/destination"; }
interrupt ask answered
echo poweroff >&7
await_end 120 $destination
echo "destination $ended"
