"""transformers + PEFT with a different adapter in every row of the batch (`adapter_names`), float32.

    DIR/peft/bin/python peft_bench.py DIR/hf32 DIR/adapters COUNT [--n 1,8,32]

COUNT adapters are loaded; sequence i uses adapter i mod COUNT. The slowest peer by far: fewer tokens are generated.
"""

from importlib.metadata import version

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from workload import arguments, prompts, report, seconds


def main() -> None:
    places = [("model", "Hugging Face folder"), ("adapters", "folder of a0, a1, ..."), ("count", "adapters to load")]
    args = arguments(__doc__.splitlines()[0], *places)
    count = int(args.count)
    torch.set_num_threads(args.threads)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    base.generation_config.pad_token_id = 0
    model = PeftModel.from_pretrained(base, f"{args.adapters}/a0", adapter_name="a0").eval()
    for i in range(1, count):
        model.load_adapter(f"{args.adapters}/a{i}", adapter_name=f"a{i}")
    for n in args.n:
        ids = torch.tensor(prompts(n, args.prompt))
        names = [f"a{i % count}" for i in range(n)]

        def run(tokens: int, ids=ids, names=names) -> float:
            options = dict(adapter_names=names, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            return seconds(lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options))

        with torch.inference_mode():
            run(2)
            prefill = min(run(1) for _ in range(args.repeat))
            decode = min(run(args.new) for _ in range(args.repeat)) - prefill
        report("transformers+peft", version("peft"), "float32", args, n, prefill, decode, adapters=min(n, count))


if __name__ == "__main__":
    main()
