#!/usr/bin/env bash
# Fetches NVRTC, NVIDIA's compiler for CUDA kernels as a library (90 MB), from the Python package that carries it, so that the
# kernels can be compiled on a machine with neither a GPU nor the CUDA toolkit. It goes to
# ${OPENLORA_HOME:-~/.cache/openlora}/nvrtc/VERSION. Does nothing when it is there already. Needs python3 and a network; an
# interrupted run leaves nothing behind. The library is NVIDIA's, under the licence that is put beside it.
set -euo pipefail

version=13.0.88
package=nvidia-cuda-nvrtc==$version
files=(libnvrtc.so.13 libnvrtc-builtins.so.13.0)
folder=${OPENLORA_HOME:-${HOME:?set HOME or OPENLORA_HOME}/.cache/openlora}/nvrtc

say() { printf '%s\n' "$*" >&2; }
die() { say "fetch-nvrtc: $*"; exit 1; }
complete() { for file in "${files[@]}"; do [ -f "$1/$file" ] || return 1; done; }

if complete "$folder/$version"; then
  say "nvrtc: $folder/$version"
  exit 0
fi
case "$(uname -m)" in
  x86_64) sha256=ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575 ;;
  aarch64) sha256=d27f20a0ca67a4bb34268a5e951033496c5b74870b868bacd046b1b8e0c3267b ;;
  *) die "there is no NVRTC for $(uname -m)" ;;
esac
command -v python3 >/dev/null || die "python3 is missing; run scripts/prerequisites.sh"
mkdir -p "$folder" || die "cannot make $folder; set OPENLORA_HOME to a folder that can be written"

# Beside its destination, so that moving it there is one rename on one file system.
work=$(mktemp -d "$folder/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT

# The system's pip may be missing, or be kept from running by the distribution; a venv's own always works.
pip=(python3 -m pip)
if ! "${pip[@]}" --version >/dev/null 2>&1; then
  say "nvrtc: python3 has no pip, using one in a temporary venv"
  python3 -m venv "$work/venv" >/dev/null || die "python3 has neither pip nor venv; run scripts/prerequisites.sh"
  pip=("$work/venv/bin/python" -m pip)
fi

say "nvrtc: fetching $package (about 90 MB)"
download=("${pip[@]}" download --disable-pip-version-check --no-deps --only-binary=:all: --dest "$work/wheel")
[ -t 2 ] || download+=(--quiet --progress-bar off)
"${download[@]}" "$package" >&2 || die "pip could not fetch $package; check the network and run this again"

wheels=("$work"/wheel/*.whl)
[ -f "${wheels[0]}" ] || die "pip fetched no wheel of $package"
printf '%s  %s\n' "$sha256" "${wheels[0]}" | sha256sum --check --status \
  || die "the wheel of $package has another sha256 than $sha256; it was not installed"

say "nvrtc: unpacking"
python3 -m zipfile -e "${wheels[0]}" "$work/unpacked"
mkdir "$work/$version"
for file in "${files[@]}" License.txt; do
  found=$(find "$work/unpacked" -type f -name "$file" -print -quit)
  [ -n "$found" ] || die "$package has no $file in it"
  chmod 0644 "$found"
  mv "$found" "$work/$version/"
done
chmod 0755 "$work/$version"
rm -rf "${folder:?}/$version"
# Another run may have put it there meanwhile; then a folder of this name takes nothing.
mv -T "$work/$version" "$folder/$version" 2>/dev/null || complete "$folder/$version" || die "cannot write $folder/$version"
say "nvrtc: $folder/$version"
