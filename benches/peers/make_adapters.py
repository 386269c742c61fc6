"""Random PEFT adapters for timing: make_adapters.py CONFIG.json OUT [--count 64] [--rank 8] [--modules q_proj,v_proj].

CONFIG.json is the base model's. Writes OUT/a0, OUT/a1, ...; adapter i is the same for everyone, being seeded with i.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def linears(config: dict) -> dict[str, tuple[str, int, int]]:
    """Module -> (block, inputs, outputs) of one decoder layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    attention = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
    mlp = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    blocks = [("self_attn", attention), ("mlp", mlp)]
    return {name: (block, *shape) for block, modules in blocks for name, shape in modules.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--modules", default="q_proj,v_proj")
    args = parser.parse_args()
    base = json.loads(args.config.read_text())
    shapes, modules = linears(base), args.modules.split(",")
    for number in range(args.count):
        generator, tensors = torch.Generator().manual_seed(number), {}
        for layer in range(base["num_hidden_layers"]):
            for module in modules:
                block, inputs, outputs = shapes[module]
                name = f"base_model.model.model.layers.{layer}.{block}.{module}"
                a = torch.randn(args.rank, inputs, generator=generator) / inputs**0.5
                b = torch.randn(outputs, args.rank, generator=generator) * 0.02
                tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a.half(), b.half()
        folder = args.out / f"a{number}"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = dict(
            peft_type="LORA", task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, target_modules=modules
        )
        config |= dict(bias="none", inference_mode=True, lora_dropout=0.0, use_dora=False, use_rslora=False)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
