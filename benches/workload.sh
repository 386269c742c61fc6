#!/usr/bin/env bash
# Thousands of adapters on one device: throughput, registration, memory, restart, cold adapters, two tenants.
#   workload.sh RUN_FOLDER [ROUNDS] [registry|throughput|busy|tenants ...]
# All parts with 3 rounds: about 20 minutes and 10 GB of disk; other parts' files in the folder are left as they are. Build first: cargo build --release -p openlora-cli -p openlora-benches
set -euo pipefail
mkdir -p "$1"
run=$(realpath "$1")
rounds=${2:-3}
parts=" ${*:3} "
[ $# -gt 2 ] || parts=" registry throughput busy tenants "
wants() { [[ $parts == *" $1 "* ]]; }
cd "$(dirname "$0")/.."
openlora=$PWD/target/release/openlora load=$PWD/target/release/openlora-load
model=${OPENLORA_MODEL_PATH:-$HOME/.cache/openlora/models/SmolLM2-135M-Instruct.Q4_1.gguf}
state=$(mktemp -d)
server=
cleanup() { stop; rm -rf "$state"; }
trap cleanup EXIT

stop() { [ -z "$server" ] || { kill -TERM "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; server=; }; }
# start PAGES: a server with a pool of so many pages.
start() {
  stop
  rm -f "$state/addr"
  OPENLORA_ENGINE_POOL_BYTES=$(($1 * 368640)) "$openlora" serve --json >"$state/addr" 2>>"$state/log" &
  server=$!
  until [ -s "$state/addr" ]; do
    kill -0 "$server" 2>/dev/null || { tail "$state/log" >&2; exit 1; }
    sleep 0.01
  done
  read -r grpc http < <(python3 -c 'import json, sys; a = json.load(open(sys.argv[1])); print(a["grpc"], a["http"])' "$state/addr")
}
replay() {
  local name=$1 trace=$2
  shift 2
  echo "$name …" >&2
  OPENLORA_API_KEY=$(cat "$state/keys/admin") "$load" --server "http://$grpc" --metrics "$http" --trace "$trace" \
    --keys "$state/keys" --json "$@" >"$run/$name.json"
}
# Anonymous memory, kB: what is not a file's.
memory() { awk '/RssAnon/ { print $2 }' "/proc/$server/status"; }

{
  echo "$(date -u +%FT%TZ) commit $(git rev-parse --short HEAD):$parts"
  lscpu | grep -E 'Model name|^CPU\(s\)'
} >>"$run/machine.txt"

mkdir "$state/keys" "$state/files" "$state/traces"
export OPENLORA_MODEL_PATH=$model OPENLORA_ADAPTERS_DATA_DIR=$state/adapters OPENLORA_ADAPTERS_ALLOWED_ROOTS=$state/files \
  OPENLORA_SERVER_KEYS_FILE=$state/keys.json OPENLORA_SERVER_GRPC_ADDR=127.0.0.1:0 OPENLORA_SERVER_HTTP_ADDR=127.0.0.1:0 \
  OPENLORA_SERVER_METRICS_PUBLIC=true
for name in admin only quiet loud; do
  role=$([ "$name" = admin ] && echo admin || echo app)
  "$openlora" key create --role "$role" --name "$name" --json |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["key"])' >"$state/keys/$name"
done
for name in one-r8 two-tenants; do "$load" write "$name" "$state/traces/$name.jsonl"; done
python3 benches/workload.py traces "$state/traces"

# 400 pages: 32 sequences of 96 tokens (192), 64 adapters (192), 16 to move.
start 400
empty=$(memory)
enroll() {
  OPENLORA_API_KEY=$(cat "$state/keys/admin") "$load" register --server "http://$grpc" --trace "$state/traces/$1.jsonl" \
    --model "$model" --folder "$state/files" --concurrency 8 --prefix "$2"
}
# 500 first, so that what the server keeps whatever their number is not counted as theirs.
enroll register-500 bench/first >/dev/null
few=$(memory)
registered=$(enroll register bench/a)
after=$(memory)
began=$(date +%s%N)
start 400
ready=$((($(date +%s%N) - began) / 1000000))
if wants registry; then
  cat >"$run/registry.txt" <<END
$registered (8 at once, local files of 0.9 MB, each on disk before it is answered)
memory without adapters $empty kB; after registering 500: $few kB; after 5,000 more: $after kB; restarted with them: $(memory) kB
stop and start with 5,500 adapters: $ready ms
END
fi

if wants throughput; then
  replay warm-up one-r8 --first 300 --concurrency 32
  for ((round = 1; round <= rounds; round++)); do
    for name in one-r8 zipf-2k-r8 uniform-2k-r8; do replay "$name-$round" "$name" --first 600 --concurrency 32; done
  done
  echo "memory after that, pool of 144,000 kB, host cache of at most 1,048,576 kB: $(memory) kB" >"$run/memory.txt"
fi

if wants busy; then
  start 2500
  replay warm-up "$state/traces/busy-brief.jsonl"
  for ((round = 1; round <= rounds; round++)); do
    replay "busy-$round" "$state/traces/busy.jsonl"
    replay "busy-one-cold-$round" "$state/traces/busy-one-cold-$round.jsonl"
    replay "busy-warm-$round" "$state/traces/busy-warm.jsonl"
    replay "busy-cold-$round" "$state/traces/busy-cold-$round.jsonl"
  done
fi

if wants tenants; then
  # Each with a fresh cache.
  for ((round = 1; round <= rounds; round++)); do
    for name in solo two-tenants; do
      start 2500
      replay warm-up one-r8 --first 100 --concurrency 32
      replay "$name-$round" "$state/traces/$name.jsonl"
    done
  done
fi
rm -f "$run/warm-up.json"
python3 benches/workload.py tables "$run" | tee "$run/table.md"
