"""The traces that workload.sh replays beside the ready-made ones, and the tables of what it measured.

  workload.py traces FOLDER   writes them; FOLDER has two-tenants.jsonl and one-r8.jsonl already
  workload.py tables RUN      prints tables of a run's files
"""

import json
import pathlib
import statistics
import sys

ADAPTERS = 5000
# A busy batch: so many sequences decode, prompts so short that they all begin in one step.
STEADY, STEADY_PROMPT, STEADY_ANSWER = 31, 4, 600
PROBE_PROMPT, PROBE_ANSWER, PROBES, PROBES_FROM_US, PROBES_EVERY_US = 64, 8, 15, 3_000_000, 1_000_000


def read(path):
    header, *requests = [json.loads(line) for line in path.read_text().splitlines()]
    return header, requests


def write(path, header, requests):
    header["workload"]["name"] = path.stem
    header["workload"]["requests"] = len(requests)
    requests = sorted(requests, key=lambda request: request["at_us"])
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *requests]))


def request(at_us, kind, adapter, seed):
    prompt, answer = [(STEADY_PROMPT, STEADY_ANSWER), (PROBE_PROMPT, PROBE_ANSWER)][kind]
    return {
        "at_us": at_us, "tenant": 0, "class": kind, "adapter": adapter,
        "prompt_seed": seed, "prompt_tokens": prompt, "answer_tokens": answer,
    }


def traces(folder):
    header, requests = read(folder / "one-r8.jsonl")
    for name, adapters in [("register-500", 500), ("register", ADAPTERS)]:
        header["workload"]["adapters"] = adapters
        header["adapter_ranks"] = [8] * adapters
        write(folder / f"{name}.jsonl", header, requests[:1])

    # What the quiet tenant sends, with other prompts, which no cache knows.
    tenants, both = read(folder / "two-tenants.jsonl")
    solo = [{**one, "prompt_seed": one["prompt_seed"] ^ 1} for one in both if one["tenant"] == 0]
    write(folder / "solo.jsonl", tenants, solo)

    equal = header["workload"]["classes"][0]
    header["workload"]["classes"] = [{**equal, "name": "steady"}, {**equal, "name": "probe"}]
    steady = [request(0, 0, number, number) for number in range(STEADY)]
    times = [PROBES_FROM_US + number * PROBES_EVERY_US for number in range(PROBES)]
    write(folder / "busy-brief.jsonl", header, [{**one, "answer_tokens": 1} for one in steady])
    write(folder / "busy.jsonl", header, steady)
    warm = [request(at, 1, 0, 1000 + at) for at in times]
    write(folder / "busy-warm.jsonl", header, steady + warm)
    for round_ in range(1, 10):
        # Adapters that nobody has asked for before.
        cold = [request(at, 1, 4000 + round_ * 100 + number, 2000 + round_ + at) for number, at in enumerate(times)]
        write(folder / f"busy-cold-{round_}.jsonl", header, steady + cold)
        write(folder / f"busy-one-cold-{round_}.jsonl", header, steady + [{**cold[0], "adapter": 4050 + round_ * 100}])


def group(report, kind, name):
    return next(one for one in report[kind] if one["name"] == name)


def reports(run, name):
    return [json.loads(path.read_text()) for path in sorted(run.glob(f"{name}-[0-9]*.json"))]


def row(*cells):
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def head(*cells):
    print()
    row(*cells)
    row(*["---"] * len(cells))


def throughput(run):
    names = ["one-r8", "zipf-2k-r8", "uniform-2k-r8"]
    of = {name: reports(run, name) for name in names}
    head("workload", "tok/s, each round", "best", "of one adapter", "median", "of one adapter", "adapter hits", "loads", "TTFT p95, ms", "between p99, ms")
    ones = [report["tokens_per_s"] for report in of["one-r8"]]
    for name in names:
        rates = [report["tokens_per_s"] for report in of[name]]
        last = of[name][-1]
        count = lambda key: int(last["server"].get(f"openlora_adapter_{key}_total", 0))
        asked = count("hits") + count("misses")
        row(
            name, ", ".join(f"{rate:.0f}" for rate in rates), f"{max(rates):.0f}", f"{max(rates) / max(ones):.1%}",
            f"{statistics.median(rates):.0f}", f"{statistics.median(rates) / statistics.median(ones):.1%}", f"{count('hits')} of {asked}", count("loads"),
            f"{last['classes'][0]['ttft_ms']['p95']:.0f}", f"{last['classes'][0]['inter_token_ms']['p99']:.0f}",
        )


def busy(run):
    head("in a busy batch", "others' time between tokens, p99 of each round, ms", "median", "probe's TTFT p50, ms")
    for name in ["busy", "busy-one-cold", "busy-warm", "busy-cold"]:
        found = reports(run, name)
        p99 = [group(report, "classes", "steady")["inter_token_ms"]["p99"] for report in found]
        first = [group(report, "classes", "probe")["ttft_ms"]["p50"] for report in found]
        row(name, ", ".join(f"{ms:.1f}" for ms in p99), f"{statistics.median(p99):.1f}", f"{statistics.median(first):.0f}")


def tenants(run):
    head("tenants", "quiet: TTFT p50, ms", "p95 of each round, ms", "median p95", "loud: TTFT p50, ms")
    for name in ["solo", "two-tenants"]:
        found = reports(run, name)
        quiet, loud = ([group(report, "tenants", who)["ttft_ms"] for report in found] for who in ["quiet", "loud"])
        p95 = [one["p95"] for one in quiet]
        row(
            name, f"{statistics.median(one['p50'] for one in quiet):.0f}", ", ".join(f"{ms:.0f}" for ms in p95),
            f"{statistics.median(p95):.0f}", f"{statistics.median(one['p50'] for one in loud):.0f}",
        )


def tables(run):
    """Of the parts that the folder has."""
    for part, file in [(throughput, "one-r8-1.json"), (busy, "busy-1.json"), (tenants, "solo-1.json")]:
        if (run / file).exists():
            part(run)
    print()
    for name in ["registry.txt", "memory.txt"]:
        if (run / name).exists():
            print((run / name).read_text(), end="")


if __name__ == "__main__":
    {"traces": traces, "tables": tables}[sys.argv[1]](pathlib.Path(sys.argv[2]))
