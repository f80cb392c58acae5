"""The lab's network with gradient checkpointing."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from npnet import schedules
from npnet.backend import Array
from npnet.checkpoint import Restore
from npnet.checks import check_list, check_whole
from npnet.dense_chain import DenseChain, is_own
from npnet.lending import Shown
from npnet.memory import parse_bytes
from npnet.network import OWN_INITS, Network
from npnet.planner import plan
from npnet.plans import Plan
from npnet.pools import HardBudget
from npnet.random import RNG
from npnet.schedule import Schedule
from npnet.schedules import ScheduleLike

MOST_PLANS = 16
"""How many plans a network remembers: one for each batch size."""


class NetworkWithCheckpointing(Network):
    """The same network, trained with gradient checkpointing: same gradients, bit for bit, in less memory.

    Args:
        sizes, dtype, rng, backend: as for `Network`.
        checkpoint_every_nth_layer: keep the output of every n-th layer, and recompute the others from there. 0 is
            off, 1 keeps all.
        schedule: instead of n, a `Schedule`, a name ("none", "sqrt", "revolve", "offload"), a list of actions or a
            function of the depth.
        memory_budget: instead, bytes or "20 MB": the most that a training step may take, as for `npnet.plan`. The
            cheapest schedule is planned at the first batch, and again for another batch size. Data are not
            counted, nor a copy that is made of data of another dtype; nor what a method of a subclass allocates. On a
            GPU the budget is a limit, too: a step that takes more, by such a method, say, runs out of memory.

    Raises:
        TypeError, ValueError: n is not a whole number >= 0, two of n, schedule and budget are given, or the schedule
            does not fit the network.
        InfeasibleBudget: (at a batch) no schedule keeps to the budget; nothing was computed.
        OutOfMemory: (at a batch) memory ran out, or on a GPU the budget.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        checkpoint_every_nth_layer: int = 0,
        *,
        schedule: ScheduleLike | None = None,
        memory_budget: float | str | None = None,
        dtype: npt.DTypeLike = np.float64,
        rng: RNG = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(sizes, dtype=dtype, rng=rng, backend=backend)
        self.checkpoint_every_nth_layer = checkpoint_every_nth_layer
        if bool(checkpoint_every_nth_layer) + (schedule is not None) + (memory_budget is not None) > 1:
            raise ValueError("give one of checkpoint_every_nth_layer, schedule and memory_budget, not more")
        if schedule is not None:
            self._npnet.follow(schedule)
        if memory_budget is not None:
            self.memory_budget = memory_budget

    @cached_property
    def _npnet(self) -> "CheckpointedChain":
        return CheckpointedChain()

    @Shown
    def plan(self) -> Plan | None:
        """The plan for the last batch size, where there is a budget."""
        return self._npnet.plan

    @Shown
    def schedule(self) -> Schedule:
        """What a step computes, holds and recomputes; with a budget, that of the last batch.

        Assigning a `Schedule`, or the name of one, replaces it.
        """
        return self._npnet.ready(self).schedule

    def config(self) -> dict[str, Any]:
        config, chain = super().config(), self._npnet.ready(self)
        schedule = chain.schedule if type(self).__init__ in OWN_INITS else config.get("schedule")
        if isinstance(schedule, Schedule):  # else a subclass takes none, or something of its own
            del config["schedule"]
        if isinstance(schedule, Schedule) and not chain.every and chain.budget is None:
            config["schedule"] = {
                "actions": [(kind.value, layer) for kind, layer in schedule],
                "depth": schedule.depth,
                "name": schedule.name,
                "needs_saved": sorted(schedule.needs_saved),
                "offload_to": schedule.offload_to,
            }
        return config

    @property
    def memory_budget(self) -> int | None:
        """Bytes, or None; assigning bytes or "20 MB" to it replaces the schedule, at the next batch."""
        return self._npnet.budget

    @memory_budget.setter
    def memory_budget(self, budget: float | str | None) -> None:
        self._npnet.keep_to(budget)

    @property
    def checkpoint_every_nth_layer(self) -> int:
        """n; assigning to it replaces the schedule, or the budget."""
        return self._npnet.every

    @checkpoint_every_nth_layer.setter
    def checkpoint_every_nth_layer(self, n: int) -> None:
        self._npnet.keep_every(n)

    def backprop(self, x: Array, y: Array) -> tuple[list[Array], list[Array]]:
        """The same gradient by the schedule; where checkpointing is off, by the plain network's `backprop`."""
        chain = self._npnet.ready(self)
        chain.read_every(self)
        if chain.off:
            return super().backprop(x, y)
        return chain.gradients(self, x, y, checkpointed=True)

    def forward_between_checkpoints(self, a: Array, checkpoint_idx_start: int, layer_idx_end: int) -> list[Array]:
        """Recompute activations from a checkpoint.

        `backprop` restores every segment through here. (Unless another method stands in this one's place, it does
        so in rows: the same loop without its transposes, which would be a fiftieth of a step of thin layers.)

        Args:
            a: the activation that layers[checkpoint_idx_start] takes, columns (features, batch).
            checkpoint_idx_start: index of the first layer to run.
            layer_idx_end: index behind the last layer to run.

        Returns:
            ``a`` and the outputs of the layers, columns: layer_idx_end - checkpoint_idx_start + 1 arrays. (``a`` alone
            where the end is not behind the start, as in the exercise.)
        """
        chain = self._npnet.ready(self)
        checkpoint_idx_start = check_whole(checkpoint_idx_start, "checkpoint_idx_start")
        layer_idx_end = check_whole(layer_idx_end, "layer_idx_end")
        if not checkpoint_idx_start <= len(chain.layers) >= layer_idx_end:
            raise ValueError(
                f"forward_between_checkpoints: expected layer indices from 0 to {len(chain.layers)}, got "
                f"{checkpoint_idx_start} and {layer_idx_end}"
            )
        a = chain.array(a, "a")
        return [a, *(rows.T for rows in chain.outputs(a.T, checkpoint_idx_start, layer_idx_end))]


class CheckpointedChain(DenseChain):
    """The layers of a network with checkpointing, and the schedule by which they run."""

    schedule: Schedule

    def __init__(self) -> None:
        super().__init__()
        self.every = 0
        self.wanted: Schedule | str | None = None  # instead of n; a name is one for any depth
        self.budget: int | None = None
        self.plan: Plan | None = None
        self.plans = dict[tuple[int, bool], Plan]()

    @property
    def off(self) -> bool:
        """No checkpointing: as in the exercise, n = 0 is the plain network."""
        return self.every == 0 and self.wanted is None and self.budget is None

    def make(
        self, sizes: Sequence[int], dtype: npt.DTypeLike, backend: str | None, draw: Callable[[Any], Array]
    ) -> None:
        super().make(sizes, dtype, backend, draw)
        self.plan, self.plans = None, {}
        self._schedule()

    def read_every(self, network: Any) -> None:
        """Take n from the network, where a subclass keeps it itself."""
        if type(network).checkpoint_every_nth_layer is not _EVERY:
            n = network.checkpoint_every_nth_layer
            if n != self.every:
                self.keep_every(n)

    def keep_every(self, n: int) -> None:
        """By n, and no longer by a schedule or to a budget."""
        self.every, self.wanted = check_whole(n, "checkpoint_every_nth_layer"), None
        self._limit_to(None)
        if self.layers:
            self._schedule()

    def follow(self, schedule: ScheduleLike) -> None:
        """By this schedule."""
        made = schedules.as_schedule(schedule, len(self.layers)) if self.layers else None
        self.keep_every(0)
        self.wanted = schedule if isinstance(schedule, (str, Schedule)) else made
        if made is not None:
            self.schedule = made

    def keep_to(self, budget: float | str | None) -> None:
        """By the plans for this budget; without one, by the last schedule."""
        checked = None if budget is None else parse_bytes(budget)
        if checked is not None:
            self.every, self.wanted = 0, None
        elif self.budget is not None and self.plan is not None:
            self.wanted = self.schedule
        self._limit_to(checked)

    def changed(self, name: str, value: Any) -> bool:
        if name == "schedule" and (
            isinstance(value, Schedule) or (isinstance(value, str) and value in schedules.MAKERS)
        ):
            self.follow(value)
            return True
        return super().changed(name, value)

    def checkpointed(self, network: Any, own: Callable[..., Any]) -> bool | None:
        if not is_own(network.backprop, network, _BACKPROP):
            return super().checkpointed(network, own)
        self.read_every(network)
        if not self.off:
            return True
        inherited: Any = super(NetworkWithCheckpointing, network)  # mypy does not take Any for a network
        return False if is_own(inherited.backprop, network, own) else None

    def scheduled(self, network: Any, batch_size: int, streaming: bool) -> tuple[Schedule, Restore | None]:
        if self.budget is not None:
            key = batch_size, streaming
            if key not in self.plans:
                if len(self.plans) == MOST_PLANS:
                    self.plans.clear()
                self.plans[key] = plan(self, batch_size, memory_budget=self.budget, streaming=streaming)
            self.plan = self.plans[key]
            self.schedule = self.plan.schedule
        return self.schedule, partial(self._restore, network)

    def outputs(self, rows: Array, start: int, end: int) -> list[Array]:
        """The outputs of layers[start:end], rows."""
        outputs = []
        for layer in self.layers[start:end]:
            rows, _ = layer.forward(rows)
            outputs.append(rows)
        return outputs

    def _schedule(self) -> None:
        depth = len(self.layers)
        self.schedule = schedules.every_nth(depth, self.every)
        if self.wanted is not None:
            self.schedule = schedules.as_schedule(self.wanted, depth)
        self._limit_to(self.budget)

    def _limit_to(self, budget: int | None) -> None:
        self.budget, self.plan, self.plans = budget, None, {}
        if self.layers:
            self.limit = HardBudget(self.backend, budget, self.counted)

    def _restore(self, network: Any, a: Array, first: int, last: int) -> list[Array]:
        method = network.forward_between_checkpoints
        if is_own(method, network, _FORWARD_BETWEEN_CHECKPOINTS):  # npnet's own: rows will do
            return self.outputs(a, first - 1, last)
        name, sizes = f"forward_between_checkpoints(a, {first - 1}, {last})", self.sizes[first - 1 : last + 1]
        activations = check_list(method(a.T, first - 1, last), len(sizes), name)
        checked = [self.array(array, name) for array in activations]
        for array, size in zip(checked, sizes, strict=True):
            if array.shape != (size, len(a)):
                raise ValueError(f"{name}: expected an activation of shape {size, len(a)}, got {array.shape}")
        return [activation.T for activation in checked[1:]]


# npnet's own, whatever is put in their places
_BACKPROP = NetworkWithCheckpointing.backprop
_FORWARD_BETWEEN_CHECKPOINTS = NetworkWithCheckpointing.forward_between_checkpoints
_EVERY: Any = NetworkWithCheckpointing.checkpoint_every_nth_layer
OWN_INITS.append(NetworkWithCheckpointing.__init__)
