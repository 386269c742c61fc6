# Sourced by the scripts beside it, from the project's root: a server of the release build without keys, on free ports.
#   start    sets $address to its gRPC address once it is ready
#   stop
# $state is a folder that is gone when the script ends, and the server with it.
openlora=$PWD/target/release/openlora
state=$(mktemp -d)
server=
stop() { [ -z "$server" ] || { kill -TERM "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; server=; }; }
trap 'stop; rm -rf "$state"' EXIT
start() {
  rm -f "$state/addr"
  OPENLORA_ADAPTERS_DATA_DIR=$state/adapters "$openlora" serve --insecure-no-auth --grpc-addr 127.0.0.1:0 \
    --http-addr 127.0.0.1:0 --json >"$state/addr" 2>"$state/log" &
  server=$!
  until [ -s "$state/addr" ]; do
    kill -0 "$server" 2>/dev/null || { cat "$state/log" >&2; exit 1; }
    sleep 0.005
  done
  address=$(sed -n 's/.*"grpc": *"\([^"]*\)".*/\1/p' "$state/addr")
}
