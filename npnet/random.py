"""Where random numbers come from, and how a recomputation draws the same ones again.

Everything that is random once (weights, the order of the data) takes ``rng=``: None, a seed, or a
``numpy.random.Generator``. Numbers are drawn on the host with NumPy and then moved, so that a seed means the same
numbers on every backend.

What is random in every step (dropout) must come out the same when a layer is run again in that step, or checkpointing
would compute the gradient of another function. There is no generator whose state would have to be saved and put back:
each draw is a function of (key of the layer, number of the step), computed by the counter-based generator Philox
(Salmon, Moraes, Dror & Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011). The engine numbers the steps. Where
several processes share a batch, each begins at its first row: a sample's numbers do not depend on who has it.
Dropout's masks are made where its input is, on a device by Philox's formula in integers: the same bits everywhere.
"""

import copy
import math
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np

from npnet.backend import Array, BackendUnavailable, get_backend
from npnet.checks import check_whole

RNG: TypeAlias = int | np.random.Generator | None
"""What ``rng=`` takes: a seed, a generator, or None: the stream of `set_seed`, if that was called, or fresh entropy."""


class _State(threading.local):
    """Of each thread its own, so that two trainings do not disturb each other."""

    generator: np.random.Generator | None = None  # set_seed's
    next_step = 0
    step: int | None = None  # while a step runs
    updates: "dict[Any, Array] | None" = None  # new values of buffers, for its end; None: it counts for nothing
    first_row = 0  # of this process's share of the batch


_state = _State()


def as_generator(rng: RNG = None) -> np.random.Generator:
    """The generator that ``rng`` stands for.

    Raises:
        TypeError, ValueError: ``rng`` is not None, a generator or a whole number >= 0.

    >>> int(as_generator(3).integers(100)) == int(as_generator(3).integers(100))
    True
    """
    if rng is None and _state.generator is not None:
        return _state.generator
    if rng is None or isinstance(rng, np.random.Generator):
        return np.random.default_rng(rng)
    return np.random.default_rng(check_whole(rng, "rng (a seed or a numpy.random.Generator)", most=math.inf))


def set_seed(seed: int) -> dict[str, int]:
    """Seed every source of random numbers: Python's ``random``, NumPy's global stream, npnet's own, CuPy's.

    From then on everything in this thread that takes ``rng=None`` draws from one stream, and steps are numbered from 0.
    Other threads have steps of their own, and draw as before; but Python's and NumPy's streams (`npnet.Network` without
    ``rng``) are the whole process's. A thread that does several trainings, as in a pool, calls this before each one.
    Hash randomization (the order of sets of strings) is fixed for child processes only: Python reads PYTHONHASHSEED
    when it starts.

    Returns:
        What was seeded, with which seed.

    Raises:
        TypeError, ValueError: ``seed`` is not a whole number from 0 to 2^32 - 1.
    """
    seed = check_whole(seed, "seed")
    if seed >= 2**32:
        raise ValueError(f"seed: expected a whole number from 0 to {2**32 - 1} (NumPy takes no more), got {seed}")
    random.seed(seed)
    np.random.seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)
    _state.generator, _state.next_step = np.random.default_rng(seed), 0
    done = dict.fromkeys(("python", "numpy", "npnet", "PYTHONHASHSEED"), seed)
    try:
        get_backend("cupy").xp.random.seed(seed)
        done["cupy"] = seed
    except BackendUnavailable:
        pass
    return done


class one_step:  # noqa: N801 - used as a function; a class, since every step enters it
    """Inside it, every draw belongs to one step: by default the step under way, or else a new one.

    At the end of a new step the buffers take their new values (`npnet.Buffer.update`). A step that is given by its
    number is run again, or rehearsed: it changes no buffer.

    Args:
        step: the number of the step.
        counts: False changes no buffer in any case, for passes that only measure or differentiate.
    """

    __slots__ = ("before", "begins", "counts", "step")

    def __init__(self, step: int | None = None, *, counts: bool = True) -> None:
        self.step, self.counts = step, counts

    def __enter__(self) -> int:
        before = self.before = _state.step, _state.updates
        updates: dict[Any, Array] | None
        self.begins = self.step is None and before[0] is None
        if self.begins:
            step, updates = new_step(), {} if self.counts else None
        else:
            step = before[0] if self.step is None else self.step  # type: ignore[assignment]
            updates = before[1] if self.step is None and self.counts else None
        _state.step, _state.updates = step, updates
        return step

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.begins and kind is None:
            for buffer, value in (_state.updates or {}).items():
                buffer.value = value
        _state.step, _state.updates = self.before


def in_step() -> bool:
    """Whether a step is under way."""
    return _state.step is not None


def updates_of_step() -> "dict[Any, Array] | None":
    """The buffers' new values, which they take at the end of the step; None in a pass that changes none."""
    return _state.updates


def set_updates(updates: "dict[Any, Array] | None") -> "dict[Any, Array] | None":
    """Collect the buffers' new values in ``updates`` from now on, or nowhere; returns what was there before."""
    before, _state.updates = _state.updates, updates
    return before


def new_step() -> int:
    """The number of a step that was never used before in this thread (since `set_seed`)."""
    _state.next_step += 1
    return _state.next_step - 1


@contextmanager
def kept_streams() -> Iterator[None]:
    """Put NumPy's global stream, which is the whole process's, and this thread's own back to where they were."""
    before, own = np.random.get_state(), copy.deepcopy(_state.generator)
    try:
        yield
    finally:
        np.random.set_state(before)
        if _state.generator is not None and own is not None:
            _state.generator.bit_generator.state = own.bit_generator.state


def next_step() -> int:
    """The number that the next step of this thread will have."""
    return _state.next_step


def set_next_step(step: int) -> None:
    """Number the steps of this thread from ``step`` on: where a run that is resumed stands."""
    _state.next_step = check_whole(step, "step")


def current_step() -> int:
    """The number of the step under way; outside of one, every call is a step of its own."""
    return new_step() if _state.step is None else _state.step


@contextmanager
def rows_from(first: int) -> Iterator[None]:
    """Inside it, the rows at work are those of a batch from number ``first`` on: a process's share of it."""
    before, _state.first_row = _state.first_row, first
    try:
        yield
    finally:
        _state.first_row = before


def first_row() -> int:
    """The number, in the whole batch, of the first row at work: more than 0 where several processes share it."""
    return _state.first_row


def draws(key: int, step: int, skip: int = 0) -> np.random.Generator:
    """The generator of the layer ``key`` in step ``step``: the same numbers whenever it is asked for.

    Args:
        skip: leave out so many float32 numbers, as if they had been drawn. Philox makes eight from each value of its
            counter, so none of them is computed.
    """
    generator = np.random.Generator(np.random.Philox(key=key, counter=[skip // 8, 0, 0, step]))
    if skip % 8:
        generator.random(skip % 8, np.float32)
    return generator


def keep_mask(xp: Any, shape: tuple[int, ...], p: float, key: int, step: int) -> Array:
    """``draws(key, step).random(shape, np.float32) >= p``, bit for bit: booleans, False with probability ``p``.

    On NumPy by that very generator, on a device by its formula, without a number from the host. Of a batch that several
    processes share, the rows from `first_row` on.
    """
    size, before = math.prod(shape), first_row() * math.prod(shape[1:])  # numbers of the rows that others have
    if xp is np:
        return draws(key, step, before).random(shape, np.float32) >= p
    block, skip = divmod(before, 8)  # a block is eight numbers
    count = -(-(skip + size) // 8)
    blocks = xp.arange(block + 1, block + 1 + count, dtype=np.uint64)  # (count,): the counters, which become the mask
    # A number is k / 2^24, with k the upper 24 of 32 bits: k is compared, and no number is made.
    least = math.ceil(float(np.float32(p)) * 2**24)
    with np.errstate(over="ignore"):  # NumPy's single numbers would warn of what is meant: arithmetic modulo 2^64
        _keep_(blocks, np.uint64(key), np.uint64(step), np.uint64(least))
    return blocks.view(np.bool_)[skip : skip + size].reshape(shape)


_LOW, _HALF, _BYTE = np.uint64(2**32 - 1), np.uint64(32), np.uint64(2**8)
_MULTIPLIERS = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B


def _keep_(blocks: Array, key: np.uint64, step: np.uint64, least: np.uint64) -> None:
    """Replace each counter of a block by what is kept of its eight numbers: a byte each, 1 or 0, the first lowest."""
    piece = max(1, min(-(-len(blocks) // 4), 2**18))  # so that what it takes is less than the numbers would
    for first in range(0, len(blocks), piece):
        blocks[first : first + piece] = _kept(blocks[first : first + piece], key, step, least)


def _kept(counter: Any, key: Any, step: Any, least: Any) -> Any:
    """Eight bytes in one number, for each counter."""
    kept = counter ^ counter
    for bits in reversed(_philox(counter, key, step)):
        kept = kept * _BYTE + (bits >> np.uint64(40) >= least)
        kept = kept * _BYTE + ((bits & _LOW) >> np.uint64(8) >= least)
    return kept


def _philox(counter: Any, key: Any, step: Any) -> tuple[Any, Any, Any, Any]:
    """Philox4x64-10 of the counters (counter, 0, 0, step) and the key (key, 0): four times 64 random bits for each."""
    zero = counter ^ counter
    a, b, c, d = counter, zero, zero, zero | step
    for number in range(10):
        weyl = (np.uint64(number * each % 2**64) for each in _WEYL)
        (high_a, low_a), (high_c, low_c) = _product(a, _MULTIPLIERS[0]), _product(c, _MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ (key + next(weyl)), low_c, high_a ^ d ^ next(weyl), low_a
    return a, b, c, d


def _product(x: Any, factor: np.uint64) -> tuple[Any, Any]:
    """The upper and the lower 64 bits of x * factor: as on paper, with 32 bits to a digit."""
    low, high = factor & _LOW, factor >> _HALF
    x_low, x_high = x & _LOW, x >> _HALF
    middle = x_high * low + (x_low * low >> _HALF)
    carry = (x_low * high + (middle & _LOW)) >> _HALF
    return x_high * high + (middle >> _HALF) + carry, x * factor
