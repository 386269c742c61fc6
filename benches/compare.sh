#!/usr/bin/env bash
# Measures us and the peers in one run, one after the other on an otherwise idle machine, and writes
# benches/runs/DATE-cpu/: raw output of each, the machine, a table.
#
#   benches/peers/setup.sh /opt/peers       # once: OpenVINO GenAI and llama.cpp environments
#   benches/compare.sh /opt/peers [NAME]
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,7p' "$0" >&2; exit 2; }
peers=$(realpath "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
run=$root/benches/runs/${2:-$(date +%F)-cpu}
gguf=${OPENLORA_HOME:-$HOME/.cache/openlora}/models/SmolLM2-135M-Instruct.Q4_1.gguf
mkdir -p "$run"
cd "$root"
# Peers prefill in steps of 512 rows and more; the server's default is shorter, for the sake of those who wait.
export OPENLORA_ENGINE_MAX_NUM_BATCHED_TOKENS=512
cargo build --release --locked --bin openlora --bin openlora-load

say() { printf '\n== %s\n' "$1"; }
{
  echo "date: $(date -u +%FT%TZ)"
  echo "commit: $(git rev-parse HEAD)"
  echo "cores: $(nproc)"
  lscpu | grep -E 'Model name|L1d|L2|L3'
} >"$run/machine.txt"

# Two rounds, alternating, so that a slow minute of the machine does not fall on one system alone.
for round in 1 2; do
  say "openlora, round $round"
  target/release/openlora bench --out "$run/openlora-$round" | tee "$run/openlora-$round.txt"
  say "OpenVINO GenAI, base model only, round $round"
  "$peers/openvino/bin/python" benches/peers/openvino_genai_bench.py "$gguf" | tee "$run/openvino-$round.txt"
  say "llama.cpp Q4_0, base model only, round $round"
  "$peers/llama-cpp/bin/python" benches/peers/llamacpp.py "$peers/model.Q4_0.gguf" 2>/dev/null | tee "$run/llamacpp-q4_0-$round.txt"
done
say "the server beside the engine"
benches/server_overhead.sh "$run"
python3 benches/table.py "$run" | tee "$run/table.md"
