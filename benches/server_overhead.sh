#!/usr/bin/env bash
# What the server costs: the same 32 sequences through gRPC and straight into the engine. server_overhead.sh RUN_FOLDER
set -euo pipefail
run=$(realpath "$1")
cd "$(dirname "$0")/.."
source benches/server.sh
# Room for the 32 sequences and little more, so that one load has used all of it.
export OPENLORA_ENGINE_POOL_BYTES=$((256 << 20))
start
# Long answers: what is compared is the rate of decoding 32 sequences, not one prefill. Load 0 is thrown away: in it the
# system hands the server its key/value memory, page by page. Then the two take turns, so that a slow minute of the machine
# does not fall on one of them alone.
load() {
  target/release/openlora-load --server "http://$address" --concurrency 32 --requests 32 --prompt-tokens 64 \
    --answer-tokens 256 --seed "$1" --json
}
load 0 >/dev/null
for round in 1 2 3 4 5; do
  load "$round" >"$run/load-$round.json"
  "$openlora" bench --sequences 32 --adapters 0 --answer-tokens 256 --repetitions 2 --json >"$run/engine-$round.json"
done
stop
