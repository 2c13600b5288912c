# For scripts of lab tests: . "$LAB/library.sh"

# die TEXT: end the script as failed.
die() {
  echo "failed: $*" >&2
  exit 1
}

# soon SECONDS COMMAND...: until the command succeeds; 1 when it does not in time. A look costs an emulated machine tens of
# milliseconds, so there are fewer of them after five seconds.
soon() {
  local limit=$1 end=$((SECONDS + $1))
  shift
  until "$@" > /dev/null 2>&1; do
    [ $SECONDS -lt "$end" ] || return 1
    if [ $((end - SECONDS)) -gt $((limit - 5)) ]; then sleep 0.1; else sleep 1; fi
  done
}

# await SECONDS COMMAND...: the same; the script fails when it does not in time.
await() { soon "$@" || die "waited $1 s for: ${*:2}"; }

# interrupt TYPE ANSWERED: a command that types Ctrl-C and a question behind it, again until the other says that the shell
# has answered. bash takes a Ctrl-C that comes as its loop's command ends for that command's own, and goes on; what was typed
# behind it is gone with the next Ctrl-C.
interrupt() {
  local try
  for try in 1 2 3 4; do
    "$1"
    soon 60 "$2" && return
  done
  die "no answer after Ctrl-C"
}

# await_text SECONDS FILE TEXT: until a file has a line with this text.
await_text() { await "$1" grep -qF -- "$3" "$2"; }

# await_end SECONDS PID: until a child has ended; sets `ended` to its exit code.
await_end() {
  await "$1" eval "! kill -0 $2"
  wait "$2"
  ended=$?
}
