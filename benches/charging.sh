#!/usr/bin/env bash
# What charging costs a request: the same request of one token, one by one, to a server that charges and to one that does not, in
# turns. charging.sh [TIMES]. Prints milliseconds, `openlora generate` starting and ending included, and their medians.
set -euo pipefail
cd "$(dirname "$0")/.."
openlora=$PWD/target/release/openlora
export OPENLORA_MODEL_PATH=${OPENLORA_MODEL_PATH:-${OPENLORA_HOME:-$HOME/.cache/openlora}/models/SmolLM2-135M-Instruct.Q4_1.gguf}
state=$(mktemp -d)
servers=()
trap 'kill -TERM "${servers[@]}" 2>/dev/null || true; wait; rm -rf "$state"' EXIT
# start NAME CHARGE: a server with a home of its own; its address is in $state/NAME/addr.
start() {
  mkdir "$state/$1"
  export OPENLORA_HOME=$state/$1
  "$openlora" ledger price base --prompt 1000000 --cached 0 --completion 1000000 --key p >/dev/null
  "$openlora" ledger split base --operator 10000 --key s >/dev/null
  "$openlora" ledger deposit local 1000000000 --key d >/dev/null
  OPENLORA_LEDGER_CHARGE=$2 "$openlora" serve --insecure-no-auth --grpc-addr 127.0.0.1:0 --http-addr 127.0.0.1:0 --json \
    >"$state/$1/addr" 2>"$state/$1/log" &
  servers+=($!)
  until [ -s "$state/$1/addr" ]; do
    kill -0 $! 2>/dev/null || { cat "$state/$1/log" >&2; exit 1; }
    sleep 0.01
  done
}
start free false
start charging true
for ((time = 1; time <= ${1:-80}; time++)); do
  for name in free charging; do
    address=$(sed -n 's/.*"grpc": *"\([^"]*\)".*/\1/p' "$state/$name/addr")
    began=$(date +%s%N)
    "$openlora" generate --server "http://$address" --raw --max-tokens 1 --temperature 0 "The river" >/dev/null
    echo "$name $((($(date +%s%N) - began) / 1000))" | awk '{ printf "%s %.2f\n", $1, $2 / 1000 }' | tee -a "$state/times"
  done
done
for name in free charging; do
  sed -n "s/^$name //p" "$state/times" | sort -n \
    | awk -v name="$name" '{ t[NR] = $1 } END { printf "%s: median %.2f ms of %d\n", name, (t[int((NR + 1) / 2)] + t[int(NR / 2) + 1]) / 2, NR }'
done
