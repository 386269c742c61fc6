#!/usr/bin/env bash
# Makes a fresh Debian or Ubuntu machine (with git, curl and python3) able to build and test OpenLoRA: a C compiler and
# linker, g++ with its sanitisers (tests run the CUDA kernels on the host with it), pip and venv, node and npm (the contracts'
# tools), and the Rust toolchain that rust-toolchain.toml names. Installs only what is missing and says what it does; uses sudo
# only for apt, and only when it is not root.
#
# Run it, or `source` it to have cargo on the PATH of the calling script too; with `without_node=true` it leaves node out.
set -euo pipefail

_say() { printf 'prerequisites: %s\n' "$*" >&2; }

_install_packages() {
  local missing=() as_root=()
  if ! command -v cc >/dev/null; then missing+=(gcc libc6-dev); fi
  # libasan comes with it.
  if ! command -v g++ >/dev/null; then missing+=(g++); fi
  if ! command -v curl >/dev/null; then missing+=(curl ca-certificates); fi
  if ! command -v python3 >/dev/null; then missing+=(python3); fi
  # The module `venv` is always there; what makes its pip is in a package of its own.
  if ! python3 -c 'import ensurepip, venv' >/dev/null 2>&1; then missing+=(python3-venv); fi
  if ! python3 -m pip --version >/dev/null 2>&1; then missing+=(python3-pip); fi
  # The contracts' compiler and test runner come from npm.
  if ! ${without_node:-false} && ! { command -v node && command -v npm; } >/dev/null; then missing+=(nodejs npm); fi
  if [ "${#missing[@]}" -eq 0 ]; then return 0; fi

  if ! command -v apt-get >/dev/null; then
    _say "missing: ${missing[*]} (Debian's names); this is no Debian or Ubuntu, please install them and run this again"
    return 1
  fi
  if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
      _say "missing: ${missing[*]}; as root, run: apt-get install ${missing[*]}"
      return 1
    fi
    as_root=(sudo)
  fi
  _say "installing ${missing[*]} with apt"
  "${as_root[@]}" apt-get update -qq >&2
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

_install_rust() {
  local installer channel
  # rustup's own folder first: a distribution's cargo on the PATH would ignore rust-toolchain.toml.
  export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
  if ! command -v rustup >/dev/null && ! command -v cargo >/dev/null; then
    _say "installing rustup into ${CARGO_HOME:-$HOME/.cargo} (your shell's profile is left alone)"
    installer=$(mktemp)
    curl --proto '=https' --tlsv1.2 -fsSL https://sh.rustup.rs -o "$installer"
    sh "$installer" -y --quiet --no-modify-path --profile minimal --default-toolchain none >&2
    rm -f "$installer"
  fi
  if command -v rustup >/dev/null; then
    channel=$(sed -n 's/^channel = "\(.*\)"$/\1/p' "$_root/rust-toolchain.toml")
    # `rustup run` does not install anything by itself, unlike the proxies, which would do it without a word.
    if ! rustup run "$channel" cargo fmt --version >/dev/null 2>&1 \
      || ! rustup run "$channel" cargo clippy --version >/dev/null 2>&1; then
      _say "installing Rust $channel"
      rustup toolchain install "$channel" --profile minimal --component rustfmt --component clippy >&2
    fi
  else
    _say "using $(cargo --version), not rustup; rust-toolchain.toml says which version is tested"
  fi
}

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_install_packages
_install_rust
_say "$(cd "$_root" && cargo --version), $(cc --version | head -n 1), $(g++ --version | head -n 1), $(python3 --version)"
