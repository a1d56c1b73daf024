# What the scripts of this folder share. A script sets NAME, includes this, defines `launch K` and `answers K`, and
# calls `main "$@"`.
#
#   start    [--nodes N] [--node K] [--dir DIR] [--heap SIZE] [--set LINE]… [--owner PID]
#   stop     [--node K] [--dir DIR]     ends it, by force after a while
#   wipe     [--dir DIR]                stops it and removes its directory
#   describe [--dir DIR]                the line that start printed
#   fetch                               what start would need from a network
#
# Nodes listen on loopback only, on ports that were free; a directory keeps its ports, so that a node comes back where
# it was. `--node K` starts or stops one node of a cluster. With `--owner` everything stops when that process is gone.
set -euo pipefail
shopt -s nullglob

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
SERVERS=${PATCHBAY_SERVERS:-$ROOT/target/servers}
READY_S=120
STOP_S=20
LOG_LINES=25

fail() {
  echo "$NAME: $*" >&2
  exit 1
}

usage() {
  sed -n 's/^#   //p' "$HERE/lib.sh" | sed "s/^/$NAME /" >&2
  exit 64
}

# Ports that nobody listens on, on every address that a node may have: free_ports COUNT
free_ports() {
  python3 - "$1" <<'PY'
import socket, sys

held, ports = [], []
while len(ports) < int(sys.argv[1]):
    first = socket.socket()
    first.bind(("127.0.0.1", 0))
    port = first.getsockname()[1]
    held.append(first)
    try:
        for address in ("127.0.0.2", "127.0.0.3"):
            other = socket.socket()
            held.append(other)
            other.bind((address, port))
    except OSError:
        continue
    ports.append(port)
print(*ports)
PY
}

# A process of this directory and of nobody else: alive K
alive() {
  local pid
  pid=$(cat "$DIR/node$1/pid" 2>/dev/null) || return 1
  # No pipe: a reader that has found what it wants would break the writer off, and that looks like a failure.
  { grep -qzF -- "$DIR/node$1/" "/proc/$pid/cmdline" && ! grep -q '^State:.Z' "/proc/$pid/status"; } 2>/dev/null
}

stop_node() {
  local k=$1 pid
  alive "$k" || return 0
  pid=$(cat "$DIR/node$k/pid")
  # One that is frozen hears nothing.
  kill -CONT "$pid" 2>/dev/null || true
  kill -TERM "$pid" 2>/dev/null || true
  for _ in $(seq $((STOP_S * 20))); do
    alive "$k" || return 0
    sleep 0.05
  done
  kill_node "$k"
}

kill_node() {
  local k=$1
  alive "$k" || return 0
  kill -KILL "$(cat "$DIR/node$k/pid")" 2>/dev/null || true
  for _ in $(seq 100); do
    alive "$k" || return 0
    sleep 0.05
  done
  fail "node $k does not end"
}

each_node() {
  local d
  for d in "$DIR"/node*/; do
    d=${d%/}
    "$1" "${d##*node}" &
  done
  wait
}

describe() {
  local nodes="" addresses="" k pid
  for k in $(seq "$(cat "$DIR/nodes")"); do
    pid=null
    alive "$k" && pid=$(cat "$DIR/node$k/pid")
    nodes+="${nodes:+,}{\"address\":\"$(address "$k")\",\"pid\":$pid}"
    addresses+="${addresses:+,}$(address "$k")"
  done
  printf '{"server":"%s","dir":"%s","addresses":"%s","nodes":[%s]}\n' "$NAME" "$DIR" "$addresses" "$nodes"
}

wait_ready() {
  local k=$1
  for _ in $(seq $((READY_S * 20))); do
    if ! alive "$k"; then
      tail -n $LOG_LINES "$DIR/node$k/log" >&2
      fail "node $k ended before it was ready"
    fi
    answers "$k" && return 0
    sleep 0.05
  done
  tail -n $LOG_LINES "$DIR/node$k/log" >&2
  fail "node $k did not answer in $READY_S s"
}

# Jars by their coordinates, once for all, and as they were when this was written: jars NAME
jars() {
  local name=$1 lib=$SERVERS/$1-$(sha256sum <"$HERE/conf/$1.sha256" | cut -c1-12)
  if [ ! -d "$lib" ]; then
    command -v mvn >/dev/null || fail "missing: mvn (Debian: apt-get install maven)"
    local fresh
    mkdir -p "$SERVERS"
    fresh=$(mktemp -d "$SERVERS/$name.XXXXXX")
    cp "$HERE/conf/$name-pom.xml" "$fresh/pom.xml"
    mvn -q -B -f "$fresh/pom.xml" dependency:copy-dependencies -DincludeScope=runtime \
      -DoutputDirectory="$fresh/lib" >"$fresh/log" 2>&1 || { tail -n $LOG_LINES "$fresh/log" >&2; fail "jars do not resolve"; }
    (cd "$fresh/lib" && sha256sum --check --quiet --strict "$HERE/conf/$name.sha256") >&2 || fail "jars are not the ones that were checked"
    [ "$(find "$fresh/lib" -name '*.jar' | wc -l)" = "$(wc -l <"$HERE/conf/$name.sha256")" ] || fail "jars that nobody asked for"
    # Whoever comes second finds the first one's.
    mv -T "$fresh/lib" "$lib" 2>/dev/null || true
    rm -rf "$fresh"
  fi
  echo "$lib"
}

# Starts the nodes that are wanted and do not run, and waits until they answer.
start_nodes() {
  local k wanted
  wanted=${NODE:-$(seq "$NODES")}
  for k in $wanted; do
    [ "$k" -le "$NODES" ] || fail "there is no node $k"
    alive "$k" && continue
    mkdir -p "$DIR/node$k"
    : >"$DIR/node$k/log"
    launch "$k"
  done
  for k in $wanted; do wait_ready "$k"; done
}

# A first start. Somebody may take a port between its choice and its use: then others are chosen.
start_anew() {
  local attempt settings=("${SETTINGS[@]}")
  for attempt in 1 2 3; do
    echo "$NODES" >"$DIR/nodes"
    rm -f "$DIR/settings"
    SETTINGS=("${settings[@]}")
    read -r -a PORT <<<"$(free_ports "$PORTS")"
    echo "${PORT[*]}" >"$DIR/ports"
    if (start_nodes); then return 0; fi
    each_node stop_node
    rm -rf "$DIR"/node*/ "$DIR/ports"
    echo "$NAME: attempt $attempt failed" >&2
  done
  fail "it does not start"
}

start() {
  mkdir -p "$DIR"
  DIR=$(cd "$DIR" && pwd)
  exec 9>"$DIR/lock"
  flock 9
  # Before anything runs, so that nothing outlives an owner that goes in the middle of a start.
  if [ -n "$OWNER" ]; then
    (
      exec 9>&- >/dev/null 2>&1 </dev/null
      trap '' INT TERM HUP
      while kill -0 "$OWNER" 2>/dev/null && [ -d "$DIR" ]; do sleep 1; done
      [ -d "$DIR" ] && exec "$HERE/$NAME" wipe --dir "$DIR"
    ) &
    disown
  fi
  prepare
  if [ -s "$DIR/ports" ]; then
    NODES=$(cat "$DIR/nodes")
    read -r -a PORT <"$DIR/ports"
    start_nodes
  else
    start_anew
  fi
  describe
}

# What `--set` adds to a server's own settings, now and at its next starts: settings_into FILE
settings_into() {
  local line
  for line in "${SETTINGS[@]}"; do echo "$line" >>"$DIR/settings"; done
  SETTINGS=()
  [ ! -s "$DIR/settings" ] || cat "$DIR/settings" >>"$1"
}

# Starts a node's process in a session of its own, so that a terminal's Ctrl-C does not reach it: run K COMMAND…
run() {
  local k=$1
  shift
  setsid "$@" >>"$DIR/node$k/log" 2>&1 </dev/null 9>&- &
  local pid=$!
  echo "$pid" >"$DIR/node$k/pid"
  # Until then it goes by this script's name, and looks like somebody else's process.
  while kill -0 "$pid" 2>/dev/null && ! alive "$k"; do sleep 0.01; done
}

main() {
  local action=${1:-}
  [ $# -eq 0 ] || shift
  DIR=$SERVERS/data/$NAME NODES=1 NODE="" OWNER="" HEAP="" SETTINGS=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --dir) DIR=$2 ;;
      --nodes) NODES=$2 ;;
      --node) NODE=$2 ;;
      --heap) HEAP=$2 ;;
      --set) SETTINGS+=("$2") ;;
      --owner) OWNER=$2 ;;
      *) usage ;;
    esac
    shift 2 || usage
  done
  case "$action" in
    start) start ;;
    fetch) prepare ;;
    stop | wipe | describe)
      [ -d "$DIR" ] || { [ "$action" = wipe ] && exit 0; fail "$DIR is not there"; }
      DIR=$(cd "$DIR" && pwd)
      [ ! -s "$DIR/ports" ] || read -r -a PORT <"$DIR/ports"
      case "$action" in
        describe) describe ;;
        stop) if [ -n "$NODE" ]; then stop_node "$NODE"; else each_node stop_node; fi ;;
        wipe)
          [ -e "$DIR/lock" ] || fail "$DIR is none of ours"
          # What it holds goes: nothing has to be written down in order.
          each_node kill_node
          rm -rf "$DIR"
          ;;
      esac
      ;;
    *) usage ;;
  esac
}
