"""A plan: a schedule with what it takes, in numbers and in words."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from npnet import schedules
from npnet.memory import format_bytes
from npnet.optimal import smallest_budget
from npnet.pricing import Chain, Moment, timeline
from npnet.schedule import BACKWARD, HOLDING, OFFLOAD, Schedule

MOST_LAYERS = 400
"""Deeper chains are not planned exactly: the cheapest of `every_nth` and `revolve` that fits is taken."""


class InfeasibleBudget(ValueError, MemoryError):
    """No schedule keeps to the budget.

    Attributes:
        budget_bytes: what was asked.
        smallest_bytes: the smallest budget that would do.
        moment: the action that binds it, with what is alive then.
    """

    def __init__(self, message: str, budget_bytes: int, smallest_bytes: int, moment: Moment) -> None:
        super().__init__(message)
        self.budget_bytes, self.smallest_bytes, self.moment = budget_bytes, smallest_bytes, moment

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.budget_bytes, self.smallest_bytes, self.moment)


@dataclass(frozen=True)
class Plan:
    """A schedule for one network and batch size, and what it takes. All bytes are those of arrays."""

    schedule: Schedule
    chain: Chain
    layers: tuple[str, ...]  # for people
    batch_size: int
    memory_budget: int | None = None  # bytes
    bound: float | None = None
    """Flops that every memory-persistent schedule within the budget spends on recomputation; None if not searched."""

    def __repr__(self) -> str:
        """In a line: `describe` has more, and ``print(plan.schedule)`` the actions."""
        what = f"{self.schedule.name!r}, {self.chain.depth} layers, batch size {self.batch_size}"
        return f"Plan({what}, peak {format_bytes(self.peak_bytes)}, {100 * self.overhead:.1f} % more flops)"

    @property
    def proven(self) -> bool:
        """No memory-persistent schedule within the budget recomputes less (see `npnet.optimal`)."""
        return self.bound is not None and bool(self.recompute_flops <= self.bound)

    @property
    def peak_bytes(self) -> int:
        """The most bytes of arrays alive at once in a training step: all but the caller's data."""
        return self.binding.peak_bytes

    @cached_property
    def timeline(self) -> list[Moment]:
        """Bytes alive after each action, by what they are."""
        return timeline(self.schedule, self.chain)

    @cached_property
    def binding(self) -> Moment:
        """The first moment of the timeline with the most bytes."""
        return max(self.timeline, key=lambda moment: moment.peak_bytes)

    @property
    def extra_forwards(self) -> int:
        """How many layer-forwards are recomputation."""
        return self.schedule.extra_forwards

    @property
    def recompute_flops(self) -> int:
        """Flops of these."""
        return self.chain.recompute_flops(self.schedule)

    @property
    def overhead(self) -> float:
        """``recompute_flops`` over the flops of one plain step, forward and backward."""
        return self.recompute_flops / max(self.chain.step_flops, 1)

    def row(self) -> dict[str, Any]:
        """The figures, for tables and files."""
        return {
            "schedule": self.schedule.name,
            "peak bytes": self.peak_bytes,
            "extra forwards": self.extra_forwards,
            "recompute flops": self.recompute_flops,
            "overhead": round(self.overhead, 4),
            "proven": self.proven,
        }

    def describe(self) -> str:
        """The plan in words: what it takes, what is kept and why, how often each layer runs, what binds the peak."""
        return "\n".join([*_summary(self), *_kept(self), *_runs(self), *_binding(self)])


def describe_moment(moment: Moment) -> str:
    """Bytes by what they are: "1.2 MB parameters + 3.4 MB segment"."""
    parts = [(size, name) for name, size in moment._asdict().items() if name != "action" and size]
    return " + ".join(f"{format_bytes(size)} {name}" for size, name in parts)


def _summary(plan: Plan) -> Iterator[str]:
    plain = plan.chain.peak_bytes(schedules.none(plan.chain.depth, plan.chain.needs_saved))
    budget = "" if plan.memory_budget is None else f", budget {format_bytes(plan.memory_budget)}"
    yield f"schedule {plan.schedule.name!r}: {plan.chain.depth} layers, batch size {plan.batch_size}{budget}"
    yield f"peak: {format_bytes(plan.peak_bytes)} ({plan.peak_bytes / plain:.2f} of plain's {format_bytes(plain)})"
    yield (
        f"recomputation: {plan.extra_forwards} layer-forwards more than plain's {plan.chain.depth}, "
        f"{100 * plan.overhead:.1f} % more flops a step"
    )
    if plan.proven:
        yield "proven: no memory-persistent schedule within the budget recomputes less"
    elif plan.bound is not None:
        bound = 100 * plan.bound / max(plan.chain.step_flops, 1)
        yield f"not proven optimal, since sizes were rounded: within the budget, at least {bound:.1f} % more are needed"
    elif plan.memory_budget is not None and plan.recompute_flops:
        yield "not proven optimal: strategies were tried, not all schedules"


def _kept(plan: Plan) -> Iterator[str]:
    """Which activations the first way up leaves, and why."""
    held: set[int] = set()
    out: set[int] = set()
    for kind, layer in plan.schedule:
        if kind is BACKWARD:
            break
        (held.add if kind in HOLDING else held.remove)(layer)
        (out.add if kind is OFFLOAD else out.discard)(layer)
    dropped = set(range(1, plan.chain.depth + 1)) - held - out
    if out:
        moved = format_bytes(plan.chain.moved_bytes(plan.schedule))
        where = f"to the {plan.schedule.offload_to}" if plan.schedule.offload_to else "out of memory"
        yield f"moved {where} on the way up, and back when needed: the outputs of {_layers(out)}, {moved}"
        held |= out
    if not dropped:
        yield "nothing is run again" if out else "kept: every activation, until its backward pass"
        return
    yield f"kept on the way up: the outputs of {_layers(held)}"
    for layer in sorted(held):
        if layer + 1 in dropped:
            end = next((other for other in sorted(held) if other > layer), plan.chain.depth + 1)
            yield f"  a_{layer} is a checkpoint, {_layers(range(layer + 1, end))} run again from it"
    if 1 in dropped:
        yield f"  a_0, the input, is one, {_layers(range(1, min(held)))} run again from it"


def _runs(plan: Plan) -> Iterator[str]:
    forwards = plan.schedule.forwards
    for count in sorted(set(forwards.values())):
        layers = _layers(layer for layer, times in forwards.items() if times == count)
        yield f"run forward {count} time{'s' * (count > 1)}: {layers}"


def _binding(plan: Plan) -> Iterator[str]:
    moment, chain = plan.binding, plan.chain
    layer = plan.layers[moment.action.layer - 1]
    yield f"the peak is at {moment.action}, {layer}: {describe_moment(moment)}"
    made = chain.parameter_gradients[moment.action.layer]
    if moment.action.kind is BACKWARD and chain.streaming and made:
        yield f"  (workspace: {format_bytes(made)} gradients of this layer's parameters, freed by their update)"
    if chain.depth <= MOST_LAYERS:
        least = smallest_budget(chain)[0] + chain.fixed
        if least >= 0.95 * chain.peak_bytes(schedules.none(chain.depth, chain.needs_saved)):
            yield (
                f"checkpointing cannot help this network: no schedule takes less than {format_bytes(least)}. "
                f"What helps: {remedies(plan)}"
            )


def remedies(plan: Plan) -> str:
    """What makes the peak smaller, apart from another schedule."""
    of_batch = plan.binding.peak_bytes - plan.chain.fixed - max(plan.chain.parameter_gradients)
    if of_batch > 0.5 * plan.binding.peak_bytes:
        return "a smaller batch (with gradient accumulation, if the batch matters), half precision, narrower layers"
    return "fewer parameters, half precision, an optimizer that keeps less"


def _layers(numbers: Iterable[int]) -> str:
    """Numbers of layers for people.

    >>> _layers([1, 2, 3, 7])
    'layers 1-3, 7'
    """
    runs = (
        [number for _, number in run] for _, run in groupby(enumerate(sorted(numbers)), lambda item: item[1] - item[0])
    )
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"layer {text}" if text.isdecimal() else f"layers {text}"
