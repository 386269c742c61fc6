#!/usr/bin/env bash
# Runs every test: what CI runs. `./test.sh quick` leaves out formatting, lints, the contracts, the CUDA kernels and
# the slow end-to-end tests.
# Installs what is missing first (compilers, Rust, node, the model, NVRTC, anvil) and says so.
set -euo pipefail
cd "$(dirname "$0")"

quick=false
case "${1:-}" in
  "") ;;
  quick) quick=true ;;
  *) echo "usage: ./test.sh [quick]" >&2; exit 2 ;;
esac

began=$SECONDS
step() { printf '\n== %s (%d s)\n' "$1" "$((SECONDS - began))"; }

step "prerequisites"
source scripts/prerequisites.sh
step "model"
scripts/fetch-model.sh
step "nvrtc"
scripts/fetch-nvrtc.sh
step "anvil"
scripts/fetch-anvil.sh

if ! $quick; then
  step "formatting"
  cargo fmt --all --check
  step "lints"
  cargo clippy --workspace --all-targets --locked -- -D warnings
fi

step "build"
cargo build --workspace --all-targets --locked

step "tests"
selection=()
# The CUDA kernels on the host, and their compilation for every GPU, take minutes; a hundred deaths half a minute.
$quick && selection=(-E 'not (binary(/^(e2e|cuda|nvrtc|conservation)$/) or test(/slow_|^cuda::/))')
if cargo nextest --version >/dev/null 2>&1; then
  cargo nextest run --workspace --locked --no-fail-fast "${selection[@]}"
elif $quick; then
  cargo test --workspace --locked --lib --bins
else
  cargo test --workspace --locked --no-fail-fast
fi

step "documentation examples"
cargo test --workspace --locked --doc --quiet

if ! $quick; then
  step "contracts"
  contracts/build.sh --check
  cargo test --workspace --test agreement --locked --quiet -- --ignored
  step "python client"
  examples/python/test.sh
fi

step "done"
