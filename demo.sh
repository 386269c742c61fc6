#!/usr/bin/env bash
# From a fresh clone to answers that are paid for: installs what is missing, builds, fetches the model, starts a server, registers
# two trained adapters, asks them and the base model the same questions, divides what that cost among those who made the adapters,
# and has one of them paid on a local chain. `./demo.sh --keep` leaves the server and the chain running.
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
# Without node it goes as far as it can.
without_node=true
source scripts/prerequisites.sh
step "build"
cargo build --release --locked --bin openlora
openlora=${CARGO_TARGET_DIR:-$PWD/target}/release/openlora
step "model"
scripts/fetch-model.sh

# A home of its own: nothing of the demo touches keys, adapters, a ledger or a chain that are there already.
state=$(mktemp -d)
home=${OPENLORA_HOME:-$HOME/.cache/openlora}
export OPENLORA_HOME=$state OPENLORA_MODEL_PATH=$home/models/SmolLM2-135M-Instruct.Q4_1.gguf
server= chain=
stop() {
  for process in $server $chain; do kill -TERM "$process" 2>/dev/null || true; done
  for process in $server $chain; do wait "$process" 2>/dev/null || true; done
  server= chain=
}
cleanup() {
  $keep || { stop; rm -rf "$state"; }
}
trap cleanup EXIT
# until_true PROCESS LOG COMMAND...: waits for the command to succeed while the process lives.
until_true() {
  local process=$1 log=$2
  shift 2
  for _ in $(seq 300); do
    if "$@" >/dev/null 2>&1; then return 0; fi
    if ! kill -0 "$process" 2>/dev/null; then break; fi
    sleep 0.1
  done
  cat "$log" >&2
  exit 1
}
port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

step "prices, a split and a deposit: 1 OPEN (18 decimals) for 1,000,000 tokens of a prompt, 3 for those of an answer"
open=1000000000000000000
for target in base adapters; do
  "$openlora" ledger price $target --prompt $open --cached $((open / 2)) --completion $((3 * open)) --key "price-$target"
done
"$openlora" ledger split base --operator 10000 --key split-base
"$openlora" ledger split adapters --owner 3000 --contributors 5000 --operator 2000 --key split-adapters
"$openlora" ledger deposit shop $open --key deposit-1

step "server"
owner=$("$openlora" key create --role owner --name demo 2>/dev/null)
OPENLORA_API_KEY=$("$openlora" key create --role app --name shop 2>/dev/null)
export OPENLORA_API_KEY
grpc=127.0.0.1:$(port) http=127.0.0.1:$(port)
OPENLORA_LEDGER_CHARGE=true "$openlora" serve --grpc-addr "$grpc" --http-addr "$http" >"$state/serve.out" 2>"$state/serve.log" &
server=$!
until_true $server "$state/serve.log" curl -fsS "http://$http/readyz"
cat "$state/serve.out"
export OPENLORA_SERVER=http://$grpc

step "adapters"
for name in cwe-r8 wordnet-r8; do
  OPENLORA_API_KEY=$owner "$openlora" adapter add "demo/$name" "fixtures/golden/trained/$name"
done
OPENLORA_API_KEY=$owner "$openlora" adapter ls

step "the same questions to the base model and both adapters, all in one batch"
python3 scripts/side_by_side.py --receipts "$state/receipts" "$openlora" "" demo/cwe-r8 demo/wordnet-r8

step "what they cost, by a declared share table: of an adapter's data ann gave three quarters, bob the rest"
while read -r receipt alias; do
  if [ -n "$alias" ]; then printf '{"receipt": "%s", "shares": [["ann", 3], ["bob", 1]]}\n' "$receipt"; fi
done <"$state/receipts" >"$state/shares.jsonl"
"$openlora" ledger attribute "$state/shares.jsonl"
for account in application/shop owner/demo contributor/ann contributor/bob operator; do
  "$openlora" ledger balance $account
done
"$openlora" ledger verify

if ! compgen -G "$home/anvil/*/anvil" >/dev/null && ! command -v npm >/dev/null; then
  step "skipped, since there is no node on this machine: sealing the epoch, proposing its root on a local chain, a claim"
  echo "install nodejs and npm, and run this again"
else
  step "a local chain with the contracts"
  OPENLORA_HOME=$home scripts/fetch-anvil.sh
  ln -s "$home/anvil" "$state/anvil"
  "$openlora" chain dev --port "$(port)" --window 2 >"$state/chain.out" 2>"$state/chain.log" &
  chain=$!
  until_true $chain "$state/chain.log" grep -q settings.sh "$state/chain.out"
  sed '/^$/q' "$state/chain.out"
  source "$state/chain-dev/settings.sh"

  step "the epoch: sealed, proposed, finalized"
  ann=0x00000000000000000000000000000000000a0001
  "$openlora" ledger address contributor/ann $ann --key ann-1
  "$openlora" ledger address owner/demo 0x00000000000000000000000000000000000a0002 --key demo-1
  "$openlora" settle seal
  "$openlora" settle verify "$state/bundles/epoch-1.json"
  "$openlora" settle fund $open --key fund-1
  "$openlora" settle propose
  "$openlora" settle finalize --wait

  step "ann's claim is paid"
  "$openlora" settle claim --wait $ann
  "$openlora" settle status
  for account in application/shop owner/demo contributor/ann payout/$ann contributor/bob operator; do
    "$openlora" ledger balance $account
  done
fi

if $keep; then
  step "the server stays"
  cat <<TXT
  export OPENLORA_SERVER=$OPENLORA_SERVER
  export OPENLORA_API_KEY=$OPENLORA_API_KEY
  $openlora generate --adapter demo/cwe-r8 "What is CWE-79?"
  kill $server $chain   # stops it; its state is in $state
TXT
  if [ -n "$chain" ]; then echo "  export OPENLORA_HOME=$state; source $state/chain-dev/settings.sh; $openlora settle status"; fi
  trap - EXIT
  disown -a
else
  step "stopping"
  kill -TERM "$server"
  wait "$server"
  server=
fi
step "done"
