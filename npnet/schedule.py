"""A schedule: what is computed, recomputed and forgotten in one training step, and when.

A chain of L layers computes a_l = f_l(a_{l-1}); a_0 is the input. A schedule is a list of these kinds of action:

* ``forward l``   compute a_l from a_{l-1} and hold it;
* ``drop l``      forget a_l;
* ``backward l``  turn the gradient at a_l into the gradient at a_{l-1}, and forget a_l and its gradient;
* ``offload l``   move a_l out of memory, to where there is more room (see `npnet.offload`);
* ``fetch l``     move it back.

That one list is executed (`npnet.checkpoint`), checked (here), and printed. Plain backpropagation is the list
with no drop: everything is held. Dropping an activation before its backward pass means to compute it again;
the activations that are not dropped are the *checkpoints*.

This module knows integers only: no arrays, no bytes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Literal, NamedTuple, TypeAlias, get_args

from npnet.checks import check_kind, check_whole, shown


class Kind(Enum):
    """What an action does."""

    FORWARD = "forward"
    DROP = "drop"
    BACKWARD = "backward"
    OFFLOAD = "offload"
    FETCH = "fetch"

    def __repr__(self) -> str:
        return self.name


FORWARD, DROP, BACKWARD = Kind.FORWARD, Kind.DROP, Kind.BACKWARD
OFFLOAD, FETCH = Kind.OFFLOAD, Kind.FETCH


HOLDING = (FORWARD, FETCH)
"""Actions after which the activation is in memory; after the others it is not."""

Place: TypeAlias = Literal["host", "disk"]
"""Where activations go that leave memory: from a GPU into its host's memory, or into a file."""

DURING = {DROP: ".", BACKWARD: "B", OFFLOAD: ">", FETCH: "<"}
"""What `Schedule.diagram` prints for the activation that an action is about; for forward actions F or R."""


class Action(NamedTuple):
    """One entry of a schedule: ``layer`` is l, from 1 to the depth L."""

    kind: Kind
    layer: int

    def __str__(self) -> str:
        return f"{self.kind.value} {self.layer}"


KINDS = {member.value: member for member in Kind}


def _action(pair: tuple[Kind | str, int]) -> Action:
    """The action; kinds may be given by their names, as they are printed."""
    if type(pair) is Action:
        return pair
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"actions: expected pairs (kind, layer) such as ('forward', 1), got {shown(pair)}")
    kind, layer = pair
    return Action(KINDS.get(kind, kind) if isinstance(kind, str) else kind, layer)  # type: ignore[arg-type]


def check_layers(numbers: Iterable[int], name: str) -> frozenset[int]:
    """Numbers of layers as a set.

    Raises:
        TypeError, ValueError: they are not whole numbers from 1.
    """
    try:
        given = list(numbers)
    except TypeError:
        raise TypeError(f"{name}: expected numbers of layers such as [2, 5], got {shown(numbers)}") from None
    return frozenset(check_whole(number, f"a layer of {name}", least=1) for number in given)


def check_place(place: Place | None, name: str) -> Place | None:
    """The place, if it is one.

    Raises:
        ValueError: it is none.
    """
    if place is None or (isinstance(place, str) and place in get_args(Place)):
        return place
    raise ValueError(f"{name}: expected 'host' or 'disk', got {shown(place)}")


class Run(NamedTuple):
    """What the engine executes: one action, or a run of forward actions for layers first, first + 1, ... last.

    A run that *passes* keeps its last output alone: each is dropped when the next one is there.
    """

    kind: Kind
    first: int
    last: int
    recompute: bool  # forward: these layers have been run before
    saves: bool  # forward: what these layers save is for the backward pass to come
    passes: bool = False  # forward: forward l, forward l + 1, drop l, forward l + 2, drop l + 1, ...


class InvalidSchedule(ValueError):
    """An action list that cannot be executed, or leaves something undone; the message names the action."""


class Schedule(tuple[Action, ...]):
    """A checked action list for a chain of ``depth`` layers.

    Args:
        actions: the list, as `Action` or (kind, layer) pairs.
        depth: number of layers L.
        name: what to call it in tables and pictures.
        needs_saved: layers whose backward pass needs more than their input and output (see
            `npnet.layer.Layer.output_suffices`), so that they have to be run again before it.
        offload_to: where ``offload`` moves activations; by default from a GPU to the host, else to the disk.

    Raises:
        InvalidSchedule: an action uses what is not held, holds twice, or the list leaves a layer without
            its backward pass.

    >>> print(Schedule([("forward", 1), ("forward", 2), ("backward", 2), ("backward", 1)], depth=2))
    forward 1, forward 2, backward 2, backward 1
    """

    depth: int
    name: str
    needs_saved: frozenset[int]
    offload_to: Place | None
    runs: tuple[Run, ...]
    """What the engine executes."""
    offloads: bool
    """Whether activations leave memory and come back."""
    remake: "Callable[..., Schedule] | None" = None
    """Makes the same schedule with other ``needs_saved``; None for one that was written by hand."""
    _remade: "Schedule | None" = None  # by the last call of `for_layers`

    def __new__(
        cls,
        actions: Iterable[tuple[Kind, int]],
        depth: int,
        name: str = "custom",
        needs_saved: Iterable[int] = (),
        offload_to: Place | None = None,
    ) -> "Schedule":
        try:
            given = iter(actions)
        except TypeError:
            raise TypeError(f"actions: expected pairs (kind, layer), got {shown(actions)}") from None
        self = super().__new__(cls, map(_action, given))
        self.depth, self.name = check_whole(depth, "depth", least=1), check_kind(name, str, "name", "'every 3'")
        self.needs_saved = check_layers(needs_saved, "needs_saved")
        if self.needs_saved and max(self.needs_saved) > self.depth:
            raise ValueError(f"needs_saved: there is no layer {max(self.needs_saved)} in a chain of {self.depth}")
        self.offload_to = check_place(offload_to, "offload_to")
        self.runs = self._compile()
        self.offloads = any(run.kind is OFFLOAD for run in self.runs)
        return self

    def __getnewargs__(self) -> tuple[tuple[Action, ...], int, str, frozenset[int]]:
        return tuple(self), self.depth, self.name, self.needs_saved  # what else there is, pickle takes as attributes

    def __str__(self) -> str:
        return ", ".join(map(str, self))

    def diagram(self) -> str:
        """The schedule as a picture: a line per action, a column per activation.

        ``F`` is computed, ``R`` computed again, ``o`` held, ``B`` used and freed by a backward action; ``>`` goes out
        of memory, ``-`` is out there, and ``<`` comes back.

        >>> from npnet.schedules import every_nth
        >>> print(every_nth(3, 2).diagram())
                    a0 a1 a2 a3
        forward 1    o  F
        forward 2    o  o  F
        drop 1       o  .  o
        forward 3    o  .  o  F
        backward 3   o  .  o  B
        forward 1    o  R  o  .
        backward 2   o  o  B  .
        backward 1   o  B  .  .
        """
        width, indent = len(f"a{self.depth}"), max(12, len(f"backward {self.depth} "))
        marks = ["o", *[" "] * self.depth]
        lines = [" " * indent + " ".join(f"a{i}".rjust(width) for i in range(self.depth + 1))]
        seen: set[int] = set()
        for action in self:
            kind, layer = action
            marks[layer] = ("R" if layer in seen else "F") if kind is FORWARD else DURING[kind]
            seen.add(layer)
            lines.append(str(action).ljust(indent) + " ".join(mark.rjust(width) for mark in marks).rstrip())
            marks[layer] = "o" if kind in HOLDING else "-" if kind is OFFLOAD else "."
        return "\n".join(lines)

    def for_layers(self, needs_saved: Iterable[int]) -> "Schedule":
        """The schedule with these layers among its ``needs_saved``: itself, if they are there already.

        One that was made without the model (``every_nth(depth, n)``) is made again; one that was written by hand keeps
        its actions, if they can be executed.

        Raises:
            InvalidSchedule: they cannot.
            TypeError, ValueError: ``needs_saved`` are not numbers of layers.
        """
        if type(needs_saved) is not frozenset:  # each step asks
            needs_saved = check_layers(needs_saved, "needs_saved")
        if needs_saved <= self.needs_saved:
            return self
        if self._remade is None or not needs_saved <= self._remade.needs_saved:
            needs_saved |= self.needs_saved
            if self.remake is not None:
                self._remade = self.remake(needs_saved=needs_saved)
            else:
                self._remade = Schedule(self, self.depth, self.name, needs_saved, self.offload_to)
        return self._remade

    @property
    def forwards(self) -> Counter[int]:
        """How often each layer runs forward."""
        return Counter(action.layer for action in self if action.kind is FORWARD)

    @property
    def extra_forwards(self) -> int:
        """How many layer-forwards are recomputation: all but the first of each layer.

        >>> from npnet.schedules import every_nth
        >>> every_nth(50, 7).extra_forwards
        42
        """
        return sum(count - 1 for count in self.forwards.values())

    def _compile(self) -> tuple[Run, ...]:
        """Check the actions one by one, and join what the engine can run in one go.

        A forward action *saves* when it is the layer's last: backward is next to need what it computed.
        """
        last_forward = {
            each.layer: i for i, each in enumerate(self) if each.kind is FORWARD and type(each.layer) is int
        }
        held, out, seen, runs = {0}, set[int](), set[int](), list[Run]()
        next_backward = self.depth  # the layer at whose output the gradient is known
        for i, (kind, layer) in enumerate(self):
            problem = self._problem(kind, layer, held, out, next_backward)
            if not problem and kind is OFFLOAD and layer in self.needs_saved and last_forward[layer] < i:
                problem = f"layer {layer} needs what it saved, too: drop a_{layer}, and run it again"
            if problem:
                what = kind.value if isinstance(kind, Kind) else kind if isinstance(kind, str) else shown(kind)
                raise InvalidSchedule(f"action {i} of {len(self)}, {what} {shown(layer)}: {problem}")
            (held.add if kind in HOLDING else held.remove)(layer)
            if kind is OFFLOAD:
                out.add(layer)
            elif kind is FETCH:
                out.remove(layer)
            elif kind is BACKWARD:
                next_backward -= 1
            saves = kind is FORWARD and layer in self.needs_saved and last_forward[layer] == i
            runs.append(Run(kind, layer, layer, layer in seen, saves))
            seen.add(layer)
        if next_backward:
            raise InvalidSchedule(f"after the last of {len(self)} actions: layer {next_backward} has no backward pass")
        return tuple(_join(runs))

    def _problem(self, kind: Kind, layer: int, held: set[int], out: set[int], next_backward: int) -> str:
        """Why this action cannot come now, or nothing."""
        if not (isinstance(kind, Kind) and type(layer) is int and 1 <= layer <= self.depth):
            return f"expected a Kind and a layer from 1 to {self.depth}"
        if kind is FORWARD and layer > next_backward:
            return f"layer {layer} already had its backward pass"
        if kind is FORWARD and layer in held:
            return f"a_{layer} is held already"
        if kind is FORWARD and layer in out:
            return f"a_{layer} is offloaded: fetch it"
        if kind is FETCH and layer not in out:
            return f"a_{layer} is not offloaded"
        if kind is FORWARD and layer - 1 not in held:
            return f"its input a_{layer - 1} is not held"
        if kind in (DROP, OFFLOAD) and layer not in held:
            return f"a_{layer} is not held"
        if kind is BACKWARD and layer != next_backward:
            return f"the gradient is at a_{next_backward}, so layer {next_backward} is next"
        if kind is BACKWARD and not {layer - 1, layer} <= held:
            return f"it needs a_{layer - 1} and a_{layer}, and a_{min({layer - 1, layer} - held)} is not held"
        return ""


def _join(runs: Sequence[Run]) -> Iterable[Run]:
    """The runs, of an action each, with forward runs of consecutive layers joined, and with their drops."""
    i = 0
    while i < len(runs):
        run, i = runs[i], i + 1
        while run.kind is FORWARD and i < len(runs):
            follows = (*runs[i][:2], *runs[i][3:5]) == (FORWARD, run.last + 1, run.recompute, run.saves)
            drops = not run.recompute and [each[:2] for each in runs[i + 1 : i + 2]] == [(DROP, run.last)]
            if not follows or (run.first < run.last and run.passes != drops):
                break
            run = run._replace(last=run.last + 1, passes=drops)
            i += 1 + drops
        yield run
