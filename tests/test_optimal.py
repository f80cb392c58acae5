"""Optimal schedules against a search through everything that can be done, which is the definition of "optimal" here."""

import math
from dataclasses import replace
from heapq import heappop, heappush

import numpy as np
import pytest

from npnet.optimal import Optimum, exact_unit, smallest_budget
from npnet.pricing import Chain, timeline
from npnet.schedule import BACKWARD, FORWARD
from npnet.schedules import none

NOTHING, ALONE, ALL = range(3)  # what is held of a layer: nothing; its output; its output and what else it saved
KINDS = ["every layer saves", "no layer saves", "some layers save"]


def moves(chain, state, persistent=True):
    """All that can be done next: (the most bytes that are alive meanwhile, flops, the state after it).

    A state is (held, at, fresh): what is held of layers 0 (the input, which is always there and not counted) to L; the
    layer at whose output the gradient is; and the layer that has been run right before, 0 after anything else.

    *Persistent* means: an output is let go right after the next layer has been run from it, which is next after it was
    made itself, and without keeping what that next layer saves; or it stays until its last backward use. That is the
    backward pass of its own layer, or of the layer above, where its own would need what was not saved with it.
    """
    held, at, fresh = state
    alive = sum(chain.activation[layer] for layer in range(1, chain.depth + 1) if held[layer] != NOTHING)
    alive += sum(chain.saved[layer] for layer in range(1, chain.depth + 1) if held[layer] == ALL)
    if not chain.streaming:
        alive += sum(chain.parameter_gradients[at + 1 :])  # of all layers whose backward pass is done
    if at < chain.depth or chain.gradient_given:  # else the gradient is not there before the loss has made it
        alive += chain.gradient[at]

    for layer in range(1, at + 1):  # run a layer forward
        if held[layer - 1] == NOTHING or held[layer] != NOTHING:
            continue
        need = alive + chain.activation[layer] + max(chain.saved[layer], chain.forward_bytes[layer])
        flops = chain.forward_flops[layer]
        after = changed(held, layer, ALONE)
        yield need, flops, (after, at, layer)
        if layer > 1 and fresh == layer - 1 and held[layer - 1] == ALONE:
            yield need, flops, (changed(after, layer - 1, NOTHING), at, layer)
        if layer in chain.needs_saved:
            yield need, flops, (changed(held, layer, ALL), at, layer)

    if held[at - 1] != NOTHING and held[at] == (ALL if at in chain.needs_saved else ALONE):  # the next backward pass
        need = alive + chain.backward_bytes[at]
        if at == chain.depth and not chain.gradient_given:
            need = alive + max(chain.loss_bytes, chain.gradient[at] + chain.backward_bytes[at])
        after = changed(held, at, NOTHING)
        if at - 1 in chain.needs_saved and held[at - 1] == ALONE:
            after = changed(after, at - 1, NOTHING)
        yield need, 0, (after, at - 1, 0)

    if not persistent:  # let go of anything at any time
        for layer in range(1, chain.depth + 1):
            if held[layer] != NOTHING:
                yield alive, 0, (changed(held, layer, NOTHING), at, 0)


def changed(held, layer, what):
    return (*held[:layer], what, *held[layer + 1 :])


def search(chain, total, persistent=True):
    """The least total of the moves that lead to the end (Dijkstra's algorithm); infinite if none do.

    ``total(so_far, need, flops)`` adds a move to what came before it.
    """
    start = (ALONE, *[NOTHING] * chain.depth), chain.depth, 0
    heap, done = [(0, start)], set()  # the heap gives the states back cheapest first
    while heap:
        so_far, state = heappop(heap)
        if state[1] == 0:
            return so_far
        if state not in done:
            done.add(state)
            for need, flops, after in moves(chain, state, persistent):
                if after not in done and total(so_far, need, flops) < math.inf:
                    heappush(heap, (total(so_far, need, flops), after))
    return math.inf


def searched_flops(chain, budget, persistent=True):
    """The least flops that must be spent again for ``budget`` bytes to be enough."""
    least = search(chain, lambda so_far, need, flops: so_far + flops if need <= budget else math.inf, persistent)
    return least - sum(chain.forward_flops)


def searched_budget(chain):
    """The least bytes that are enough."""
    return search(chain, lambda so_far, need, flops: max(so_far, need))


def random_chain(rng, kind, depth):
    """A chain of layers that have nothing in common; in bytes as small as can be, to be at the edges often."""
    layers = range(1, depth + 1)
    saving = {layer for layer in layers if kind == KINDS[0] or (kind == KINDS[2] and rng.random() < 0.5)}
    unit = int(rng.integers(1, 4))  # so that the unit of the table is not always 1, and the budget has a remainder
    some = lambda least, most: [0, *rng.integers(least, most + 1, depth).tolist()]  # noqa: E731
    saved = [unit * bytes_ if layer in saving else 0 for layer, bytes_ in enumerate(some(0, 3))]
    gradient, made = some(1, 4), some(0, 2)
    return Chain(
        activation=[unit * bytes_ for bytes_ in some(1, 4)],
        saved=saved,
        gradient=gradient,
        forward_bytes=list(map(sum, zip(saved, some(0, 5), strict=True))),
        backward_bytes=list(map(sum, zip([0, *gradient[:-1]], made, some(0, 5), strict=True))),
        parameter_gradients=made,
        streaming=bool(rng.integers(0, 2)),
        forward_flops=some(1, 6),
        backward_flops=some(1, 6),
        needs_saved=frozenset(saving),
        loss_bytes=gradient[-1] + int(rng.integers(0, 6)),
        parameters=int(rng.integers(0, 9)),
        optimizer=int(rng.integers(0, 9)),
        gradient_given=bool(rng.integers(0, 2)),
    )


def price(schedule, chain):
    """Bytes, without those that are there anyway."""
    return max(moment.peak_bytes for moment in timeline(schedule, chain)) - chain.fixed


def some_chains(kind, seed, count):
    """(chain, the least that is enough, a budget from a bit less than that to a bit more than keeping all takes)."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        chain = random_chain(rng, kind, 1 + i % 6)
        most = price(none(chain.depth, chain.needs_saved), chain)
        least = searched_budget(chain)
        yield chain, least, int(rng.integers(max(least - 3, 0), most + 3))


@pytest.mark.parametrize("kind", KINDS)
def test_no_persistent_schedule_within_the_budget_is_cheaper_and_the_one_found_fits(kind):
    found = {"nothing": 0, "recomputation": 0, "plain": 0}  # how often what is found is that
    for chain, enough, budget in some_chains(kind, 1, 600):
        optimum, least = Optimum(chain, budget), searched_flops(chain, budget)
        assert optimum.recompute_flops() == least, (chain, budget)
        assert optimum.feasible == (least < math.inf) == (budget >= enough)
        if least < math.inf:
            schedule = optimum.schedule()
            assert chain.recompute_flops(schedule) == least
            assert price(schedule, chain) <= budget
            assert (schedule.depth, schedule.needs_saved) == (chain.depth, chain.needs_saved)
        found["nothing" if least == math.inf else "recomputation" if least else "plain"] += 1
    assert min(found.values()) >= 60, found


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_budget_is_enough_and_one_byte_less_is_not(kind):
    for chain, least, _ in some_chains(kind, 2, 510):
        budget, schedule = smallest_budget(chain)
        assert budget == least == price(schedule, chain), chain
        assert schedule.needs_saved == chain.needs_saved
        assert Optimum(chain, budget).recompute_flops() <= chain.recompute_flops(schedule)
        assert Optimum(chain, budget - 1).recompute_flops() == math.inf


@pytest.mark.parametrize("kind", KINDS)
def test_more_bytes_never_cost_more_and_every_level_of_the_table_is_the_optimum_of_its_budget(kind):
    for chain, enough, budget in some_chains(kind, 3, 60):
        optimum = Optimum(chain, budget)
        assert (optimum.costs[1:] <= optimum.costs[:-1]).all()
        for level, cost in enumerate(optimum.costs):
            bytes_ = budget - (optimum.levels - 1 - level) * optimum.unit
            assert cost == Optimum(chain, bytes_).costs[-1]
            assert (cost < math.inf) == (bytes_ >= enough)
            if cost < math.inf:
                schedule = optimum.schedule(level)
                assert sum(chain.forward_flops) + chain.recompute_flops(schedule) == cost
                assert price(schedule, chain) <= bytes_


@pytest.mark.parametrize("kind", KINDS)
def test_a_coarser_unit_gives_schedules_that_fit_or_a_lower_bound(kind):
    worse = lower = 0
    for chain, _, budget in some_chains(kind, 4, 150):
        exact, least = exact_unit(chain), Optimum(chain, budget).recompute_flops()
        assert Optimum(chain, budget, unit=exact).recompute_flops() == least
        kept = [*chain.activation[1:-1], *filter(None, chain.saved)] or [1]
        assert exact == max(unit for unit in range(1, 13) if all(each % unit == 0 for each in kept))
        for unit in (exact + 1, exact + 3, budget // 2 + 1):
            rounded = Optimum(chain, budget, unit=unit)
            bound = Optimum(chain, budget, unit=unit, round_up=False).recompute_flops()
            assert bound <= least <= rounded.recompute_flops()
            worse, lower = worse + (least < rounded.recompute_flops()), lower + (bound < least)
            if rounded.recompute_flops() < math.inf:
                assert price(rounded.schedule(), chain) <= budget
                assert chain.recompute_flops(rounded.schedule()) == rounded.recompute_flops()
    assert worse > 10 < lower


def literature(activation, saved, gradient, forward, backward):
    """A chain as papers have it: all layers save, the gradient at the end is there from the start, no workspace."""
    depth = len(saved)
    return Chain(
        activation=activation,
        saved=[0, *saved],
        gradient=gradient,
        forward_bytes=[0] * (depth + 1),
        backward_bytes=[0, *gradient[:-1]],
        parameter_gradients=[0] * (depth + 1),
        streaming=True,
        forward_flops=[0, *forward],
        backward_flops=[0, *backward],
        needs_saved=frozenset(range(1, depth + 1)),
        gradient_given=True,
    )


@pytest.mark.parametrize("depth", range(2, 14))
def test_with_layers_too_large_to_be_kept_it_is_revolve_and_with_free_ones_the_mixed_schedule(depth):
    multistage = pytest.importorskip("checkpoint_schedules.multistage")
    mixed = pytest.importorskip("checkpoint_schedules.mixed")
    for c in range(1, depth + 2):  # the budgets are M - A_0, with the M of the literature
        chain = literature([1] * (depth + 1), [c + 1] * depth, [0] * (depth + 1), [1] * depth, [0] * depth)
        assert Optimum(chain, 2 * c + 2).costs[-1] == multistage.optimal_steps_binomial(depth, c)
        chain = literature([1] * (depth + 1), [0] * depth, [1] * (depth + 1), [1] * depth, [0] * depth)
        assert Optimum(chain, c + 3).costs[-1] == mixed.optimal_steps_mixed(depth, c)


def test_a_schedule_that_is_not_persistent_can_be_cheaper():
    """Three layers, 10 bytes besides the input; keeping everything takes 12.

    Backward 3 takes 10 bytes with a_2 and a_3 alone, so a_1 cannot be there. The cheapest way to do without is: run all
    layers, keep what layer 2 saved but not its input a_1, and after backward 3 run layer 1 again, for 4. But that is to
    let go of a_1 while its backward use is still to come: what layer 2 saved is of use with a_1 only. A persistent
    schedule keeps both or neither. So it keeps a_2 alone, and runs both layers, 1 and 2, again, for 4 + 6.
    """
    chain = literature([1, 1, 3, 2], saved=[1, 0, 0], gradient=[1, 1, 3, 2], forward=[4, 6, 1], backward=[3, 1, 2])
    assert price(none(3, chain.needs_saved), chain) == 12
    assert chain.step_flops + Optimum(chain, 10).recompute_flops() == 17 + 10
    assert chain.step_flops + searched_flops(chain, 10) == 17 + 10
    assert chain.step_flops + searched_flops(chain, 10, persistent=False) == 17 + 4


def test_the_search_knows_what_is_obvious():
    chain = replace(literature([0, 1, 1], [0, 0], [0, 1, 1], [5, 7], [0, 0]), needs_saved=frozenset())
    assert searched_budget(chain) == 4  # a_1, a_2 and both gradients in backward 2
    assert searched_flops(chain, 4) == 0
    assert searched_flops(chain, 3) == math.inf
    assert Optimum(chain, 4).schedule() == none(2) == ((FORWARD, 1), (FORWARD, 2), (BACKWARD, 2), (BACKWARD, 1))
