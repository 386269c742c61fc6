"""llama.cpp's own requantiser: requantise.py FILE.gguf PREFIX writes PREFIX.{Q4_0,Q8_0,F16}.gguf.

Q4_0 is the format whose kernels llama.cpp repacks, hence its fastest on most CPUs.
"""

import ctypes
import sys

import llama_cpp as llama


def main() -> None:
    source, prefix = sys.argv[1:]
    llama.llama_backend_init()
    for name in ("Q4_0", "Q8_0", "F16"):
        params = llama.llama_model_quantize_default_params()
        params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{name}")
        params.allow_requantize = True
        target = f"{prefix}.{name}.gguf"
        if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
            raise SystemExit(f"llama.cpp could not write {target}")


if __name__ == "__main__":
    main()
