# What a host does to a VM: its clock steps, a network interface is set down, the out-of-memory killer takes a process, a
# disk is pulled out. A Debian guest verifies a disk all the while and answers to pings. Prints one line for each.
. "$LAB/library.sh" || exit 2 # deploy/lab.sh run --put tests/lab/library.sh
modprobe -a tun sd_mod # nobody here loads a module because a disk has come
modprobe scsi_debug dev_size_mb=16 || die "no scsi_debug"
block() { ls /sys/bus/pseudo/drivers/scsi_debug/adapter0/host*/target*/*/block; }
await 60 block
pulled=$(block)
truncate -s 4M /tmp/verified.img
mkfifo /tmp/keys
exec 7<> /tmp/keys
console=$OUT/console
cloud-hypervisor --kernel ~/workloads/vmlinux --disk path=~/workloads/focal.raw path=/tmp/verified.img path="/dev/$pulled" \
  --memory size=512M --cmdline "root=/dev/vda1 console=ttyS0 quiet" --net tap=vmtap0,ip=192.168.249.1 \
  --serial tty --console off --api-socket=/tmp/api --event-monitor path="$OUT/events" \
  < /tmp/keys > "$console" 2> "$OUT/stderr" &
vmm=$!
await 240 grep -q 'root@focal' "$console"
echo 'modprobe virtio_net; ip addr add 192.168.249.2/24 dev eth0; ip link set eth0 up; verify /dev/vdb & echo ready=$?' >&7
await 120 grep -q 'ready=0' "$console"
pings() { ping -c 1 -W 5 192.168.249.2; }
await 60 pings

# verified: five more seconds' worth of verified blocks
verified() {
  local before
  before=$(grep -c 'verify: ok' "$console")
  more() { [ "$(grep -c 'verify: ok' "$console")" -ge $((before + 5)) ]; }
  await 120 more
  # Not just any error behind a "verify:": the kernel writes its own about the pulled disk into the middle of lines.
  ! grep -a 'verify: BAD\|verify: write:\|verify: read:\|verify: /dev/' "$console" >&2 || die "the verified disk is not whole"
}
fleet() { ch-remote --api-socket=/tmp/api fleet; }
restarts() { fleet | python3 -c 'import json, sys; print(sum(row["restarts"] for row in json.load(sys.stdin)))'; }
pid_of() { fleet | python3 -c 'import json, sys; print(*(r["pid"] for r in json.load(sys.stdin) if r["device"] == sys.argv[1]))' "$1"; }

verified
[ "$(restarts)" = 0 ] || die "restarts before anything happened"

date -s '+1 hour' > /dev/null
verified
date -s '-2 hours' > /dev/null
verified
pings > /dev/null || die "no answer after the clock's steps"
echo "clock: $(restarts) restarts"

ip link set vmtap0 down
echo 'ping -c 2 -W 1 192.168.249.1' >&7
await 60 grep -q 'the TAP refuses frames' "$OUT/stderr"
verified
ip link set vmtap0 up
await 60 pings
echo "interface: $(restarts) restarts"

disk=$(pid_of _disk1)
echo 1000 > "/proc/$disk/oom_score_adj"
echo f > /proc/sysrq-trigger
await 60 eval '! [ -e /proc/'"$disk"' ]'
verified
[ "$(pid_of _disk1)" != "$disk" ] || die "the disk's process is the same"
echo "out of memory: $(restarts) restarts"

echo 1 > "/sys/block/$pulled/device/delete"
echo 'dd if=/dev/vdc of=/dev/null bs=4k count=1 iflag=direct; echo read=$?' >&7
await 120 grep -q 'read=1' "$console"
verified
pings > /dev/null || die "no answer after the disk was pulled out"
echo "disk: $(grep -c "/dev/$pulled.*\(No such device\|Input/output error\)" "$OUT/stderr" | sed 's/^[1-9].*/told/')"
ch-remote --api-socket=/tmp/api pause && ch-remote --api-socket=/tmp/api resume || die "pause and resume"
verified

echo 'kill %1; poweroff' >&7
await_end 120 $vmm
echo "vmm: $ended"
