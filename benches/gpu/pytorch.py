#!/usr/bin/env python3
"""The usual PyTorch ways of applying many LoRA adapters to one batch, in the sizes of `openlora bench --device cuda`, as a baseline:

- a loop over the adapters of the batch: two products for each adapter and linear;
- gather + bmm: the factors of every row's adapter picked out with index_select, then two batched products;
- bmm: the same with the factors picked out beforehand, which only a batch that stays the same could do.

Each way does all linears of all layers once. Times are medians by CUDA events (the host's clock on the CPU) and have the layout of
results.json. Needs torch alone:

    python3 benches/gpu/pytorch.py --device cuda:0 --out pytorch.json
    python3 benches/gpu/pytorch.py --device cpu --tiny
"""

import argparse
import json
import statistics
import sys
import time

import torch

# Layers, and inputs and outputs of a layer's fused linears' parts: q, k, v, o, gate, up, down.
SHAPES = {
    "llama-3.1-8b": (
        32,
        [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)],
    ),
    "tiny": (2, [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]),
}


class Clock:
    """Times calls in milliseconds by the device's clock."""

    def __init__(self, device: torch.device, samples: int):
        self.device, self.samples = device, samples

    def time(self, call) -> list[float]:
        for _ in range(2):
            call()
        return sorted(self.once(call) for _ in range(self.samples))

    def once(self, call) -> float:
        if self.device.type != "cuda":
            began = time.perf_counter()
            call()
            return (time.perf_counter() - began) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)


class Site:
    """The factors of all adapters at one linear of one layer, and the rows around it."""

    def __init__(self, inputs: int, outputs: int, adapters: int, rank: int, rows: int, device: torch.device):
        def random(*shape):
            return torch.empty(shape, dtype=torch.bfloat16, device=device).uniform_(-0.05, 0.05)

        self.a, self.b = random(adapters, inputs, rank), random(adapters, rank, outputs)
        self.x, self.out = random(rows, inputs), random(rows, outputs)

    def loop(self, runs: list[tuple[int, int, int]]) -> None:
        """`runs`: adapter, first row and end of each run of rows."""
        for adapter, first, end in runs:
            self.out[first:end] += self.x[first:end] @ self.a[adapter] @ self.b[adapter]

    def gather(self, index: torch.Tensor) -> None:
        a, b = self.a.index_select(0, index), self.b.index_select(0, index)
        self.out += torch.bmm(torch.bmm(self.x.unsqueeze(1), a), b).squeeze(1)

    def pick(self, index: torch.Tensor) -> None:
        self.picked = self.a.index_select(0, index), self.b.index_select(0, index)

    def bmm(self) -> None:
        a, b = self.picked
        self.out += torch.bmm(torch.bmm(self.x.unsqueeze(1), a), b).squeeze(1)


def check(site: Site, runs: list[tuple[int, int, int]], index: torch.Tensor) -> None:
    """All ways do the same."""
    before = site.out.clone()
    site.pick(index)
    results = []
    for way in (lambda: site.loop(runs), lambda: site.gather(index), site.bmm):
        site.out.copy_(before)
        way()
        results.append(site.out.float().clone())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=2e-2, atol=2e-2)


def measure(arguments, shape: str, rows: int, distinct: int, rank: int) -> list[dict]:
    device = torch.device(arguments.device)
    layers, linears = SHAPES[shape]
    sites = [Site(i, o, distinct, rank, rows, device) for _ in range(layers) for i, o in linears]
    bounds = [i * rows // distinct for i in range(distinct + 1)]
    runs = [(i, bounds[i], bounds[i + 1]) for i in range(distinct)]
    index = torch.tensor([adapter for adapter, first, end in runs for _ in range(first, end)], device=device)
    check(sites[0], runs, index)
    factors = layers * sum(i + o for i, o in linears) * rank * distinct * 2
    around = layers * sum(i + 2 * o for i, o in linears) * rows * 2
    flops = 2.0 * layers * sum(i + o for i, o in linears) * rank * rows
    clock, found = Clock(device, arguments.samples), []

    def add(way: str, call) -> None:
        times = clock.time(call)
        found.append(
            {
                "part": "baseline",
                "shape": shape,
                "what": f"{way} {rows} rows, {distinct} x r{rank}",
                "milliseconds": statistics.median(times),
                "best": times[0],
                "worst": times[-1],
                "wall_ms": None,
                "bytes": factors + around,
                "flops": flops,
                "floor_ms": None,
            }
        )

    add("loop over adapters,", lambda: [site.loop(runs) for site in sites])
    add("gather + bmm,", lambda: [site.gather(index) for site in sites])
    # Every row's factors of all sites at once: more memory than there may be.
    picked_bytes = factors // distinct * rows
    if device.type != "cuda" or picked_bytes < torch.cuda.mem_get_info(device)[0] * 0.8:
        for site in sites:
            site.pick(index)
        add("bmm of gathered factors,", lambda: [site.bmm() for site in sites])
    return found


def over_ours(path: str | None, row: dict, what: str) -> float | None:
    """None where ours was not measured."""
    if path is None:
        return None
    with open(path) as file:
        ours = [found for found in json.load(file)["rows"] if (found["shape"], found["what"]) == (row["shape"], what)]
    return row["milliseconds"] / ours[0]["milliseconds"] if ours else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="sizes for trying the script on a CPU")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds after which nothing more is begun")
    parser.add_argument("--out", help="write JSON here, anew after each size")
    parser.add_argument("--ours", help="results.json of `openlora bench`: how many times our time each of these takes")
    arguments = parser.parse_args()
    shape = "tiny" if arguments.tiny else "llama-3.1-8b"
    sizes = [(4, 4, 4), (4, 1, 4)] if arguments.tiny else [
        (64, 64, 16), (64, 1, 16), (8, 8, 16), (256, 64, 16), (64, 64, 8), (64, 64, 64), (1, 1, 16),
    ]
    cuda = arguments.device.startswith("cuda")
    name = torch.cuda.get_device_name(arguments.device) if cuda else "cpu"
    report = {"device": name, "element": "bf16", "torch": torch.__version__, "rows": [], "skipped": []}
    began = time.monotonic()
    for rows, distinct, rank in sizes:
        what = f"{rows} rows, {distinct} x r{rank}"
        if time.monotonic() - began > arguments.budget:
            report["skipped"].append(f"{what}: the budget of {arguments.budget:.0f} s is over")
        else:
            try:
                report["rows"] += measure(arguments, shape, rows, distinct, rank)
            except torch.OutOfMemoryError as error:
                report["skipped"].append(f"{what}: {str(error).splitlines()[0]}")
            if cuda:
                torch.cuda.empty_cache()
        for row in report["rows"]:
            if row["what"].endswith(" " + what):
                row["over_ours"] = over_ours(arguments.ours, row, "SGMV " + what)
                ratio = "" if row["over_ours"] is None else f", {row['over_ours']:.1f} times ours"
                print(f"{row['what']}: {row['milliseconds']:.3f} ms{ratio}", file=sys.stderr)
        if arguments.out:
            with open(arguments.out, "w") as file:
                json.dump(report, file, indent=2)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
