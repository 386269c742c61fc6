"""llama.cpp through its Python binding, base model only: it cannot put different adapters in one batch.

    DIR/llama-cpp/bin/python llamacpp.py FILE.gguf [--n 1,8,32]

Drives `llama_decode` directly with batches of our own, so that nothing of the binding's per-token Python is timed
but picking the best of each row of logits.
"""

import ctypes
from argparse import Namespace
from pathlib import Path

import llama_cpp as llama
import numpy as np
from workload import arguments, prompts, report, seconds

BATCH = 2048


class Batches:
    """One context for n sequences."""

    def __init__(self, model, n: int, args):
        params = llama.llama_context_default_params()
        params.n_ctx = n * (args.prompt + args.new + 8)
        params.n_batch, params.n_ubatch, params.n_seq_max = BATCH, 512, n
        params.n_threads = params.n_threads_batch = args.threads
        if hasattr(params, "kv_unified"):
            params.kv_unified = True
        self.context = llama.llama_init_from_model(model, params)
        if not self.context:
            raise SystemExit("llama.cpp made no context")
        self.batch = llama.llama_batch_init(BATCH, 0, 1)
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def close(self) -> None:
        llama.llama_batch_free(self.batch)
        llama.llama_free(self.context)

    def clear(self) -> None:
        """Forgets all sequences."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Computes rows of (token, position, sequence, wanted); the best next token of each wanted row."""
        batch, best = self.batch, []
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0], batch.logits[i] = sequence, wanted
            status = llama.llama_decode(self.context, batch)
            if status:
                raise SystemExit(f"llama_decode failed: {status}")
            for i, row in enumerate(part):
                if row[3]:
                    logits = llama.llama_get_logits_ith(self.context, i)
                    view = np.ctypeslib.as_array(
                        ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,)
                    )
                    best.append(int(view.argmax()))
        return best


def run(batches: Batches, work: list[list[int]], args) -> tuple[float, float]:
    """Seconds of prefill and of decode."""
    batches.clear()
    rows = [
        (token, position, sequence, position == args.prompt - 1)
        for sequence, prompt in enumerate(work)
        for position, token in enumerate(prompt)
    ]
    tokens: list[int] = []
    prefill = seconds(lambda: tokens.extend(batches.decode(rows)))

    def decode() -> None:
        current = tokens
        for step in range(args.new - 1):
            current = batches.decode([(token, args.prompt + step, i, True) for i, token in enumerate(current)])

    return prefill, seconds(decode)


def main() -> None:
    args = arguments(__doc__.splitlines()[0], ("model", "GGUF file"))
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(args.model.encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {args.model}")
    for n in args.n:
        batches = Batches(model, n, args)
        work = prompts(n, args.prompt)
        run(
            batches, [prompt[:8] for prompt in work], Namespace(**vars(args) | dict(prompt=8, new=2))
        )  # touch the pages
        prefill, decode = map(min, zip(*(run(batches, work, args) for _ in range(args.repeat)), strict=True))
        report("llama.cpp", llama.__version__, Path(args.model).name, args, n, prefill, decode)
        batches.close()


if __name__ == "__main__":
    main()
