#!/usr/bin/env bash
# Fetches anvil, Foundry's local Ethereum node (18 MB), from the npm package that carries it: the tests of settlement/ send
# their transactions to it. It goes to ${OPENLORA_HOME:-~/.cache/openlora}/anvil/VERSION/anvil. Does nothing when it is
# there already. Needs npm (Debian: nodejs, npm) and a network, but runs nothing of the package; an interrupted run leaves
# nothing behind. Its licence is MIT or Apache-2.0.
set -euo pipefail

version=1.7.1
folder=${OPENLORA_HOME:-${HOME:?set HOME or OPENLORA_HOME}/.cache/openlora}/anvil

say() { printf '%s\n' "$*" >&2; }
die() { say "fetch-anvil: $*"; exit 1; }

if [ -x "$folder/$version/anvil" ]; then
  say "anvil: $folder/$version/anvil"
  exit 0
fi
case "$(uname -s) $(uname -m)" in
  "Linux x86_64") package=@foundry-rs/anvil-linux-amd64 sha256=5727dd8f08f3bf6dde4ec1d9832e87c43f9315ef824bff1ab18486bf51bc7af3 ;;
  *) die "no pinned anvil for $(uname -s) on $(uname -m); put one of version $version at $folder/$version/anvil" ;;
esac
command -v npm >/dev/null || die "npm is missing; install Node.js with npm (Debian: nodejs npm)"
mkdir -p "$folder" || die "cannot make $folder; set OPENLORA_HOME to a folder that can be written"

# Beside its destination, so that moving it there is one rename on one file system.
work=$(mktemp -d "$folder/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT

say "anvil: fetching $package@$version (18 MB)"
(cd "$work" && npm pack --silent "$package@$version" >/dev/null) \
  || die "npm could not fetch $package@$version; check the network and run this again"
archives=("$work"/*.tgz)
[ -f "${archives[0]}" ] || die "npm fetched no archive of $package"
printf '%s  %s\n' "$sha256" "${archives[0]}" | sha256sum --check --status \
  || die "the archive of $package has another sha256 than $sha256; it was not installed"

mkdir "$work/$version"
tar --extract --gzip --file "${archives[0]}" --directory "$work/$version" --strip-components 2 package/bin/anvil
chmod 0755 "$work/$version" "$work/$version/anvil"
rm -rf "${folder:?}/$version"
# Another run may have put it there meanwhile; then a folder of this name takes nothing.
mv -T "$work/$version" "$folder/$version" 2>/dev/null || [ -x "$folder/$version/anvil" ] \
  || die "cannot write $folder/$version"
say "anvil: $folder/$version/anvil"
