"""What the optimal schedule gains on networks whose layers differ: python -m tests.benchmarks.shapes [--csv FILE]

For each shape the smallest feasible budget of each strategy (bytes of activations, gradients and workspace; parameters,
which no schedule changes, are left out), and the recomputation of each at equal peak: that of the every-nth schedule
with the smallest peak. Nothing is timed: these are the planner's figures, and tests/test_predicted_memory.py holds them
to what is measured.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

from npnet import Plan, mlp, plan, tradeoff
from npnet.report import Table

DEPTH, BATCH = 40, 1024
WIDTHS = np.geomspace(1024, 16, DEPTH + 1).round().astype(int).tolist()
SHAPES = {
    "uniform": [128] * (DEPTH + 1),
    "funnel": WIDTHS,  # 1024 ... 16, falling by the same ratio
    "hourglass": WIDTHS[::2] + WIDTHS[-3::-2],  # 1024 ... 16 ... 1024
    "alternating": [512, 16] * (DEPTH // 2) + [512],
}


def rows() -> list[dict[str, object]]:
    """One per shape and strategy."""
    result: list[dict[str, object]] = []
    for shape, sizes in SHAPES.items():
        network = mlp(sizes, dtype="float32", rng=0)
        curve = tradeoff(network, BATCH)
        strategies = {
            "every nth": curve.others["every nth"],
            "sqrt": curve.others["sqrt"],
            "revolve": curve.others["revolve"],
            "optimal": curve.optimal,
        }
        equal = smallest(strategies["every nth"]).peak_bytes
        fixed = curve.optimal[0].chain.fixed
        plain = curve.optimal[-1].peak_bytes - fixed
        for name, plans in strategies.items():
            least = smallest(plans)
            if name == "optimal":
                plans = [plan(network, BATCH, memory_budget=equal)]
            fitting = [each for each in plans if each.peak_bytes <= equal]
            cheapest = min(fitting, key=lambda each: each.recompute_flops, default=None)
            result.append(
                {
                    "shape": shape,
                    "strategy": name,
                    "smallest budget": least.peak_bytes - fixed,
                    "of plain": round((least.peak_bytes - fixed) / plain, 3),
                    "with": least.schedule.name,
                    "its extra flops": f"{100 * least.overhead:.1f} %",
                    "extra flops at equal peak": "does not fit"
                    if cheapest is None
                    else f"{100 * cheapest.overhead:.1f} %",
                }
            )
    return result


def smallest(plans: list[Plan]) -> Plan:
    """The plan with the smallest peak; of several, the cheapest."""
    return min(plans, key=lambda each: (each.peak_bytes, each.recompute_flops))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, metavar="FILE")
    options = parser.parse_args()
    table = Table("shapes", f"{DEPTH} layers, float32, batch size {BATCH}", rows())
    print(table)
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(table.rows[0]))
            writer.writeheader()
            writer.writerows(table.rows)


if __name__ == "__main__":
    sys.exit(main())
