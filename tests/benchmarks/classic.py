"""npnet against the classic exercise's code: time and traced peak memory of training, in one process, interleaved.

    python -m tests.benchmarks.classic [--quick] [--runs N] [--json FILE]

The classic code is not part of this repository: it is looked for at ../shared/peers/classic.py from the project's
root, or at $NPNET_CLASSIC. Every figure is a ratio. Times: in each round every contender takes one training step on
the same batch, in all orders; a ratio is the median over rounds of the ratio within a round.
With --runs, everything is built and timed N times over, since where arrays happen to lie in memory moves a whole run.
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from npnet import Network, NetworkWithCheckpointing, measure_peak
from tests.classic_code import load_classic

NETWORKS = {
    "A 784,100,10": ([784, 100, 10], 100),
    "B 784,30x6,10": ([784, *[30] * 6, 10], 100),
    "C 784,30x50,10": ([784, *[30] * 50, 10], 100),
    "C at batch 4096": ([784, *[30] * 50, 10], 4096),
}


def machine() -> str:
    """BLAS, its kernel and its number of threads."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return f"NumPy {np.__version__}, {os.cpu_count()} cores, BLAS unknown (pip install 'npnet[bench]' tells)"
    blas = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    found = "; ".join(
        f"{b['internal_api']} {b['version']}, kernel {b.get('architecture')}, {b['num_threads']} threads" for b in blas
    )
    return f"NumPy {np.__version__}, {os.cpu_count()} cores, {found}"


def data(batch: int, dtype: type, count: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    make = lambda: (rng.random((batch, 784)).astype(dtype), np.eye(10, dtype=dtype)[rng.integers(0, 10, batch)])  # noqa: E731
    return [make() for _ in range(count)]


def cast(network: Any, dtype: type) -> Any:
    """The classic code works in the dtype of its weights."""
    network.weights = [w.astype(dtype) for w in network.weights]
    network.biases = [b.astype(dtype) for b in network.biases]
    return network


def time_ratios(classic: Any, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name, (sizes, batch) in NETWORKS.items():
        for dtype in (np.float64, np.float32):
            batches = data(batch, dtype)
            networks = {
                "classic": cast(classic.Network(sizes), dtype),
                "plain": Network(sizes, dtype=dtype),
                "every 7": NetworkWithCheckpointing(sizes, 7, dtype=dtype),
            }
            times: dict[str, list[float]] = {contender: [] for contender in networks}
            own_rounds = rounds if batch == 100 else max(8, rounds // 20)
            for i in range(own_rounds + 3):
                for contender, network in shuffled(networks, i):
                    start = time.perf_counter()
                    network.update_mini_batch(batches[i % len(batches)], 0.1)
                    if i >= 3:
                        times[contender].append(time.perf_counter() - start)

            def ratio(a: str, b: str, times: dict[str, list[float]] = times) -> float:
                return round(statistics.median(x / y for x, y in zip(times[a], times[b], strict=True)), 3)

            rows.append(
                {
                    "network": name,
                    "dtype": np.dtype(dtype).name,
                    "classic us": round(statistics.median(times["classic"]) * 1e6),
                    "plain / classic": ratio("plain", "classic"),
                    "every 7 / plain": ratio("every 7", "plain"),
                    "every 7 / classic": ratio("every 7", "classic"),
                    "rounds": own_rounds,
                }
            )
            show(rows[-1])
    return rows


def memory_ratios(classic: Any) -> list[dict[str, Any]]:
    """Traced peaks of construction plus three training steps, 50 hidden layers, float64."""
    sizes = [784, *[30] * 50, 10]

    def peak(make: Callable[[], Any], batch: int) -> int:
        batches = data(batch, np.float64, 3)
        x, y = (np.concatenate(part) for part in zip(*batches, strict=True))
        del batches
        gc.collect()
        return measure_peak(lambda: make().SGD((x, y), 1, batch, 0.1, log=False)).increase_bytes

    rows = []
    for batch, intervals in ((100, (0, 2, 4, 10)), (4096, (0, 7))):
        plain = peak(lambda: classic.Network(sizes), batch)
        for n in intervals:
            theirs = peak(lambda n=n: classic.NetworkWithCheckpointing(sizes, n), batch) if n else plain
            own = peak(lambda n=n: NetworkWithCheckpointing(sizes, n), batch)
            rows.append(
                {
                    "batch": batch,
                    "every": n,
                    "classic bytes": theirs,
                    "npnet bytes": own,
                    "npnet / classic": round(own / theirs, 3),
                    "npnet / classic plain": round(own / plain, 3),
                }
            )
            show(rows[-1])
    return rows


def summarize(runs: list[list[dict[str, Any]]]) -> None:
    """Median, minimum and maximum over the runs."""
    print(f"\nmedian (minimum to maximum) of {len(runs)} runs")
    for rows in zip(*runs, strict=True):
        cells = []
        for column in ("plain / classic", "every 7 / plain", "every 7 / classic"):
            values = sorted(row[column] for row in rows)
            cells.append(f"{column}: {statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})")
        print("  ".join([rows[0]["network"], rows[0]["dtype"], *cells]))


def shuffled(networks: dict[str, Any], by: int) -> Iterable[tuple[str, Any]]:
    """Who goes first finds the batch cold, who follows finds what the one before left in the caches: so all orders
    come up equally often."""
    orders = list(itertools.permutations(networks.items()))
    return orders[by % len(orders)]


def show(row: dict[str, Any]) -> None:
    print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--runs", type=int, default=1, help="time everything so many times over, and summarize")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    try:
        classic = load_classic()
    except FileNotFoundError as error:
        sys.exit(f"skipped: {error}")
    print(machine())
    with np.errstate(all="ignore"):  # the classic sigmoid overflows
        results = {
            "machine": machine(),
            "time": [time_ratios(classic, 40 if options.quick else 400) for _ in range(options.runs)],
            "memory": memory_ratios(classic),
        }
    summarize(results["time"])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
