#!/usr/bin/env bash
# From a fresh clone to answers: installs what is missing, builds, fetches the model, starts a server, registers two trained
# adapters and asks them and the base model the same questions. `./demo.sh --keep` leaves the server running.
set -euo pipefail
cd "$(dirname "$0")"

keep=false
case "${1:-}" in
  "") ;;
  --keep) keep=true ;;
  *) echo "usage: ./demo.sh [--keep]" >&2; exit 2 ;;
esac

began=$SECONDS
step() { printf '\n== %s (%d s)\n' "$1" "$((SECONDS - began))"; }

step "prerequisites"
source scripts/prerequisites.sh
step "build"
cargo build --release --locked --bin openlora
openlora=${CARGO_TARGET_DIR:-$PWD/target}/release/openlora
step "model"
scripts/fetch-model.sh

# A server of its own: nothing of the demo touches keys and adapters that are there already.
state=$(mktemp -d)
server=
cleanup() {
  if [ -n "$server" ] && ! $keep; then
    kill -TERM "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
  fi
  $keep || rm -rf "$state"
}
trap cleanup EXIT

step "server"
export OPENLORA_SERVER_KEYS_FILE=$state/keys.json OPENLORA_ADAPTERS_DATA_DIR=$state/adapters
OPENLORA_API_KEY=$("$openlora" key create --role admin --name demo 2>/dev/null)
export OPENLORA_API_KEY
port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
grpc=127.0.0.1:$(port) http=127.0.0.1:$(port)
"$openlora" serve --grpc-addr "$grpc" --http-addr "$http" >"$state/serve.out" 2>"$state/serve.log" &
server=$!
for _ in $(seq 100); do
  if curl -fsS "http://$http/readyz" >/dev/null 2>&1; then break; fi
  if ! kill -0 "$server" 2>/dev/null; then cat "$state/serve.log" >&2; exit 1; fi
  sleep 0.1
done
cat "$state/serve.out"
export OPENLORA_SERVER=http://$grpc

step "adapters"
for name in cwe-r8 wordnet-r8; do
  "$openlora" adapter add "demo/$name" "fixtures/golden/trained/$name"
done
"$openlora" adapter ls

step "the same questions to the base model and both adapters, all in one batch"
python3 scripts/side_by_side.py "$openlora" "" demo/cwe-r8 demo/wordnet-r8

if $keep; then
  step "the server stays"
  cat <<TXT
  export OPENLORA_SERVER=$OPENLORA_SERVER
  export OPENLORA_API_KEY=$OPENLORA_API_KEY
  $openlora generate --adapter demo/cwe-r8 "What is CWE-79?"
  kill $server    # stops it; its state is in $state
TXT
  trap - EXIT
  disown "$server"
else
  step "stopping"
  kill -TERM "$server"
  wait "$server"
  server=
fi
step "done"
