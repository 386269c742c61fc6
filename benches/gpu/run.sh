#!/usr/bin/env bash
# Checks a GPU and measures it, in under nine minutes, and leaves one folder of results:
#
#   benches/gpu/run.sh [OUT]        OUT defaults to benches/runs/<date>-<gpu>
#
# OPENLORA_BIN    a stripped release binary; built here when it is not set
# OPENLORA_GPU    the device, cuda:0 when it is not set
# CHECK_SECONDS   for the random steps of the check (100)
# BENCH_SECONDS   after which the benchmark begins nothing more (260)
# PYTHON          a python with torch for the baseline (python3)
set -euo pipefail
cd "$(dirname "$0")/../.."

device=${OPENLORA_GPU:-cuda:0}
check_seconds=${CHECK_SECONDS:-100}
bench_seconds=${BENCH_SECONDS:-260}
python=${PYTHON:-python3}
binary_bytes_max=$((60 * 1000 * 1000))
began=$SECONDS

# Everything ends by then; what is measured last has the least to wait for.
seconds_max=530
left() { echo $((seconds_max - (SECONDS - began))); }
least() { echo $(($1 < $2 ? $1 : $2)); }
say() { printf '== %s (%d s)\n' "$1" "$((SECONDS - began))"; }
die() { printf '%s\n' "$1" >&2; exit 2; }

binary=${OPENLORA_BIN:-}
if [ -z "$binary" ]; then
  say "building"
  cargo build --release --locked -p openlora-cli
  binary=$(mktemp)
  trap 'rm -f "$binary"' EXIT
  strip -o "$binary" "${CARGO_TARGET_DIR:-target}/release/openlora"
  chmod 0755 "$binary"
fi
began=$SECONDS
[ -x "$binary" ] || die "$binary is no program; set OPENLORA_BIN to one or leave it out"
size=$(stat -c %s "$binary")
[ "$size" -lt "$binary_bytes_max" ] || die "$binary has $size bytes, not under $binary_bytes_max: is it stripped?"

ask() { nvidia-smi --id="${device#cuda:}" --format=csv,noheader,nounits --query-gpu="$1" 2>/dev/null || echo unknown; }
name=$(ask name | head -n 1 | tr '[:upper:] ' '[:lower:]-' | tr -cd 'a-z0-9-')
out=${1:-benches/runs/$(date +%F)-${name:-gpu}}
mkdir -p "$out"

# What the machine is, and how warm and how fast it is at a moment.
facts() {
  printf '%s: ' "$1"
  ask clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu,memory.used
}
{
  date -u +%FT%TZ
  git rev-parse HEAD 2>/dev/null || true
  printf 'binary: %s bytes, sha256 %s\n' "$size" "$(sha256sum "$binary" | cut -d ' ' -f 1)"
  uname -srm
  nproc
  ask name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current
  "$binary" doctor 2>/dev/null | grep -i '^[a-z]* *cuda' || true
  echo 'clocks sm and memory in MHz, temperature in C, power in W, use in %, memory used in MiB'
  facts "before"
} >"$out/machine.txt"

failed=0
say "check"
timeout $((2 * check_seconds)) "$binary" gpu-check --device "$device" --budget "$check_seconds" --out "$out" \
  >"$out/check.txt" 2> >(tee "$out/check.log" >&2) || { failed=1; say "the check failed"; }
facts "after the check" >>"$out/machine.txt"

say "benchmark"
# Of what is left, a part that has begun may need most of a minute, and so does the baseline.
bench_seconds=$(least "$bench_seconds" $(($(left) - 100)))
timeout $((bench_seconds + 45)) "$binary" bench --device "$device" --budget "$bench_seconds" --out "$out" \
  >"$out/bench.txt" 2> >(tee "$out/bench.log" >&2) || { failed=1; say "the benchmark failed"; }
facts "after the benchmark" >>"$out/machine.txt"

say "baseline"
if "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null; then
  ours=()
  [ -f "$out/results.json" ] && ours=(--ours "$out/results.json")
  timeout 55 "$python" benches/gpu/pytorch.py --device "$device" --budget 35 --out "$out/pytorch.json" "${ours[@]}" \
    2> >(tee "$out/pytorch.log" >&2) || { failed=1; say "the baseline failed"; }
else
  echo "not measured: $python has no torch with a GPU" | tee "$out/pytorch.log"
fi
facts "after the baseline" >>"$out/machine.txt"

say "results in $out"
for table in check.md table.md; do
  [ -f "$out/$table" ] && cat "$out/$table"
done
exit "$failed"
