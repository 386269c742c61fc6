"""OpenVINO GenAI with continuous batching, base model only: it applies no PEFT adapter to a model read from GGUF.

DIR/openvino/bin/python openvino_genai_bench.py FILE.gguf [--n 1,8,32]
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
from workload import arguments, prompts, report, seconds


def generation(tokens: int) -> genai.GenerationConfig:
    """Greedy, exactly `tokens` tokens."""
    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = tokens
    config.ignore_eos, config.do_sample = True, False
    return config


def main() -> None:
    args = arguments(__doc__.splitlines()[0], ("model", "GGUF file"))
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2  # GB
    scheduler.max_num_seqs, scheduler.max_num_batched_tokens = max(args.n), 512
    scheduler.enable_prefix_caching = False
    pipeline = genai.ContinuousBatchingPipeline(args.model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": args.threads})
    for n in args.n:
        work = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts(n, args.prompt)]

        def run(tokens: int, work=work, n=n) -> float:
            return seconds(lambda: pipeline.generate(work, [generation(tokens)] * n))

        run(2)
        prefill = min(run(1) for _ in range(args.repeat))
        decode = min(run(args.new) for _ in range(args.repeat)) - prefill
        report("openvino-genai", version("openvino-genai"), Path(args.model).name, args, n, prefill, decode)


if __name__ == "__main__":
    main()
