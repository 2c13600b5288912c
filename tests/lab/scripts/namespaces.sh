# Debian moves by tcp from host a to host b (network namespaces with a bridge, a TAP and a cable each), while host c pings it
# and has an iperf3 connection to it. Prints exit codes, and on stderr the longest silence.
. "$LAB/library.sh" || exit 2 # deploy/lab.sh run --put tests/lab/library.sh
modprobe -a tun bridge veth
ip link add br0 type bridge
ip link set br0 up
for host in a b c; do
  ip netns add $host
  ip link add cable_$host type veth peer name port netns $host
  ip link set cable_$host master br0 up
  ip -n $host link set lo up
done
for host in a b; do
  ip -n $host link add br0 type bridge
  ip -n $host tuntap add tap0 mode tap vnet_hdr
  for name in port tap0; do ip -n $host link set $name master br0 up; done
  ip -n $host link set br0 up
done
ip -n a addr add 192.168.50.11/24 dev br0
ip -n b addr add 192.168.50.12/24 dev br0
ip -n c addr add 192.168.50.3/24 dev port
ip -n c link set port up
mkfifo /tmp/keys
exec 7<> /tmp/keys

ip netns exec a cloud-hypervisor --kernel ~/workloads/vmlinux --disk path=~/workloads/focal.raw --memory size=512M \
    --cmdline "root=/dev/vda1 console=ttyS0 quiet" --net tap=tap0,mac=12:34:56:78:90:ab \
    --serial tty --console off --api-socket=/tmp/api1 < /tmp/keys > "$OUT/source" 2> "$OUT/source.stderr" &
source=$!
await 240 grep -q 'root@focal' "$OUT/source"
echo 'modprobe virtio_net; ip addr add 192.168.50.2/24 dev eth0; ip link set eth0 up; iperf3 -s -D; echo ready=$?' >&7
await 120 grep -q 'ready=0' "$OUT/source"
ip netns exec b cloud-hypervisor --api-socket=/tmp/api2 > "$OUT/destination" 2> "$OUT/destination.stderr" < /tmp/keys &
destination=$!
await 120 test -S /tmp/api2

await 60 ip netns exec c ping -c 1 -w 5 192.168.50.2
ip netns exec c ping -D -i 0.2 192.168.50.2 > "$OUT/ping" &
ping=$!
ip netns exec c iperf3 -c 192.168.50.2 -b 1M -t 60 --forceflush > "$OUT/iperf3" 2>&1 &
iperf=$!
await 60 grep -q sec "$OUT/iperf3"

ch-remote --api-socket=/tmp/api2 receive-migration tcp:0.0.0.0:6000 &
receive=$!
await 120 ip netns exec b grep -q ':1770 0.*:0000 0A' /proc/net/tcp
ch-remote --api-socket=/tmp/api1 send-migration tcp:192.168.50.12:6000
echo "send $?"
await_end 120 $receive
echo "receive $ended"
await_end 120 $source
echo "source $ended"
ch-remote --api-socket=/tmp/api2 migration-progress >&2
await_end 180 $iperf
echo "iperf3 $ended"
kill -INT $ping
wait $ping
echo "ping $?"
awk -F'[][ ]' '/icmp_seq/ { if (last && $2 - last > gap) gap = $2 - last; last = $2 } END { printf "longest silence of pings: %d ms\n", gap * 1000 }' \
    "$OUT/ping" >&2
tail -n 3 "$OUT/ping" "$OUT/iperf3" >&2
echo poweroff >&7
await_end 120 $destination
echo "destination $ended"
