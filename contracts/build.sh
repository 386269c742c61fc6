#!/usr/bin/env bash
# Compiles and tests the contracts and writes what the Rust workspace reads of them (abi/*.json, committed), so that building
# OpenLoRA itself needs neither node nor a Solidity compiler.
#
#   contracts/build.sh           formats, compiles, tests, writes abi/ and snapshots/
#   contracts/build.sh --check   the same without writing: fails where anything committed is stale
#   contracts/build.sh --install only installs the pinned tools
#
# Needs node 18 or later with npm. Everything else is pinned in package-lock.json and goes to contracts/node_modules.
set -euo pipefail
cd "$(dirname "$0")"

say() { printf 'contracts: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

mode=write
case "${1:-}" in
  "") ;;
  --check) mode=check ;;
  --install) mode=install ;;
  *) printf 'usage: contracts/build.sh [--check | --install]\n' >&2; exit 2 ;;
esac

for tool in node npm; do
  command -v "$tool" >/dev/null || die "$tool is missing; on Debian: apt-get install nodejs npm"
done
[ "$(node -p 'process.versions.node.split(".")[0]')" -ge 18 ] || die "node $(node --version) is too old; 18 or later is needed"

# No install scripts are run: forge's binary is in a package of its own for each platform, the compiler is WebAssembly.
stamp=node_modules/.installed-from
if ! cmp -s package-lock.json "$stamp"; then
  say "installing the pinned tools (about 100 MB)"
  npm ci --ignore-scripts --no-audit --no-fund --loglevel=error >&2
  cp package-lock.json "$stamp"
fi
[ "$mode" != install ] || exit 0

forge=$(find node_modules/@foundry-rs -type f -name forge -path '*/bin/*' -print -quit 2>/dev/null)
[ -x "$forge" ] || die "the packages have no forge for $(uname -sm); compiling needs Linux on x86-64 or macOS on ARM"
# The tests append to it, for settlement/tests/agreement.rs to read.
mkdir -p cache
rm -f cache/fuzzed.txt
if [ "$mode" = check ]; then
  "$forge" fmt --check >&2 || die "not formatted; run contracts/build.sh"
  node test/vectors/generate.js --check
  "$forge" build
  "$forge" test --gas-snapshot-check=true --gas-snapshot-emit=false
  node artifacts.js --check
else
  "$forge" fmt
  "$forge" build
  "$forge" test
  node artifacts.js
fi
say "done"
