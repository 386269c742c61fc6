"""The work every peer is given, and the line it reports.

n prompts of `prompt` random token ids, `new` tokens generated greedily for each, all n at once, end-of-sequence
ignored, no prefix cache. Prefill is the time to the first token of all; decode is what the other `new - 1` tokens take.
A line is JSON: rates in tokens per second over all sequences, the best of `repeat` runs.
"""

import argparse
import json
import random
import time


def arguments(description: str, *positional: tuple[str, str]) -> argparse.Namespace:
    """The command line shared by all: positional arguments by (name, help), then the shape of the work."""
    parser = argparse.ArgumentParser(description=description)
    for name, text in positional:
        parser.add_argument(name, help=text)
    parser.add_argument("--n", default="1,8,32", help="numbers of concurrent sequences")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens generated for each")
    parser.add_argument("--repeat", type=int, default=3, help="runs, of which the best is reported")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.n = [int(n) for n in args.n.split(",")]
    return args


def prompts(n: int, length: int, vocabulary: int = 49152) -> list[list[int]]:
    """The same random ids for every peer. Ids below 5 are special tokens."""
    rng = random.Random(n)
    return [[rng.randrange(5, vocabulary) for _ in range(length)] for _ in range(n)]


def seconds(work) -> float:
    """How long `work()` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def report(
    peer: str, version: str, model: str, args: argparse.Namespace, n: int, prefill: float, decode: float, **more
) -> None:
    """Prints one line; `prefill` and `decode` are seconds."""
    line = dict(peer=peer, version=version, model=model, threads=args.threads, n=n, prompt_tokens=args.prompt)
    line |= dict(new_tokens=args.new, adapters=0) | more
    line["prefill_tokens_per_s"] = round(n * args.prompt / prefill, 1)
    line["decode_tokens_per_s"] = round(n * (args.new - 1) / decode, 1)
    line["decode_step_ms"] = round(1000 * decode / (args.new - 1), 3)
    print(json.dumps(line), flush=True)
