#!/usr/bin/env bash
# Makes the peers' environments and the model files they read under DIR: setup.sh DIR [MODEL.gguf]
# About 3 GB and a C++ build of some minutes (PEER_JOBS, default all cores). Run again to finish an interrupted set-up.
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: $0 DIR [MODEL.gguf]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
dir=$(cd "$1" && pwd)
model=${2:-$HOME/.cache/openlora/models/SmolLM2-135M-Instruct.Q4_1.gguf}
[ -f "$model" ] || { echo "$model is missing; scripts/fetch-model.sh makes it" >&2; exit 1; }

# step NAME COMMAND...: runs the command once; a marker remembers that it succeeded.
step() {
  local name=$1
  shift
  [ -e "$dir/.$name" ] && return
  echo "== $name" >&2
  "$@"
  touch "$dir/.$name"
}

environment() {
  local name=$1
  shift
  [ -x "$dir/$name/bin/python" ] || python3 -m venv "$dir/$name"
  "$dir/$name/bin/pip" install -q --disable-pip-version-check "$@"
}

llama_cpp() {
  CMAKE_ARGS="-DGGML_NATIVE=ON" CMAKE_BUILD_PARALLEL_LEVEL=${PEER_JOBS:-$(nproc)} \
    environment llama-cpp llama-cpp-python==0.3.36 numpy
}

# Each environment stands alone, so that one package's pins cannot break another's.
step openvino environment openvino openvino-genai==2026.4.1.0 numpy
step peft environment peft torch==2.13.0 transformers peft accelerate gguf safetensors
step llama-cpp llama_cpp

ln -sf "$model" "$dir/model.Q4_1.gguf"
step requantise "$dir/llama-cpp/bin/python" "$here/requantise.py" "$dir/model.Q4_1.gguf" "$dir/model"
step hf "$dir/peft/bin/python" "$here/to_hf.py" "$dir/model.Q4_1.gguf" "$dir/hf32"
step adapters "$dir/peft/bin/python" "$here/make_adapters.py" "$dir/hf32/config.json" "$dir/adapters"
echo "ready: $dir" >&2
