#!/usr/bin/env python3
"""Makes one table of a run folder of compare.sh: the better of each system's rounds, and our ratios to the peers."""

import glob
import json
import pathlib
import statistics
import sys


def peers(run, pattern):
    """{n: (prefill, decode)}: the best of all rounds of one peer."""
    best = {}
    for path in glob.glob(str(run / pattern)):
        for line in pathlib.Path(path).read_text().splitlines():
            if line.startswith("{"):
                row = json.loads(line)
                prefill, decode = best.get(row["n"], (0, 0))
                best[row["n"]] = (max(prefill, row["prefill_tokens_per_s"]), max(decode, row["decode_tokens_per_s"]))
    return best


def ours(run):
    """{(n, adapters): (prefill, decode)}: the best of all rounds."""
    best = {}
    for path in glob.glob(str(run / "openlora-*/results.json")):
        for outcome in json.loads(pathlib.Path(path).read_text())["outcomes"]:
            key = (outcome["workload"]["sequences"], outcome["workload"]["adapters"])
            prefill, decode = best.get(key, (0, 0))
            best[key] = (max(prefill, outcome["prefill_tokens_per_s"]), max(decode, outcome["decode_tokens_per_s"]))
    return best


def main():
    run = pathlib.Path(sys.argv[1])
    theirs = {
        "OpenVINO GenAI Q4_1": peers(run, "openvino-*.txt"),
        "llama.cpp Q4_0": peers(run, "llamacpp-*.txt"),
    }
    mine = ours(run)
    print("| system | adapters | sequences | prefill tok/s | decode tok/s |\n|---|---|---|---|---|")
    for (n, adapters), (prefill, decode) in sorted(mine.items()):
        print(f"| OpenLoRA | {adapters or 'none'} | {n} | {prefill:.0f} | {decode:.0f} |")
    for name, rows in theirs.items():
        for n, (prefill, decode) in sorted(rows.items()):
            print(f"| {name} | none | {n} | {prefill:.0f} | {decode:.0f} |")
    print("\n| ours over theirs | adapters | sequences | prefill | decode |\n|---|---|---|---|---|")
    for name, rows in theirs.items():
        for (n, adapters), (prefill, decode) in sorted(mine.items()):
            if n in rows:
                print(f"| {name} | {adapters or 'none'} | {n} | {prefill / rows[n][0]:.2f} | {decode / rows[n][1]:.2f} |")
    loads = [json.loads(path.read_text()) for path in sorted(run.glob("load-*.json"))]
    engines = [json.loads(path.read_text())["outcomes"][0] for path in sorted(run.glob("engine-*.json"))]
    if loads and engines:
        # The whole request, prefill included, on both sides; of each the best and the median.
        work = engines[0]["workload"]
        alone = [work["sequences"] * work["answer_tokens"] / min(total for _, total in one["runs"]) for one in engines]
        served = [load["tokens_per_s"] for load in loads]
        print("\n| tok/s | best | median |\n|---|---|---|")
        for name, rates in (("engine alone", alone), ("through gRPC", served)):
            print(f"| {name} | {max(rates):.0f} | {statistics.median(rates):.0f} |")
        cost = 1 - statistics.median(served) / statistics.median(alone)
        print(f"\nThe server costs {1 - max(served) / max(alone):.1%} (best), {cost:.1%} (median).")


if __name__ == "__main__":
    main()
