"""Schedules to choose from: plain backpropagation, checkpoints every n layers or where you like, revolve, offloading.

Each function makes the action list (`npnet.schedule.Schedule`) for a chain of ``depth`` layers, from integers alone.
The schedule that is cheapest for a budget in bytes needs to know what the layers cost: see `npnet.planner`.
"""

import math
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, TypeAlias

from npnet.checks import check_whole, shown
from npnet.schedule import BACKWARD, DROP, FETCH, FORWARD, OFFLOAD, Kind, Place, Schedule, check_layers

ScheduleLike: TypeAlias = Schedule | str | Callable[[int], Schedule] | Iterable[tuple[Kind, int]]
"""What ``schedule=`` takes; see `as_schedule`."""

MOST_LAYERS = 1_000_000
"""A schedule is a list: of more layers it would take gigabytes."""


def _check_depth(depth: int) -> int:
    """``depth`` as an int, if a schedule can be made for it."""
    return check_whole(depth, "depth", least=1, most=MOST_LAYERS)


def none(depth: int, needs_saved: Iterable[int] = ()) -> Schedule:
    """Plain backpropagation: every activation is held until its backward pass.

    >>> print(none(2))
    forward 1, forward 2, backward 2, backward 1
    """
    return _remade(_segments(depth, [], needs_saved, "plain"), none, depth)


def every_nth(depth: int, n: int, needs_saved: Iterable[int] = ()) -> Schedule:
    """Checkpoint the output of every ``n``-th layer; recompute each segment between two checkpoints when it is needed.

    Extra forwards: (n - 1) * floor((L - 1) / n), for n >= 1 and nothing in ``needs_saved``; see `selective`.

    Args:
        depth: number of layers L.
        n: distance between checkpoints; 0 and 1 both keep everything.
        needs_saved: as for `Schedule`.

    Raises:
        TypeError: ``n`` is not a whole number.
        ValueError: ``n`` is negative.

    >>> print(every_nth(3, 2))
    forward 1, forward 2, drop 1, forward 3, backward 3, forward 1, backward 2, backward 1
    """
    depth, n = _check_depth(depth), check_whole(n, "n")
    if n <= 1:
        return none(depth, needs_saved)
    return _remade(_segments(depth, range(n, depth, n), needs_saved, f"every {n}"), every_nth, depth, n)


def sqrt(depth: int, needs_saved: Iterable[int] = ()) -> Schedule:
    """Checkpoint every round(sqrt(L)) layers: about 2 sqrt(L) activations held instead of L.

    Chen, Xu, Zhang & Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016, section 4.

    >>> sqrt(50).name
    'every 7'
    """
    depth = _check_depth(depth)
    return every_nth(depth, round(math.sqrt(depth)), needs_saved)


def selective(depth: int, checkpoints: Iterable[int], needs_saved: Iterable[int] = ()) -> Schedule:
    """Checkpoint the outputs of the layers ``checkpoints``; recompute each segment between them when it is needed.

    Two recomputations that the textbook version makes are saved: the last segment is kept from the forward pass, and
    the last layer of each other segment is not run again, since its output is the next checkpoint (unless the layer
    is in ``needs_saved``).

    Args:
        depth: number of layers L.
        checkpoints: numbers of layers, from 1 to L, in any order; an empty set keeps everything.
        needs_saved: as for `Schedule`.

    Raises:
        TypeError, ValueError: ``checkpoints`` are not such numbers.

    >>> print(selective(4, [3]))
    forward 1, forward 2, drop 1, forward 3, drop 2, forward 4, backward 4,
    forward 1, forward 2, backward 3, backward 2, backward 1
    """
    depth = _check_depth(depth)
    chosen = sorted(check_layers(checkpoints, "checkpoints"))
    if chosen and chosen[-1] > depth:
        raise ValueError(f"checkpoints: expected layers from 1 to {depth}, got {chosen[-1]}")
    name = f"checkpoints at {', '.join(map(str, chosen))}" if len(chosen) <= 8 else f"{len(chosen)} chosen checkpoints"
    made = _segments(depth, [layer for layer in chosen if layer < depth], needs_saved, name)
    return _remade(made, selective, depth, chosen)


def offloaded(
    depth: int, n: int = 1, most: int | None = None, needs_saved: Iterable[int] = (), to: Place | None = None
) -> Schedule:
    """As `every_nth`, but the checkpoints leave memory once they have been used, and come back for their segments.

    With n = 1 nothing is run again: every activation goes out, and comes back for its backward pass. The last
    checkpoint stays, since its segment is the first to be needed.

    Args:
        depth: number of layers L.
        n: distance between checkpoints.
        most: only the first so many of them go out: those that wait longest. By default all.
        needs_saved: as for `Schedule`. What these layers save cannot go out; they are run again.
        to: "host" or "disk", see `npnet.offload`; by default from a GPU to the host, else to the disk.

    Raises:
        TypeError, ValueError: ``n`` is not a whole number from 1, ``most`` not one from 0, or ``to`` no such place.

    >>> print(offloaded(4, 2).diagram())
                a0 a1 a2 a3 a4
    forward 1    o  F
    forward 2    o  o  F
    drop 1       o  .  o
    forward 3    o  .  o  F
    forward 4    o  .  o  o  F
    backward 4   o  .  o  o  B
    backward 3   o  .  o  B  .
    forward 1    o  R  o  .  .
    backward 2   o  o  B  .  .
    backward 1   o  B  .  .  .
    >>> print(offloaded(3))
    forward 1, forward 2, offload 1, forward 3, backward 3, fetch 1, backward 2, backward 1
    """
    depth, n = _check_depth(depth), check_whole(n, "n", least=1)
    most = depth if most is None else check_whole(most, "most")
    checkpoints = range(n, depth, n)
    name = "offload" if n == 1 else f"offload every {n}"
    name += f", the first {most}" if most < len(checkpoints) - 1 else ""
    made = _segments(depth, checkpoints, needs_saved, name, {*checkpoints[:-1][:most]}, to)
    return _remade(made, offloaded, depth, n, most, to=to)


def _segments(
    depth: int,
    checkpoints: Iterable[int],
    needs_saved: Iterable[int],
    name: str,
    out: Collection[int] = (),
    to: Place | None = None,
) -> Schedule:
    """One pass up, which drops what is not a checkpoint, then segment by segment down; checkpoints ``out`` go out."""
    depth, needs_saved = _check_depth(depth), check_layers(needs_saved, "needs_saved")
    starts = [0, *checkpoints]
    kept = {*starts, *range(starts[-1], depth + 1)}  # the last segment is kept from the pass up
    actions: list[tuple[Kind, int]] = []
    for layer in range(1, depth + 1):
        actions.append((FORWARD, layer))
        if layer - 1 not in kept:
            actions.append((DROP, layer - 1))
        elif layer - 1 in out:
            actions.append((OFFLOAD, layer - 1))
    for start, end in zip(reversed(starts), [depth, *reversed(starts[1:])], strict=True):
        if start in out:
            actions.append((FETCH, start))
        if end != depth and end in needs_saved:  # of what it saved, only its output is there
            actions.append((DROP, end))
            kept.remove(end)
        actions += [(FORWARD, layer) for layer in range(start + 1, end + 1) if layer not in kept]
        actions += [(BACKWARD, layer) for layer in range(end, start, -1)]
    return Schedule(actions, depth, name, needs_saved, to)


def _remade(schedule: Schedule, maker: Callable[..., Schedule], *args: Any, **options: Any) -> Schedule:
    """The schedule, which knows how it was made: for a model whose layers need what they save, it is made again."""
    schedule.remake = partial(maker, *args, **options)
    return schedule


def revolve(depth: int, slots: int | None = None, needs_saved: Iterable[int] = ()) -> Schedule:
    """The binomial schedule: as few recomputations as ``slots`` checkpoints allow, memory that grows like log L.

    With c slots (one of them the input's) and r the smallest number with C(c + r, c) >= L, no layer runs forward more
    than r + 1 times, and the extra forwards are r L - C(c + r, c + 1). Griewank & Walther, "Algorithm 799: Revolve",
    2000. It assumes layers that are all alike and are each run once more right before their backward pass; where the
    output suffices for that (`npnet.layer.Layer.output_suffices`), the schedules of `npnet.planner` are cheaper, but
    for very little memory: revolve is not memory-persistent.

    Args:
        depth: number of layers L.
        slots: c, at least 1; by default 1 + ceil(log2 L).
        needs_saved: as for `Schedule`.

    Raises:
        TypeError, ValueError: ``slots`` is not a whole number >= 1.

    >>> print(revolve(3, 2))
    forward 1, forward 2, forward 3, backward 3, drop 2, forward 2, backward 2, drop 1, forward 1, backward 1
    >>> revolve(50, 7).extra_forwards
    105
    """
    depth = _check_depth(depth)
    slots = 1 + math.ceil(math.log2(depth)) if slots is None else check_whole(slots, "slots", least=1)
    actions: list[tuple[Kind, int]] = []
    checkpoints: set[int] = set()
    pending = [(1, depth, slots)]  # (first, last, slots): the backward passes of layers last, ... first are to be done
    while pending:
        first, last, free = pending.pop()
        if last in checkpoints:  # it has served
            checkpoints.remove(last)
            actions.append((DROP, last))
        if first == last:
            actions += [(FORWARD, first), (BACKWARD, first)]
            continue
        middle = first - 1 + _binomial_split(last - first + 1, free)
        for layer in range(first, middle + 1):
            actions.append((FORWARD, layer))
            if layer > first:
                actions.append((DROP, layer - 1))
        checkpoints.add(middle)
        pending += [(first, middle, free), (middle + 1, last, free - 1)]
    return _remade(Schedule(actions, depth, f"revolve {slots}", needs_saved), revolve, depth, slots)


def _binomial_split(length: int, slots: int) -> int:
    """How many of ``length`` layers to run before the next checkpoint; one slot holds the input of the first."""
    repeats = 1
    while math.comb(slots + repeats, slots) < length:
        repeats += 1
    below = math.comb(slots + repeats - 2, slots)  # what all the slots can do with two repeats less
    above = math.comb(slots - 1 + repeats, slots - 1)  # what the other slots can do
    return max(below, length - above, 1)


MAKERS: dict[str, Callable[..., Schedule]] = {"none": none, "sqrt": sqrt, "revolve": revolve, "offload": offloaded}
"""Schedules that need nothing but the depth, by name; each also takes ``needs_saved``."""


def as_schedule(schedule: ScheduleLike, depth: int, needs_saved: Iterable[int] = ()) -> Schedule:
    """The schedule for ``depth`` layers that ``schedule`` stands for.

    Args:
        schedule: a `Schedule`, a list of actions, the name of a maker in `MAKERS`, or a function of the depth.
        depth: number of layers L.
        needs_saved: as for `Schedule`; one that lacks some of these layers is made again (`Schedule.for_layers`).

    Raises:
        ValueError: no schedule has that name, or it is for another depth.
        InvalidSchedule: the actions cannot be executed.
        TypeError: it is none of these.
    """
    if isinstance(schedule, str):
        if schedule not in MAKERS:
            raise ValueError(
                f"unknown schedule {shown(schedule)}; choose one of {', '.join(map(repr, MAKERS))}, or make one: "
                "npnet.schedules.every_nth(depth, n)"
            )
        schedule = MAKERS[schedule](depth, needs_saved=needs_saved)
    elif callable(schedule):
        schedule = schedule(depth)
    if isinstance(schedule, Schedule):
        if schedule.depth != depth:
            raise ValueError(f"the schedule {schedule.name!r} is for {schedule.depth} layers, the network has {depth}")
        return schedule.for_layers(frozenset(needs_saved))
    try:
        return Schedule(schedule, depth, needs_saved=needs_saved)
    except TypeError:
        raise TypeError(
            "schedule: expected a Schedule (npnet.schedules.every_nth(depth, n), say), a name, a function of the depth "
            f"or a list of (kind, layer), got {shown(schedule)}"
        ) from None
