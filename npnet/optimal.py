"""The cheapest schedule for a budget in bytes, by dynamic programming; and the smallest budget there is.

*Memory-persistent* schedules are searched: what is kept is let go only when its last backward use is done. Among them
the schedule found is optimal; without that restriction a cheaper one can exist (tests/test_optimal.py has an example).

The problem (s, t, m): do the backward passes of layers t, ..., s. a_{s-1} is held, and paid for by whoever asks; the
gradient at a_t is known; m bytes are left for everything else. a_t is held, too, and paid from m, if layer t's output
suffices for its backward pass. It is not there if that needs what the layer saved (t will be run again), nor for t = L
(the forward pass has not come that far). T(s, t, m) is the least cost of the forwards that this takes, infinite if it
cannot be done:

    T(s, s, m) = 0 if a_s is held, else f_s
    T(s, t, m) = the least of  f_s + ... + f_k + T(k+1, t, m - A_k) + T(s, k, m)  for s <= k < t  (keep a_k alone)
                          and  f_s + T(s+1, t, m - A_s - S_s)                     (keep a_s and what layer s saved)

each infinite where the forward of a layer from s to t - 1, or the backward pass of layer s at the end, does not fit
into m. If every layer saves, this is the recurrence of Beaumont, Eyraud-Dubois, Herrmann, Joly & Shilova, "Optimal
checkpointing for heterogeneous chains", 2019, arXiv:1911.13214; if none does, a finer one that runs fewer layers again.

All m that occur are the budget minus sums of A and S. So they are the budget's remainder plus multiples of the greatest
common divisor of A and S, and a table over these multiples is exact: nothing is rounded.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from npnet.checks import check_whole
from npnet.pricing import Chain
from npnet.schedule import BACKWARD, DROP, FORWARD, Kind, Schedule

Floats = npt.NDArray[np.float64]


class _Needs:
    """Bytes that single steps of the problem (s, t, m) need of m."""

    def __init__(self, chain: Chain) -> None:
        self.chain, self.depth = chain, chain.depth
        self.activation, self.saved = np.array(chain.activation), np.array(chain.saved)
        saving = np.maximum(self.saved, chain.forward_bytes)
        kept = np.array(chain.kept)
        gradient = np.array(chain.gradient)
        self.output_held = [t < self.depth and t not in chain.needs_saved for t in range(self.depth + 1)]
        self.around = np.append(kept[1:], 0) + gradient  # alive during (s, t) before backward t: all gradients
        self.backward = self.activation + self.saved + self.around + chain.backward_bytes
        if not chain.gradient_given:
            self.around[-1] = 0
            self.backward[-1] = self.activation[-1] + self.saved[-1]
            self.backward[-1] += max(chain.loss_bytes, chain.gradient[-1] + chain.backward_bytes[-1])
        self.around += np.where(self.output_held, self.activation, 0)
        self.forward = self.activation + saving  # of layer l, its input not counted
        self.forward_within = self.forward + np.append(0, self.activation[:-1])

    def leaf(self, s: int) -> int:
        """To solve (s, s): backward of s, and its forward first where a_s is not held."""
        run = 0 if self.output_held[s] else self.around[s] + self.forward[s]
        return int(max(self.backward[s], run))

    def keep_all(self, s: int, t: int) -> int:
        """To run layer s, keep what it saved, and run its backward pass at the end of (s, t)."""
        return int(max(self.around[t] + self.forward[s], self.backward[s]))

    def forward_sweep(self, s: int, t: int) -> int:
        """To run layers s, ..., t - 1: in every solution of (s, t) each of them is run with all that is around."""
        within = self.forward_within[s + 1 : t].max(initial=self.forward[s])
        return int(within + self.around[t])


def smallest_budget(chain: Chain) -> tuple[int, Schedule]:
    """The least bytes (besides `Chain.fixed`) in which a memory-persistent schedule exists, and such a schedule.

    The same recurrence, with the greatest need in place of the cost: O(L^3), and nothing but bytes.
    """
    needs, depth = _Needs(chain), chain.depth
    least = np.zeros((depth + 1, depth + 1), np.int64)  # least[s, t]: smallest m for which (s, t) can be solved
    choice = np.zeros((depth + 1, depth + 1), np.int64)
    for s in range(1, depth + 1):
        least[s, s] = needs.leaf(s)
    for length in range(1, depth):
        for s in range(1, depth + 1 - length):
            t = s + length
            need = np.maximum(least[s, s:t], least[s + 1 : t + 1, t] + needs.activation[s:t])
            k = int(need.argmin())
            least[s, t], choice[s, t] = max(int(need[k]), needs.forward_sweep(s, t)), s + k
            if s in chain.needs_saved:
                keep = max(needs.keep_all(s, t), int(least[s + 1, t] + needs.activation[s] + needs.saved[s]))
                if keep <= least[s, t]:
                    least[s, t], choice[s, t] = keep, 0
    schedule = _assemble(chain, lambda s, t, _: (int(choice[s, t]), 0), 0, "smallest")
    return int(least[1, depth]), schedule


class Optimum:
    """The table of T for budgets up to ``budget`` bytes (besides `Chain.fixed`).

    Args:
        unit: bytes between two levels of m; by default `exact_unit`. With another one, what is kept is rounded to it.
        round_up: with a unit that is not exact: True gives schedules that fit, and need not be optimal; False a lower
            bound on the cost, and schedules that need not fit.

    It takes 8 L^2 budget/unit bytes and time in proportion to L^3 budget/unit.
    """

    def __init__(self, chain: Chain, budget: int, unit: int | None = None, round_up: bool = True) -> None:
        self.chain, self.budget, self.needs = chain, check_whole(budget, "budget"), _Needs(chain)
        self.unit = exact_unit(chain) if unit is None else unit
        self.levels = budget // self.unit + 1
        self.remainder = budget % self.unit  # level j stands for m = remainder + j * unit
        up = self.unit - 1 if round_up else 0
        self._charge = (self.needs.activation + up) // self.unit  # in levels
        self._charge_all = (self.needs.activation + self.needs.saved + up) // self.unit
        depth = chain.depth
        self._flops = np.cumsum(np.array(chain.forward_flops, float))
        shape = depth + 1, depth + 1, self.levels
        self._table: Floats = np.empty(shape)  # [s, t, j] T(s, t, m)
        self._above: Floats = np.empty(shape)  # [t, k, j] T(k + 1, t, m - A_k)
        work: Floats = np.empty((depth, self.levels))
        for s in range(1, depth + 1):
            self._table[s, s] = 0.0 if self.needs.output_held[s] else chain.forward_flops[s]
            self._table[s, s, : self._level(self.needs.leaf(s))] = np.inf
            self._finish(s, s)
        for length in range(1, depth):
            for s in range(1, depth + 1 - length):
                self._solve(s, s + length, work[:length])

    def _level(self, need: int) -> int:
        """The first level at which ``need`` bytes fit."""
        return min(max(-((self.remainder - need) // self.unit), 0), self.levels)

    def _solve(self, s: int, t: int, work: Floats) -> None:
        np.add(self._table[s, s:t], self._above[t, s:t], out=work)
        work += (self._flops[s:t] - self._flops[s - 1])[:, None]
        best = work.min(axis=0, out=self._table[s, t])
        if s in self.chain.needs_saved:
            np.minimum(best, self._keep_all(s, t), out=best)
        best[: self._level(self.needs.forward_sweep(s, t))] = np.inf
        self._finish(s, t)

    def _keep_all(self, s: int, t: int) -> Floats:
        costs: Floats = np.full(self.levels, np.inf)
        charge = min(int(self._charge_all[s]), self.levels)
        costs[charge:] = self._table[s + 1, t, : self.levels - charge] + self.chain.forward_flops[s]
        costs[: self._level(self.needs.keep_all(s, t))] = np.inf
        return costs

    def _finish(self, s: int, t: int) -> None:
        """Enter T(s, t), for which a_{s-1} is a checkpoint, once more with that charged."""
        charge = min(int(self._charge[s - 1]), self.levels)
        self._above[t, s - 1, :charge] = np.inf
        self._above[t, s - 1, charge:] = self._table[s, t, : self.levels - charge]

    @property
    def costs(self) -> Floats:
        """Flops of all forwards of the optimal schedule, for each level; the last is the budget."""
        return self._table[1, self.chain.depth]

    @property
    def feasible(self) -> bool:
        """Whether there is a schedule within the budget."""
        return math.isfinite(self.costs[-1])

    def recompute_flops(self) -> float:
        """Flops that are spent again in the optimal schedule for the budget; infinite if there is none."""
        return float(self.costs[-1]) - sum(self.chain.forward_flops)

    def schedule(self, level: int = -1) -> Schedule:
        """The optimal schedule for the budget, or for that of another level, whose cost must be finite."""
        return _assemble(self.chain, self._choose, range(self.levels)[level], "optimal")

    def _choose(self, s: int, t: int, level: int) -> tuple[int, int]:
        """The k with which T(s, t, m) is least, or 0 for keeping all; and the level of the problem above."""
        costs = self._table[s, s:t, level] + self._above[t, s:t, level] + self._flops[s:t] - self._flops[s - 1]
        k = int(costs.argmin())
        if s in self.chain.needs_saved and self._keep_all(s, t)[level] <= costs[k]:
            return 0, level - int(self._charge_all[s])
        return s + k, level - int(self._charge[s + k])


def exact_unit(chain: Chain) -> int:
    """The greatest common divisor of what is kept: A_l, and S_l where a layer saves."""
    return math.gcd(*chain.activation[1:-1], *chain.saved) or 1


def remainders(chain: Chain, unit: int, first: Iterable[int] = ()) -> list[int]:
    """The remainders, by ``unit``, of the bytes that single steps need: only at budgets with such a one can costs fall.

    The remainders of ``first`` stand first.
    """
    needs, layers = _Needs(chain), range(1, chain.depth + 1)
    found = dict.fromkeys(size % unit for size in first)
    found |= dict.fromkeys(needs.leaf(s) % unit for s in layers)
    for t in layers:
        found |= dict.fromkeys(needs.forward_sweep(s, t) % unit for s in range(1, t))
        found |= dict.fromkeys(needs.keep_all(s, t) % unit for s in range(1, t) if s in chain.needs_saved)
    return list(found)


def _assemble(chain: Chain, choose: Callable[[int, int, int], tuple[int, int]], level: int, name: str) -> Schedule:
    """The action list of the problem (1, L, m), from a function that tells k and the m of the problem above."""
    actions: list[tuple[Kind, int]] = []
    held: set[int] = set()
    pending = [(1, chain.depth, level)]  # problems (s, t, m) to be solved, the next one last; t = 0: only backward s
    while pending:
        s, t, level = pending.pop()
        if t in held and t in chain.needs_saved:  # of what t saved, only its output is there
            actions.append((DROP, t))
            held.remove(t)
        if not t or s == t:
            if t and s not in held:
                actions.append((FORWARD, s))
            actions.append((BACKWARD, s))
            continue
        k, above = choose(s, t, level)
        for layer in range(s, max(k, s) + 1):
            actions.append((FORWARD, layer))
            if layer > s:
                actions.append((DROP, layer - 1))
        held.add(max(k, s))
        pending += [(s, k, level), (max(k, s) + 1, t, above)]
    return Schedule(actions, chain.depth, name, chain.needs_saved)
