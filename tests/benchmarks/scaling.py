"""Time and memory of a training step against depth, width and batch: npnet beside PyTorch and JAX, log-log.

    python -m tests.benchmarks.scaling [--threads 1] [--json FILE] [--plot FILE] [--quick]

One size at a time is changed: the depth of layers of 30 at batch 100, the width of 8 layers at batch 100, the batch
of 8 layers of 30; float32, ReLU, cross-entropy, Adam. A point is the median of interleaved steps, beside the ratio of
npnet's plain step to it. Memory is predicted (within 1 % of what is measured: tests/test_predicted_memory.py).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

DEPTHS = (10, 30, 100, 300, 1000, 3000, 10000)
WIDTHS = (16, 64, 256, 1024, 4096)
BATCHES = (1, 16, 256, 4096, 65536)
CONTENDERS = ("npnet", "npnet captured", "npnet sqrt", "torch", "jax")


def points(quick: bool) -> list[tuple[str, int, tuple[int, ...], int]]:
    """(what is changed, its value, sizes, batch)."""
    some = slice(0, 3) if quick else slice(None)
    return [
        *(("depth", depth, (784, *[30] * depth, 10), 100) for depth in DEPTHS[some]),
        *(("width", width, (784, *[width] * 8, 10), 100) for width in WIDTHS[some]),
        *(("batch", batch, (784, *[30] * 8, 10), batch) for batch in BATCHES[some]),
    ]


def measure(problem: Any, names: Sequence[str], seconds: float = 4.0) -> dict[str, float]:
    """Medians of interleaved steps, in seconds."""
    from tests.benchmarks.contenders import MAKERS

    steps = {name: MAKERS[name](problem) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    with np.errstate(all="ignore"):
        for step in steps.values():
            step(*problem.batches[0])
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times["npnet"]) < 3:
            for name, step in steps.items():
                start = time.perf_counter()
                step(*problem.batches[0])
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in times.items()}


def run(quick: bool) -> list[dict[str, Any]]:
    from npnet import plan
    from tests.benchmarks.contenders import NpnetStep, Problem, available

    rows = []
    for what, value, sizes, batch in points(quick):
        problem = Problem(what, sizes, batch, "float32", "modern", near_identity=True)
        names = [name for name in available(problem) if name in CONTENDERS]
        if what == "depth" and value > 1000:
            names = [name for name in names if name != "jax"]  # it takes minutes to compile
        times = measure(problem, names)
        model = NpnetStep(problem).model
        row: dict[str, Any] = {"what": what, "value": value}
        row |= {f"{name} ms": round(1e3 * seconds, 3) for name, seconds in times.items()}
        row |= {f"npnet / {name}": round(times["npnet"] / seconds, 3) for name, seconds in times.items()}
        row |= {f"{how} bytes": plan(model, batch, strategy=how).peak_bytes for how in ("none", "sqrt", "revolve")}
        rows.append(row)
        print("  ".join(f"{key}: {cell}" for key, cell in row.items()), flush=True)
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    for column, what in enumerate(("depth", "width", "batch")):
        own = [row for row in rows if row["what"] == what]
        for line, unit, label in ((0, " ms", "ms a step"), (1, " bytes", "bytes at the peak")):
            for name in dict.fromkeys(key for row in own for key in row if key.endswith(unit)):
                shown = [row for row in own if name in row]
                axes[line, column].loglog(
                    [row["value"] for row in shown], [row[name] for row in shown], "o-", label=name.removesuffix(unit)
                )
            axes[line, column].set_xlabel(what)
            axes[line, column].set_ylabel(label)
            axes[line, column].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    from tests.benchmarks.frameworks import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the small sizes only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if os.environ.get("NPNET_BENCH_CHILD") != "1":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
        again = [sys.executable, "-m", "tests.benchmarks.scaling", *sys.argv[1:]]
        sys.exit(subprocess.run(again, env=environment(options.threads), check=False).returncode)
    from tests.benchmarks.classic import machine

    print(f"{machine()}\n", flush=True)
    rows = run(options.quick)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "threads": options.threads, "rows": rows}, indent=1))
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
