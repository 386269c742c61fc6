#!/usr/bin/env bash
# From starting a server process to its first token: first_token.sh [TIMES]. Prints milliseconds to readiness and to the token.
set -euo pipefail
cd "$(dirname "$0")/.."
source benches/server.sh
now() { date +%s%N; }
for ((time = 1; time <= ${1:-5}; time++)); do
  began=$(now)
  start
  ready=$(now)
  "$openlora" generate --server "http://$address" --max-tokens 1 --temperature 0 "The capital of France is" >/dev/null
  echo "ready after $(((ready - began) / 1000000)) ms, first token after $((($(now) - began) / 1000000)) ms"
  stop
done
