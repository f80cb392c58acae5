"""Planning: what a training step will take, before it runs, and the cheapest schedule for a budget in bytes."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from npnet import schedules
from npnet.chain_costs import HasLayers, chain_in, chain_of
from npnet.checks import check_whole, shown
from npnet.losses import Loss
from npnet.memory import format_bytes, parse_bytes
from npnet.offload import check_elsewhere
from npnet.optimal import Optimum, exact_unit, remainders, smallest_budget
from npnet.optimizers import Optimizer
from npnet.plans import MOST_LAYERS, InfeasibleBudget, Plan, describe_moment, remedies
from npnet.pricing import Chain
from npnet.schedule import Place, Schedule, check_place
from npnet.schedules import ScheduleLike

MOST_CELLS = 20_000_000
"""Numbers in a planner's table (16 bytes each, while planning). Where exact sizes need more, they are rounded: see
`Plan.bound`."""


MOST_POINTS = 200
"""Plans on a trade-off curve."""

MOST_CURVE_CELLS = 10_000_000_000
"""Steps of the dynamic program that a trade-off curve may take: they decide how many remainders are tried."""


def plan(
    network: HasLayers,
    batch_size: int,
    *,
    memory_budget: float | str | None = None,
    every_nth: int | None = None,
    strategy: ScheduleLike | None = None,
    offload: Place | None = None,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
    streaming: bool = True,
    accumulation_steps: int = 1,
    ranks: int = 1,
    features: int | None = None,
) -> Plan:
    """Choose a schedule for training ``network``, and say what a step will take.

    Args:
        network: a `Network` or `Sequential`.
        batch_size: samples a step.
        memory_budget: bytes, or "20 MB", "20 MiB": the most that npnet may have allocated at any time in a training
            step: parameters, gradients, optimizer state, activations and workspace, but not the caller's data.
        every_nth: a checkpoint every so many layers.
        strategy: "optimal" (the default, with a budget), "none" (without one), "sqrt", "every_nth" or "revolve" (with a
            budget the cheapest of their kind that fits), "offload" (nothing is run again, and as little as the budget
            allows leaves memory), or any schedule, such as `npnet.schedules.selective`.
        offload: where activations go with the strategy "offload", which then need not be given: "host", from a GPU, or
            "disk" (see `npnet.offload`).
        loss: its workspace counts; by default that of the quadratic cost.
        optimizer: its state counts; by default none, as for plain SGD.
        streaming: layers are updated during the backward pass, as `npnet.fit` and `Network.update_mini_batch` do; else
            the gradients of all layers are alive together at the end, as for `Network.backprop`.
        accumulation_steps: with more than 1 the gradients of earlier batches are alive, too.
        ranks: processes that share each batch (see `npnet.fit`). What one of them takes is planned: its share of the
            batch, rounded up, and the buffers in which gradients are summed.
        features: of the input, if the first layer does not tell.

    Raises:
        InfeasibleBudget: no schedule (of the strategy) keeps to the budget.
        TypeError, ValueError: an argument is of another kind, or two contradict each other.
        NotImplementedError: a layer does not say what it costs.
    """
    ranks = check_whole(ranks, "ranks", least=1)
    batch_size = -(-check_whole(batch_size, "batch_size", least=1) // ranks)
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    chain = chain_of(
        network,
        batch_size,
        loss=loss,
        optimizer=optimizer,
        streaming=streaming,
        accumulation_steps=accumulation_steps,
        communicating=ranks > 1,
        features=features,
    )
    for name, given in (("offload", check_place(offload, "offload")), ("every_nth", every_nth)):
        if given is not None:
            if not (strategy is None or (isinstance(strategy, str) and strategy == name)):
                raise ValueError(f"give {name} or strategy={shown(strategy)}, not both")
            strategy = name
    if strategy is None:
        strategy = "none" if budget is None else "optimal"
    candidates, bound = _candidates(network, chain, strategy, budget, every_nth, offload)
    names = tuple(map(repr, chain_in(network).layers))
    plans = [Plan(schedule, chain, names, batch_size, budget, bound) for schedule in candidates]
    fitting = [each for each in plans if budget is None or each.peak_bytes <= budget]
    if budget is not None and not fitting:
        restricted = not (isinstance(strategy, str) and strategy == "optimal")
        raise _infeasible(min(plans, key=lambda each: each.peak_bytes), budget, restricted)
    return min(fitting, key=lambda each: (each.recompute_flops, chain.moved_bytes(each.schedule), each.peak_bytes))


def _candidates(
    network: HasLayers, chain: Chain, strategy: ScheduleLike, budget: int | None, n: int | None, offload: Place | None
) -> tuple[Sequence[Schedule], float | None]:
    """The strategy's schedules, of which the cheapest that fits is to be taken; and, with "optimal", a bound on all."""
    depth, kind = chain.depth, strategy if isinstance(strategy, str) else None
    if kind == "optimal":
        if budget is None:
            raise ValueError("strategy 'optimal' needs memory_budget: bytes, or a size such as '20 MB'")
        return _optimal(chain, budget)
    if n is not None:
        return [schedules.every_nth(depth, n, chain.needs_saved)], None
    if kind == "every_nth":
        if budget is None:
            raise ValueError("strategy 'every_nth' needs every_nth=n, or a memory_budget to find n for")
        return list(_every_nth(chain)), None
    if kind == "revolve" and budget is not None:
        return list(_revolves(chain)), None
    if kind == "offload":
        for parameter in (each for layer in chain_in(network).layers for each in layer.parameters()):
            check_elsewhere(offload, parameter.value)
        most = [depth] if budget is None else _spread(0, max(depth - 2, 0))
        return [schedules.offloaded(depth, 1, count, chain.needs_saved, offload) for count in most], None
    schedule = schedules.as_schedule(strategy, depth, chain.needs_saved)
    return [schedule], None


class Tradeoff(NamedTuple):
    """Peak bytes against recomputation, for one network and batch size."""

    optimal: list[Plan]  # from the smallest peak to the plain one
    others: dict[str, list[Plan]]  # "every nth", "sqrt", "revolve"

    def __repr__(self) -> str:
        """How many plans there are: `rows` has their figures."""
        counts = [f"{len(plans)} {name}" for name, plans in {"optimal": self.optimal, **self.others}.items()]
        return f"Tradeoff({', '.join(counts)})"

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per point, for tables and files."""
        curves = {"optimal": self.optimal, **self.others}
        return [{"curve": curve, **each.row()} for curve, plans in curves.items() for each in plans]


def tradeoff(
    network: HasLayers,
    batch_size: int,
    *,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
    streaming: bool = True,
    features: int | None = None,
) -> Tradeoff:
    """The whole curve of peak bytes against recomputation, from one table, and the usual strategies beside it.

    Each optimal plan recomputes as little as any memory-persistent schedule of its peak or below (`Plan.proven`),
    unless the network is too large for an exact table. In between, where many layers of different sizes make for many
    budgets that matter, plans may be missing: of more than 200, 200 are given, and for large networks only those of two
    remainders of the table's unit.

    Args, raises: as for `plan`.

    Raises:
        ValueError: the network has more than `MOST_LAYERS` layers.
    """
    batch_size = check_whole(batch_size, "batch_size", least=1)
    chain = chain_of(network, batch_size, loss=loss, optimizer=optimizer, streaming=streaming, features=features)
    if chain.depth > MOST_LAYERS:
        raise ValueError(f"tradeoff: {chain.depth} layers are more than the {MOST_LAYERS} that are planned exactly")
    names = tuple(map(repr, chain_in(network).layers))

    def planned(schedule: Schedule, bound: float | None = None) -> Plan:
        return Plan(schedule, chain, names, batch_size, bound=bound)

    plain = planned(schedules.none(chain.depth, chain.needs_saved), 0.0)
    least, smallest = smallest_budget(chain)
    found, top, exact = [plain], plain.peak_bytes - chain.fixed, exact_unit(chain)
    unit = max(exact, top // _levels(chain) + 1)
    if unit != exact:
        found.append(planned(smallest))
    most = max(2, MOST_CURVE_CELLS // ((top // unit + 1) * chain.depth**3))
    for rest in remainders(chain, unit, [top, least])[:most]:
        optimum = Optimum(chain, top - (top - rest) % unit, unit)
        costs = optimum.costs  # infinite at level 0: whatever is kept takes a level at least
        steps = 1 + np.flatnonzero(costs[1:] < costs[:-1])  # levels at which a cheaper schedule begins to fit
        for level in steps[:: max(1, -(-len(steps) // MOST_POINTS))]:
            bound = costs[level] - sum(chain.forward_flops) if unit == exact else None
            found.append(planned(optimum.schedule(int(level)), bound))
    curve: list[Plan] = []
    for each in sorted(found, key=lambda each: (each.peak_bytes, each.recompute_flops)):
        if not curve or each.recompute_flops < curve[-1].recompute_flops:
            curve.append(each)
    others = {
        "every nth": [planned(schedule) for schedule in _every_nth(chain)],
        "sqrt": [planned(schedules.sqrt(chain.depth, chain.needs_saved))],
        "revolve": [planned(schedule) for schedule in _revolves(chain)],
    }
    return Tradeoff(curve, others)


def _optimal(chain: Chain, budget: int) -> tuple[list[Schedule], float | None]:
    """Schedules of which the cheapest that fits is to be taken, and a bound that none can beat."""
    plain, depth = schedules.none(chain.depth, chain.needs_saved), chain.depth
    if chain.peak_bytes(plain) <= budget:
        return [plain], 0.0
    if depth > MOST_LAYERS:
        return [*_every_nth(chain), *_revolves(chain)], None
    least, smallest = smallest_budget(chain)
    free, unit = budget - chain.fixed, exact_unit(chain)
    if free < least:  # no memory-persistent schedule fits; revolve, which is none, may
        return [smallest, *(schedules.revolve(depth, slots, chain.needs_saved) for slots in range(2, 6))], None
    if free // unit < _levels(chain):
        optimum = Optimum(chain, free)
        return [optimum.schedule()], optimum.recompute_flops()
    unit = free // _levels(chain) + 1
    optimum, found = Optimum(chain, free, unit), [smallest, *_every_nth(chain), *_revolves(chain)]
    if optimum.feasible:
        found.append(optimum.schedule())
    del optimum  # the table is large
    return found, Optimum(chain, free, unit, round_up=False).recompute_flops()


def _levels(chain: Chain) -> int:
    """How many levels of memory a table may have."""
    return MOST_CELLS // (chain.depth * (chain.depth + 1) // 2)


def _every_nth(chain: Chain) -> Iterator[Schedule]:
    for n in _spread(min(2, chain.depth), chain.depth):
        yield schedules.every_nth(chain.depth, n, chain.needs_saved)


def _revolves(chain: Chain) -> Iterator[Schedule]:
    for slots in _spread(min(2 + chain.depth // 1000, chain.depth), chain.depth):
        yield schedules.revolve(chain.depth, slots, chain.needs_saved)


def _spread(first: int, last: int) -> list[int]:
    """Whole numbers from ``first`` to ``last``: all, if they are not many, else 50 in equal ratios."""
    if last - first < 200:
        return list(range(first, last + 1))
    return sorted({round(number) for number in np.geomspace(first, last, 50)})


def _infeasible(smallest: Plan, budget: int, restricted: bool) -> InfeasibleBudget:
    """The error for a budget below that of ``smallest``; restricted: only one strategy was tried."""
    moment, depth = smallest.binding, smallest.chain.depth
    name = f"of this strategy ({smallest.schedule.name})" if restricted else "that was found"
    if not restricted and depth > MOST_LAYERS:
        name += f" ({smallest.schedule.name}; {depth} layers are too many to search all schedules)"
    least = f"{smallest.peak_bytes} bytes ({format_bytes(smallest.peak_bytes)})"
    return InfeasibleBudget(
        f"memory_budget: {format_bytes(budget)} is too little for a training step with batch size "
        f"{smallest.batch_size}; the smallest budget {name} is {least}. What binds it is {moment.action}, layer "
        f"{smallest.layers[moment.action.layer - 1]}: {describe_moment(moment)}. What helps: "
        + ("strategy='optimal', " if restricted else "")
        + remedies(smallest),
        budget,
        smallest.peak_bytes,
        moment,
    )
