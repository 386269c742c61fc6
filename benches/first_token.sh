#!/usr/bin/env bash
# From starting a server process to its first token: first_token.sh [TIMES]. Prints milliseconds to readiness and to the token.
set -euo pipefail
cd "$(dirname "$0")/.."
openlora=$PWD/target/release/openlora
state=$(mktemp -d)
server=
cleanup() { [ -z "$server" ] || { kill -TERM "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; }; rm -rf "$state"; }
trap cleanup EXIT
now() { date +%s%N; }
for ((time = 1; time <= ${1:-5}; time++)); do
  rm -f "$state/addr"
  began=$(now)
  OPENLORA_ADAPTERS_DATA_DIR=$state/adapters "$openlora" serve --insecure-no-auth --grpc-addr 127.0.0.1:0 \
    --http-addr 127.0.0.1:0 --json >"$state/addr" 2>"$state/log" &
  server=$!
  until [ -s "$state/addr" ]; do
    kill -0 "$server" 2>/dev/null || { cat "$state/log" >&2; exit 1; }
    sleep 0.005
  done
  ready=$(now)
  address=$(sed -n 's/.*"grpc": *"\([^"]*\)".*/\1/p' "$state/addr")
  "$openlora" generate --server "http://$address" --max-tokens 1 --temperature 0 "The capital of France is" >/dev/null
  echo "ready after $(((ready - began) / 1000000)) ms, first token after $((($(now) - began) / 1000000)) ms"
  kill -TERM "$server"; wait "$server"; server=
done
