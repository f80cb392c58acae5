"""Two hours' worth of steps in miniature: 50,000 of a small network, and memory stays as it was after the first 5,000.

Python's allocated blocks are counted (every object that stays is one, or more), and the memory that the system sees;
then tracemalloc counts the bytes of some steps more. It would make all of them take four times as long.
"""

import gc
import mmap
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest

import npnet
from npnet import schedules

CHUNK, CHUNKS = 5_000, 10
MOST_BLOCKS, MOST_BYTES, MOST_RSS = 200, 4_000, 1_000_000
"""What may be left of 45,000 steps, in blocks and resident bytes; of half as many steps as a chunk has, in bytes."""


class Growth(NamedTuple):
    """What was there more than at the start."""

    blocks: int
    rss: int
    traced: int

    @property
    def flat(self) -> bool:
        return self.blocks <= MOST_BLOCKS and self.rss <= MOST_RSS and self.traced <= MOST_BYTES


def sample() -> tuple[int, int]:
    gc.collect()
    return sys.getallocatedblocks(), psutil.Process().memory_info().rss


def growth(run: Callable[[int], None], chunk: int, chunks: int) -> Growth:
    """What ``run(steps)`` leaves behind, from the second chunk of steps on."""
    run(chunk)
    blocks, rss = sample()
    for _ in range(chunks - 1):
        run(chunk)
    blocks, rss = (after - before for after, before in zip(sample(), (blocks, rss), strict=True))
    tracemalloc.start()
    try:
        run(chunk // 2)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        run(chunk // 2)
        gc.collect()
        return Growth(blocks, rss, tracemalloc.get_traced_memory()[0] - before)
    finally:
        tracemalloc.stop()


class Leaky(npnet.Layer):
    """A layer that passes on what it is given, and keeps a little of it in every fifth step."""

    output_suffices = True

    def __init__(self, keep: Callable[[Any], Any] | None) -> None:
        self.keep, self.steps, self.kept = keep, 0, list[Any]()

    def forward(self, x: Any) -> Any:
        y = x.copy()
        return y, (x, y)

    def backward(self, dy: Any, saved: Any) -> Any:
        self.steps += 1
        if self.keep is not None and self.steps % 5 == 0:
            self.kept.append(self.keep(dy))
        return dy.copy()


def fitted(*more: npnet.Layer) -> Callable[[int], None]:
    """Steps of `fit`: dropout, Adam, checkpoints."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4 * CHUNK, 5)).astype(np.float32)
    y = np.eye(3, dtype=np.float32)[rng.integers(3, size=len(x))]
    model = npnet.Sequential(npnet.Dense(5, 4, rng=0), npnet.Dropout(0.2, rng=0), npnet.Linear(4, 3, rng=0), *more)
    optimizer, loss = npnet.Adam(1e-3), npnet.SoftmaxCrossEntropy()

    def run(steps: int) -> None:
        pair = x[: 4 * steps], y[: 4 * steps]
        schedule = schedules.every_nth(len(model.layers), 2, needs_saved=[2])
        npnet.fit(
            model, pair, loss=loss, optimizer=optimizer, epochs=1, batch_size=4, schedule=schedule, rng=0, log=False
        )

    return run


def lab() -> Callable[[int], None]:
    """Steps of the exercise's network, whose weights are looked at now and then."""
    net = npnet.NetworkWithCheckpointing([5, 4, 4, 3], 2, rng=0)
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((4, 5)), np.eye(3)[rng.integers(3, size=4)]

    def run(steps: int) -> None:
        for number in range(steps):
            net.update_mini_batch(batch, 0.1)
            if number % 100 == 0:
                assert len(net.weights) == len(net.biases) == 3

    return run


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """All that other tests left is out of the collector's way."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [fitted, lab])
def test_memory_is_flat_over_fifty_thousand_steps(steps: Callable[[], Callable[[int], None]]) -> None:
    found = growth(steps(), CHUNK, CHUNKS)
    assert found.flat, found


def a_float(dy: Any) -> Any:
    return float(dy[0, 0])


def a_gradient(dy: Any) -> Any:
    return dy.copy()


def a_page(dy: Any) -> Any:
    """Memory that Python knows nothing of."""
    page = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    page[:: mmap.PAGESIZE] = bytes(4)
    return page


LEAKS: dict[Any, set[str]] = {None: set(), a_float: {"blocks"}, a_gradient: {"blocks", "traced"}, a_page: {"rss"}}


@pytest.mark.parametrize("keep", LEAKS)
def test_a_layer_that_leaks_a_little_is_caught(keep: Callable[[Any], Any] | None) -> None:
    """Negative control, in the twentieth part of the steps."""
    found = growth(fitted(Leaky(keep)), 500, 5)
    assert found.flat == (keep is None), found
    limits = {"blocks": MOST_BLOCKS, "rss": MOST_RSS, "traced": MOST_BYTES}
    assert {name for name, most in limits.items() if getattr(found, name) > most} >= LEAKS[keep], found
