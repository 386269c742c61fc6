#!/usr/bin/env bash
# Runs the Python client's tests against a server of its own, in f32 so that answers equal transformers'.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
openlora=$target/debug/openlora
venv=$target/python

if [ ! -x "$venv/bin/python" ] || ! cmp -s "$here/requirements.txt" "$venv/requirements.txt"; then
  echo "making a Python environment in $venv"
  python3 -m venv --clear "$venv"
  "$venv/bin/pip" install --quiet -r "$here/requirements.txt"
  cp "$here/requirements.txt" "$venv/requirements.txt"
fi

state=$(mktemp -d)
server=
cleanup() {
  [ -z "$server" ] || { kill -TERM "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; }
  rm -rf "$state"
}
trap cleanup EXIT
export OPENLORA_SERVER_KEYS_FILE=$state/keys.json OPENLORA_ADAPTERS_DATA_DIR=$state/adapters
OPENLORA_API_KEY=$("$openlora" key create --role admin --name python 2>/dev/null)
"$openlora" serve --device cpu --precision f32 --grpc-addr 127.0.0.1:0 --http-addr 127.0.0.1:0 --json >"$state/addr" 2>"$state/log" &
server=$!
until [ -s "$state/addr" ]; do
  kill -0 "$server" 2>/dev/null || { cat "$state/log" >&2; exit 1; }
  sleep 0.1
done
address=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["grpc"])' "$state/addr")
cd "$here"
OPENLORA_API_KEY=$OPENLORA_API_KEY OPENLORA_SERVER=http://$address OPENLORA_TEST_FIXTURES=$root/fixtures \
  PYTHONDONTWRITEBYTECODE=1 "$venv/bin/python" -m unittest -v test_client
