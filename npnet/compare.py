"""The lab exercise's report, measured: accuracies, running times and peak memory, with and without checkpointing."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npnet.layer import Pair
from npnet.memory import format_bytes, measure_peak
from npnet.network import NetworkWithCheckpointing
from npnet.plots import figure, plot_accuracies, plot_bars
from npnet.report import Table, describe_sizes

SMALL, DEEP, LONG = [784, 30, 30, 30, 30, 10], [784, *[30] * 6, 10], [784, *[30] * 50, 10]
BATCH, ETA = 100, 3.0


def _network(sizes: Sequence[int], n: int, seed: int) -> NetworkWithCheckpointing:
    """The network that the classic exercise builds after np.random.seed(seed)."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        return NetworkWithCheckpointing(sizes, n)
    finally:
        np.random.set_state(state)


def _name(n: int) -> str:
    return f"every {n}" if n else "plain"


def accuracy_table(train: Pair, test: Pair, epochs: int, seed: int) -> Table:
    """Accuracy after each epoch, plain and with a checkpoint every 1, 2, 4 layers."""
    accuracies: dict[str, list[float]] = {}
    for n in (0, 1, 2, 4):
        network = _network(SMALL, n, seed)
        accuracies[_name(n)] = own = []
        for _ in range(epochs):
            network.SGD(train, 1, BATCH, ETA, log=False)
            own.append(network.evaluate(test))
    names = list(accuracies)
    rows = [
        {"epoch": i, **dict(zip(names, values, strict=True)), "equal": len(set(values)) == 1}
        for i, values in enumerate(zip(*accuracies.values(), strict=True))
    ]

    def draw(path: Path) -> None:
        drawing, (axes,) = figure(1)
        plot_accuracies(accuracies, axes)
        drawing.savefig(path, dpi=120)

    return Table("accuracy", f"Accuracy after each epoch, {describe_sizes(SMALL)}, seed {seed}", rows, draw)


def time_table(train: Pair, rounds: int, steps: int, seed: int) -> Table:
    """Milliseconds a training step: medians over rounds in which all networks take turns; ratios round by round."""
    rows = []
    for sizes, intervals in (([784, 100, 10], (0, 1, 2, 4)), (DEEP, (0, 1, 2, 4)), (LONG, (0, 1, 2, 4, 7, 10))):
        networks = {n: _network(sizes, n, seed) for n in intervals}
        times: dict[int, list[float]] = {n: [] for n in intervals}
        for round_number in range(rounds + 1):
            for n, network in networks.items():
                start = time.perf_counter()
                for step in range(steps):
                    part = slice(step * BATCH, (step + 1) * BATCH)
                    network.update_mini_batch((train[0][part], train[1][part]), ETA)
                if round_number:  # the first is warming up
                    times[n].append((time.perf_counter() - start) / steps)
        for n, seconds in times.items():
            ratios = [own / plain for own, plain in zip(seconds, times[0], strict=True)]
            rows.append(
                {
                    "network": describe_sizes(sizes),
                    "checkpoints": _name(n),
                    "extra forwards": networks[n].schedule.extra_forwards,
                    "ms a step": round(statistics.median(seconds) * 1e3, 3),
                    "ratio": round(statistics.median(ratios), 3),
                }
            )
    return Table(
        "time",
        f"Time of a training step, batch {BATCH}, medians of {rounds} interleaved rounds of {steps} steps",
        rows,
        _bars(rows, "ms a step", "ms"),
    )


def memory_table(train: Pair, seed: int) -> Table:
    """Traced peak of building a network and training it for three steps."""
    rows = []
    for sizes in ([784, *[30] * 5, 10], LONG):
        plain = 0
        for n in (0, 2, 4, 7, 10):

            def build_and_train(sizes: Sequence[int] = sizes, n: int = n) -> None:
                few = train[0][: 3 * BATCH], train[1][: 3 * BATCH]
                _network(sizes, n, seed).SGD(few, 1, BATCH, ETA, log=False)

            peak = measure_peak(build_and_train).increase_bytes
            plain = plain or peak
            rows.append(
                {
                    "network": describe_sizes(sizes),
                    "checkpoints": _name(n),
                    "peak bytes": peak,
                    "saved bytes": plain - peak,
                    "ratio": round(peak / plain, 3),
                }
            )
    return Table(
        "memory", f"Peak memory of construction and training, batch {BATCH}", rows, _bars(rows, "peak bytes", "B")
    )


def _bars(rows: list[dict[str, Any]], column: str, unit: str) -> Callable[[Path], None]:
    """Draws a group of bars per network."""

    def draw(path: Path) -> None:
        names = list(dict.fromkeys(row["network"] for row in rows))
        drawing, all_axes = figure(len(names))
        for name, axes in zip(names, all_axes, strict=True):
            own = [row for row in rows if row["network"] == name]
            scale, label = (1e6, "MB") if unit == "B" else (1, unit)
            shown = [format_bytes(row[column]) if unit == "B" else f"{row[column]:.3g}" for row in own]
            plot_bars(
                {row["checkpoints"]: row[column] / scale for row in own}, axes, title=name, ylabel=label, labels=shown
            )
        drawing.savefig(path, dpi=120)

    return draw


def report(train: Pair, test: Pair, quick: bool, seed: int) -> Iterator[Table]:
    """The tables, one by one, as they are measured; ``quick`` takes a tenth of the data and of the rounds."""
    if quick:
        train, test = (train[0][:6000], train[1][:6000]), (test[0][:1000], test[1][:1000])
    yield accuracy_table(train, test, 2 if quick else 5, seed)
    yield time_table(train, 5 if quick else 25, 5 if quick else 20, seed)
    yield memory_table(train, seed)
