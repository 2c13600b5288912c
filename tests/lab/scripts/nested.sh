# The live-migration document's nested example, typed as it stands into two VMs' serial ports. In a VM what runs on gets a
# window (deploy/lab/host/root/window). $1: more words for all kernels.
. "$LAB/library.sh" || exit 2 # deploy/lab.sh run --put tests/lab/library.sh
words=${1:+ $1}
cd ~/nested
head -c 1M < /dev/urandom > tmp.img # create a dummy image for testing

# Typing: keys of VM n go into descriptor n + 2; steps are numbered, so that each one's end can be told.
step=0
mkfifo /tmp/keys1 /tmp/keys2
exec 3<> /tmp/keys1 4<> /tmp/keys2

# in_vm N SECONDS COMMAND: type it and wait until it has ended with 0.
in_vm() {
  step=$((step + 1))
  echo "$3; echo step-$step=\$?" >&$(($1 + 2))
  await "$2" grep -qE "step-$step=[0-9]" "$OUT/vm-$1"
  grep -qE "step-$step=0" "$OUT/vm-$1" || die "in VM $1: $3"
}

# window N NAME COMMAND, and a window's exit code once it has ended. A progress bar's line is not ended by a newline.
window() { in_vm "$1" 120 "./window $2 '$3'"; }
window_end() {
  await "$3" grep -qaE "$2\|.*window closes with [0-9]" "$OUT/vm-$1"
  grep -oaE "$2\|.*window closes with [0-9]+" "$OUT/vm-$1" | grep -oaE '[0-9]+$'
}
await_equals() { await "$3" eval "[ \$(grep -cE '$2\\| equal' '$OUT/vm-$1') -ge 3 ]"; }

cloud-hypervisor \
        --serial tty --console off \
        --cpus boot=1 --memory size=512M \
        --kernel vmlinux \
        --cmdline "root=/dev/vda1 console=ttyS0$words"  \
        --disk path=focal-1.raw path=focal-nested.raw path=tmp.img\
        --net ip=192.168.101.1 < /tmp/keys1 > "$OUT/vm-1" 2> "$OUT/vm-1.stderr" &
one=$!

cloud-hypervisor \
        --serial tty --console off \
        --cpus boot=1 --memory size=512M \
        --kernel vmlinux \
        --cmdline "root=/dev/vda1 console=ttyS0$words"  \
        --disk path=focal-2.raw path=focal-nested.raw path=tmp.img\
        --net ip=192.168.102.1 < /tmp/keys2 > "$OUT/vm-2" 2> "$OUT/vm-2.stderr" &
two=$!
await 400 grep -q 'root@vm-1:' "$OUT/vm-1"
await 400 grep -q 'root@vm-2:' "$OUT/vm-2"

window 1 source "sudo ./cloud-hypervisor \
        --serial tty --console off \
        --memory size=128M \
        --kernel vmlinux \
        --cmdline \"console=ttyS0 root=/dev/vda1$words\" \
        --disk path=/dev/vdb path=/dev/vdc \
        --api-socket=/tmp/api1 \
        --net ip=192.168.100.1"
in_vm 1 240 'sudo ip addr add 192.168.101.2/24 dev ens4'
in_vm 1 240 'sudo ip link set up dev ens4'
in_vm 1 240 'sudo ip r add default via 192.168.101.1'
await 900 grep -q 'source| .*focal login' "$OUT/vm-1"

window 2 destination 'sudo ./cloud-hypervisor --api-socket=/tmp/api2'
in_vm 2 240 'sudo ip addr add 192.168.102.2/24 dev ens4'
in_vm 2 240 'sudo ip link set up dev ens4'
in_vm 2 240 'sudo ip r add default via 192.168.102.1'
in_vm 2 240 'ping -c 3 192.168.101.2'
echo "ping $?"
in_vm 2 300 'until [ -S /tmp/api2 ]; do sleep 0.3; done'
in_vm 1 120 'echo ./equal.sh /dev/vdb > /tmp/source'
await_equals 1 source 300

window 2 receive 'sudo ./ch-remote --api-socket=/tmp/api2 receive-migration unix:/tmp/sock2'
in_vm 2 240 'until [ -S /tmp/sock2 ]; do sleep 0.3; done'
window 2 relay 'sudo socat TCP-LISTEN:6000,reuseaddr UNIX-CLIENT:/tmp/sock2'
in_vm 2 240 "until grep -q ':1770 0.*:0000 0A' /proc/net/tcp; do sleep 0.3; done"

window 1 relay 'sudo socat UNIX-LISTEN:/tmp/sock1,reuseaddr TCP:192.168.102.2:6000'
in_vm 1 240 'until [ -S /tmp/sock1 ]; do sleep 0.3; done'
began=$SECONDS
window 1 send 'sudo ./ch-remote --api-socket=/tmp/api1 send-migration unix:/tmp/sock1'

echo "send $(window_end 1 send 900)"
echo "source $(window_end 1 source 120)"
echo "send to source exit: $((SECONDS - began)) s" >&2
echo "receive $(window_end 2 receive 120)"
await_equals 2 destination 300
grep -hE '(source|destination)\| not equal' "$OUT/vm-1" "$OUT/vm-2"

ask() { in_vm 2 120 "printf '\\003\\necho shell=\$((6 * 7))\\n' > /tmp/destination"; }
answered() { grep -qa 'destination| .*shell=42' "$OUT/vm-2"; }
interrupt ask answered
in_vm 2 120 'echo poweroff > /tmp/destination'
echo "destination $(window_end 2 destination 240)"
echo poweroff >&3
echo poweroff >&4
await_end 240 $one
echo "vm-1 $ended"
await_end 240 $two
echo "vm-2 $ended"
