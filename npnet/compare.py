"""The lab exercise's report, measured: accuracies, running times and peak memory, with and without checkpointing."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from npnet.drawing import figure, plot_accuracies, plot_bars, save_figure
from npnet.layer import Pair
from npnet.memory import format_bytes, measure_peak
from npnet.network_with_checkpointing import NetworkWithCheckpointing
from npnet.report import Row, Table, describe_sizes

BATCH, ETA, EPOCHS = 100, 3.0, 5
LONG = [784, *[30] * 50, 10]
ACCURACY = [784, 30, 30, 30, 30, 10], (0, 1, 2, 4)  # sizes, and the intervals between checkpoints that are compared
TIMES = ([784, 100, 10], (0, 1, 2, 4)), ([784, *[30] * 6, 10], (0, 1, 2, 4)), (LONG, (0, 1, 2, 4, 7, 10))
MEMORY = ([784, *[30] * 5, 10], (0, 2, 4, 10)), (LONG, (0, 2, 4, 7, 10))


def report(train: Pair, test: Pair, quick: bool, seed: int) -> Iterator[Table]:
    """The tables, one by one, as they are measured; ``quick`` takes a tenth of the data and a few rounds.

    Interrupted by Ctrl-C, it first gives the rows that it has of the table under way.
    """
    if len(train[0]) < BATCH:
        raise ValueError(f"the report needs at least one batch of {BATCH} training samples, got {len(train[0])}")
    if quick:
        train, test = (train[0][:6000], train[1][:6000]), (test[0][:1000], test[1][:1000])
    rounds = 50 if quick else 400
    accuracy = f"Accuracy after each epoch, {describe_sizes(ACCURACY[0])}, seed {seed}"
    times = f"Time of a training step, batch {BATCH}, medians of {rounds} rounds in which all networks take a step"
    memory = (
        f"Traced peak of construction and training, batch {BATCH} (where checkpoints save nothing, the weights and the "
        "first layer's gradient are the peak)"
    )
    draw_times = partial(_draw_bars, column="ms a step", label="ms a step", text="{:.3g}".format)
    draw_memory = partial(_draw_bars, column="peak bytes", unit=1e6, label="MB at the peak", text=format_bytes)
    parts = (
        (Table("accuracy", accuracy, [], _draw_accuracy), accuracy_rows(train, test, EPOCHS, seed)),
        (Table("time", times, [], draw_times), time_rows(train, rounds, seed)),
        (Table("memory", memory, [], draw_memory), memory_rows(train, seed)),
    )
    for table, rows in parts:
        try:
            for row in rows:
                table.rows.append(row)
        except KeyboardInterrupt:
            if table.rows:
                yield table
            raise
        yield table


def accuracy_rows(train: Pair, test: Pair, epochs: int, seed: int) -> Iterator[Row]:
    """The accuracy of each network after each epoch, and whether they are all equal."""
    sizes, intervals = ACCURACY
    networks = [_network(sizes, n, seed) for n in intervals]
    for epoch in range(epochs):
        accuracies = []
        for network in networks:
            network.SGD(train, 1, BATCH, ETA, log=False)
            accuracies.append(network.evaluate(test))
        names = (_name(n) for n in intervals)
        yield {"epoch": epoch, **dict(zip(names, accuracies, strict=True)), "equal": len(set(accuracies)) == 1}


def time_rows(train: Pair, rounds: int, seed: int) -> Iterator[Row]:
    """Milliseconds a training step: networks of one architecture take turns, ratios are taken round by round."""
    for sizes, intervals in TIMES:
        networks = {n: _network(sizes, n, seed) for n in intervals}
        times: dict[int, list[float]] = {n: [] for n in intervals}
        batches = [
            (train[0][i : i + BATCH], train[1][i : i + BATCH])
            for i in range(0, min(20 * BATCH, len(train[0]) - BATCH + 1), BATCH)
        ]
        for round_number in range(rounds + 3):
            for n, network in networks.items():
                start = time.perf_counter()
                network.update_mini_batch(batches[round_number % len(batches)], ETA)
                if round_number >= 3:  # the first ones are warming up
                    times[n].append(time.perf_counter() - start)
        for n, seconds in times.items():
            ratios = [own / plain for own, plain in zip(seconds, times[0], strict=True)]
            yield {
                "network": describe_sizes(sizes),
                "checkpoints": _name(n),
                "extra forwards": networks[n].schedule.extra_forwards,
                "ms a step": round(statistics.median(seconds) * 1e3, 3),
                "ratio": round(statistics.median(ratios), 3),
            }


def memory_rows(train: Pair, seed: int) -> Iterator[Row]:
    """Bytes at the peak of building a network and training it for three steps."""
    few = train[0][: 3 * BATCH], train[1][: 3 * BATCH]

    def build_and_train(sizes: Sequence[int], n: int) -> None:
        _network(sizes, n, seed).SGD(few, 1, BATCH, ETA, log=False)

    for sizes, intervals in MEMORY:
        plain = 0
        for n in intervals:
            peak = measure_peak(build_and_train, sizes, n, backend="numpy").increase_bytes
            plain = plain or peak
            yield {
                "network": describe_sizes(sizes),
                "checkpoints": _name(n),
                "peak bytes": peak,
                "saved bytes": plain - peak,
                "ratio": round(peak / plain, 3),
            }


def _network(sizes: Sequence[int], n: int, seed: int) -> NetworkWithCheckpointing:
    """The network that the classic exercise builds after np.random.seed(seed)."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        return NetworkWithCheckpointing(sizes, n, backend="numpy")
    finally:
        np.random.set_state(state)


def _name(n: int) -> str:
    return f"every {n}" if n else "plain"


def _draw_accuracy(rows: Sequence[Row], path: Path) -> None:
    drawing, (axes,) = figure(1)
    plot_accuracies({name: [row[name] for row in rows] for name in rows[0] if name not in ("epoch", "equal")}, axes)
    save_figure(drawing, path)


def _draw_bars(
    rows: Sequence[Row], path: Path, column: str, label: str, text: Callable[[float], str], unit: float = 1.0
) -> None:
    """A group of bars for each network: the values of ``column`` in ``unit``, with ``text(value)`` on each."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    drawing, all_axes = figure(len(names))
    for name, axes in zip(names, all_axes, strict=True):
        values = {row["checkpoints"]: row[column] for row in rows if row["network"] == name}
        bars = {checkpoints: value / unit for checkpoints, value in values.items()}
        plot_bars(bars, axes, title=name, ylabel=label, labels=list(map(text, values.values())))
    save_figure(drawing, path)
