# For scripts of lab tests: . "$LAB/library.sh"

# die TEXT: end the script as failed.
die() {
  echo "failed: $*" >&2
  exit 1
}

# await SECONDS COMMAND...: until the command succeeds; the script fails when it does not in time. A look costs an emulated
# machine tens of milliseconds, so there are fewer of them after five seconds.
await() {
  local limit=$1 end=$((SECONDS + $1))
  shift
  until "$@" > /dev/null 2>&1; do
    [ $SECONDS -lt "$end" ] || die "waited $limit s for: $*"
    if [ $((end - SECONDS)) -gt $((limit - 5)) ]; then sleep 0.1; else sleep 1; fi
  done
}

# await_text SECONDS FILE TEXT: until a file has a line with this text.
await_text() { await "$1" grep -qF -- "$3" "$2"; }

# await_end SECONDS PID: until a child has ended; sets `ended` to its exit code.
await_end() {
  await "$1" eval "! kill -0 $2"
  wait "$2"
  ended=$?
}
