"""Memory and time of a training step against depth: python -m tests.benchmarks.depth [--most 10000] [--out DIR]

Plain backpropagation, sqrt and revolve on chains of 10 to 10,000 dense layers of 30, ReLU, batch size 100, float32. The
traced peak of one step (parameters not counted) beside the predicted one, and the time of an untraced step (medians of
interleaved ones). With --out: depth.csv and depth.png, log-log.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from npnet import SGD, Quadratic, measure_peak, mlp, plan, train_step
from npnet.report import Table

WIDTH, BATCH = 30, 100
DEPTHS = 10, 30, 100, 300, 1000, 3000, 10_000
STRATEGIES = "none", "sqrt", "revolve"


def rows(most: int) -> Iterator[dict[str, object]]:
    """One per depth and strategy."""
    rng = np.random.default_rng(0)
    x, y = rng.random((BATCH, WIDTH), np.float32), np.zeros((BATCH, WIDTH), np.float32)
    loss, optimizer = Quadratic(), SGD(1e-6)
    for depth in (depth for depth in DEPTHS if depth <= most):
        # Identity matrices: with random ones, gradients vanish in 10,000 layers, and denormal numbers are slow.
        model = mlp([WIDTH] * (depth + 1), "relu", "relu", initializer=lambda shape, _: np.eye(*shape))
        plans = {name: plan(model, BATCH, strategy=name, loss=loss, optimizer=optimizer) for name in STRATEGIES}

        def step(name: str) -> float:
            start = time.perf_counter()
            train_step(model, loss, optimizer, plans[name].schedule, x, y)  # noqa: B023 - called at once
            return time.perf_counter() - start

        times = {name: [step(name) for _ in range(2)][1:] for name in STRATEGIES}
        for _ in range(max(3, 3000 // depth)):
            for name in STRATEGIES:
                times[name].append(step(name))
        for name, planned in plans.items():
            yield {
                "depth": depth,
                "strategy": name,
                "schedule": planned.schedule.name,
                "extra forwards": planned.extra_forwards,
                "measured bytes": measure_peak(step, name).increase_bytes,
                "predicted bytes": planned.peak_bytes - planned.chain.fixed,
                "ms a step": round(1e3 * statistics.median(times[name]), 2),
            }


def draw(found: list[dict[str, object]], path: Path) -> None:
    """Peak bytes and time against depth, a line per strategy."""
    from npnet.drawing import figure

    drawing, axes = figure(2)
    for strategy in STRATEGIES:
        points = [row for row in found if row["strategy"] == strategy]
        depths = [row["depth"] for row in points]
        (line,) = axes[0].loglog(depths, [row["measured bytes"] for row in points], "o", label=f"{strategy}, measured")
        axes[0].loglog(
            depths, [row["predicted bytes"] for row in points], color=line.get_color(), label=f"{strategy}, predicted"
        )
        axes[1].loglog(depths, [row["ms a step"] for row in points], "o-", color=line.get_color(), label=strategy)
    axes[0].set(title="peak of a training step, without parameters", xlabel="layers", ylabel="bytes")
    axes[1].set(title="time of a training step", xlabel="layers", ylabel="ms")
    for ax in axes:
        ax.legend()
    drawing.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=DEPTHS[-1], help="the greatest depth")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write depth.csv and depth.png there")
    options = parser.parse_args()
    table = Table(
        "depth", f"dense layers of {WIDTH}, ReLU, batch size {BATCH}, float32", list(rows(options.most)), draw
    )
    print(table)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        table.write(options.out)


if __name__ == "__main__":
    main()
