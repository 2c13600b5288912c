# Boots the stock Debian guest in each way that a kernel can be given, and goes through its ends. Per case, $OUT has
# CASE.console, CASE.stderr and CASE.rc; a case that hangs is ended and has rc 124.
. "$LAB/library.sh" || exit 2 # deploy/lab.sh run --put tests/lab/library.sh
limit=$1
words="root=/dev/vda1 console=ttyS0 quiet"
fresh() { cp --sparse=always ~/workloads/focal.raw /tmp/focal.raw; }

# boot CASE ARGUMENT...: a guest that answers one question and powers off by itself
boot() {
  local name=$1
  shift
  fresh
  timeout --foreground -k 5 "$limit" cloud-hypervisor "$@" --disk path=/tmp/focal.raw path=~/workloads/tmp.img \
    --memory size=512M --serial tty --console off --api-socket=/tmp/api.$name \
    < /dev/null > "$OUT/$name.console" 2> "$OUT/$name.stderr"
  echo $? > "$OUT/$name.rc"
  [ -e /tmp/api.$name ] && echo "the API socket is left" >> "$OUT/$name.stderr"
}

boot bzimage --kernel ~/workloads/bzImage --initramfs ~/workloads/initrd \
  --cmdline "$words guest.sh=md5sum^/dev/vdb;cat^/proc/cmdline"
boot uki --kernel ~/workloads/focal.efi --cmdline "$words guest.sh=md5sum^/dev/vdb;cat^/proc/cmdline"
boot elf --kernel ~/workloads/vmlinux --cpus boot=2 --cmdline "$words guest.sh=md5sum^/dev/vdb;nproc"

# One guest with a person at its console: reboot, then the power button.
fresh
mkfifo /tmp/keys
exec 7<> /tmp/keys
console=$OUT/reboot.console
timeout --foreground -k 5 $((2 * limit)) cloud-hypervisor --kernel ~/workloads/vmlinux --disk path=/tmp/focal.raw \
  --memory size=512M --cmdline "$words" --serial tty --console off --api-socket=/tmp/api.reboot \
  < /tmp/keys > "$console" 2> "$OUT/reboot.stderr" &
vmm=$!
# Not `die` when something does not happen: what was seen until then goes to the tests.
(
  set -e
  prompts() { [ "$(grep -c 'automatic login' "$console")" -ge "$1" ] && grep -q 'root@focal' <(tail -c 60 "$console"); }
  await "$limit" prompts 1
  echo 'echo boot=$(cat /proc/sys/kernel/random/boot_id)' >&7
  await "$limit" grep -qE 'boot=[0-9a-f]' "$console"
  ch-remote --api-socket /tmp/api.reboot ping > "$OUT/ping.1"
  echo reboot >&7
  await "$limit" prompts 2
  echo 'echo again=$(cat /proc/sys/kernel/random/boot_id)' >&7
  await "$limit" grep -qE 'again=[0-9a-f]' "$console"
  ch-remote --api-socket /tmp/api.reboot ping > "$OUT/ping.2"
  ch-remote --api-socket /tmp/api.reboot power-button
  echo pressed > "$OUT/pressed"
  await "$limit" eval "! kill -0 $vmm"
)
driven=$?
[ $driven -eq 0 ] || kill $vmm
wait $vmm
echo $? > "$OUT/reboot.rc"
exit $driven
