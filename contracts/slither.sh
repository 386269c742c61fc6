#!/usr/bin/env bash
# Runs slither, a static analyser, over src/: fails on any finding of a detector that slither.config.json does not leave out.
# Why those are left out is in docs/contracts.md; `contracts/slither.sh --all` shows them too. Needs python3 with venv.
set -euo pipefail
cd "$(dirname "$0")"

version=0.11.6
venv=.slither/$version
./build.sh --install
if [ ! -x "$venv/bin/slither" ]; then
  printf 'contracts: installing slither-analyzer %s into contracts/%s\n' "$version" "$venv" >&2
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check "slither-analyzer==$version"
fi
forge=$(find node_modules/@foundry-rs -type f -name forge -path '*/bin/*' -print -quit)
[ -x "$forge" ] || { printf 'contracts: the packages have no forge for %s\n' "$(uname -sm)" >&2; exit 1; }
PATH=$PWD/$(dirname "$forge"):$PWD/$venv/bin:$PATH
case "${1:-}" in
  "") exec slither . ;;
  --all) exec slither . --config-file /dev/null --filter-paths 'node_modules|test' ;;
  *) printf 'usage: contracts/slither.sh [--all]\n' >&2; exit 2 ;;
esac
