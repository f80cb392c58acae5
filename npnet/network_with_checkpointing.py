"""The lab's network with gradient checkpointing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from npnet import schedules
from npnet.backend import Array
from npnet.checks import check_list, check_whole
from npnet.dense_chain import DenseChain, Shown
from npnet.memory import parse_bytes
from npnet.network import Network
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
        self._every = 0
        super().__init__(sizes, dtype=dtype, rng=rng, backend=backend)
        self.checkpoint_every_nth_layer = checkpoint_every_nth_layer
        if bool(checkpoint_every_nth_layer) + (schedule is not None) + (memory_budget is not None) > 1:
            raise ValueError("give one of checkpoint_every_nth_layer, schedule and memory_budget, not more")
        if schedule is not None:
            self._schedule = schedules.as_schedule(schedule, len(self._chain.layers))
        if memory_budget is not None:
            self.memory_budget = memory_budget

    def _begin(self, chain: DenseChain) -> None:
        super()._begin(chain)
        self._restore = self._restore_through_lab
        self.checkpoint_every_nth_layer = vars(self).get("_every", 0)  # an own __init__ may set it before the weights

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "schedule" and (
            isinstance(value, Schedule) or (isinstance(value, str) and value in schedules.MAKERS)
        ):
            self.checkpoint_every_nth_layer = 0
            self._schedule = schedules.as_schedule(value, len(self._chain.layers))
            vars(self).pop("schedule", None)
            return
        super().__setattr__(name, value)

    @Shown
    def plan(self) -> Plan | None:
        """The plan for the last batch size, where there is a budget."""
        return self._plan

    @Shown
    def schedule(self) -> Schedule:
        """What a step computes, holds and recomputes; with a budget, that of the last batch.

        Assigning a `Schedule`, or the name of one, replaces it.
        """
        return self._schedule

    def config(self) -> dict[str, Any]:
        config = super().config()
        taken = config.pop("schedule", None) is not None  # a subclass may take none
        schedule = self._schedule
        if taken and not self._every and self.memory_budget is None:
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
        return self._memory_budget

    @memory_budget.setter
    def memory_budget(self, budget: float | str | None) -> None:
        self._memory_budget = None if budget is None else parse_bytes(budget)
        self._limit = HardBudget(self._chain.backend, self._memory_budget, self._counted)
        self._plan: Plan | None = None
        self._plans = dict[tuple[int, bool], Plan]()
        if budget is not None:
            self._every = 0

    def _schedule_for(self, batch_size: int, streaming: bool) -> Schedule:
        if self.memory_budget is not None:
            key = batch_size, streaming
            if key not in self._plans:
                if len(self._plans) == MOST_PLANS:
                    self._plans.clear()
                self._plans[key] = plan(self._chain, batch_size, memory_budget=self.memory_budget, streaming=streaming)
            self._plan = current = self._plans[key]
            self._schedule = current.schedule
        return self._schedule

    @property
    def checkpoint_every_nth_layer(self) -> int:
        """n; assigning to it replaces the schedule, or the budget."""
        return self._every

    @checkpoint_every_nth_layer.setter
    def checkpoint_every_nth_layer(self, n: int) -> None:
        self._every = check_whole(n, "checkpoint_every_nth_layer")
        if "_chain" not in vars(self):
            return
        self._schedule = schedules.every_nth(len(self._chain.layers), n)
        self.memory_budget = None

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
        checkpoint_idx_start = check_whole(checkpoint_idx_start, "checkpoint_idx_start")
        layer_idx_end = check_whole(layer_idx_end, "layer_idx_end")
        if not checkpoint_idx_start <= len(self._chain.layers) >= layer_idx_end:
            raise ValueError(
                f"forward_between_checkpoints: expected layer indices from 0 to {len(self._chain.layers)}, got "
                f"{checkpoint_idx_start} and {layer_idx_end}"
            )
        a = self._array(a, "a")
        return [a, *(rows.T for rows in self._outputs(a.T, checkpoint_idx_start, layer_idx_end))]

    def _outputs(self, rows: Array, start: int, end: int) -> list[Array]:
        """The outputs of layers[start:end], rows."""
        outputs = []
        for layer in self._chain.layers[start:end]:
            rows, _ = layer.forward(rows)
            outputs.append(rows)
        return outputs

    def _restore_through_lab(self, a: Array, first: int, last: int) -> list[Array]:
        method = self.forward_between_checkpoints
        if getattr(method, "__func__", None) is _FORWARD_BETWEEN_CHECKPOINTS:  # npnet's own: rows will do
            return self._outputs(a, first - 1, last)
        activations = self._checked_activations(method(a.T, first - 1, last), len(a), first, last)
        return [activation.T for activation in activations[1:]]

    def _checked_activations(self, activations: Any, batch: int, first: int, last: int) -> list[Array]:
        name, sizes = f"forward_between_checkpoints(a, {first - 1}, {last})", self._chain.sizes[first - 1 : last + 1]
        checked = [self._array(array, name) for array in check_list(activations, len(sizes), name)]
        for array, size in zip(checked, sizes, strict=True):
            if array.shape != (size, batch):
                raise ValueError(f"{name}: expected an activation of shape {size, batch}, got {array.shape}")
        return checked


_FORWARD_BETWEEN_CHECKPOINTS = NetworkWithCheckpointing.forward_between_checkpoints
