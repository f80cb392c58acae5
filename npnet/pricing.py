"""What a training step takes, in bytes and flops, before it runs: the price of a schedule.

`Chain` holds what each layer costs, as plain integers, read from the layers by `npnet.chain_costs`.
`timeline` goes through a schedule action by action, as the engine does, and adds up what is alive.

Notation, as in Beaumont et al., "Optimal checkpointing for heterogeneous chains", 2019, arXiv:1911.13214: layer l makes
a_l, of A_l bytes, from a_{l-1}, and saves S_l more; D_l is the gradient at a_l; f_l and b_l are the flops of its two
passes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import NamedTuple

from npnet.schedule import BACKWARD, DROP, FETCH, FORWARD, OFFLOAD, Action, Schedule


@dataclass(frozen=True)
class Chain:
    """The costs of a chain of L layers for one batch. Sequences have L + 1 entries; entry l belongs to layer l, entry 0
    to the input. All in bytes but the flops.
    """

    activation: Sequence[int]  # A_l; A_0 = 0, the input is the caller's
    saved: Sequence[int]  # S_l, for layers whose output does not suffice, else 0
    gradient: Sequence[int]  # D_l
    forward_bytes: Sequence[int]  # the most that forward takes besides input and output, S_l included
    backward_bytes: Sequence[int]  # the most that backward takes besides a_{l-1}, a_l, S_l, D_l: D_{l-1} included
    parameter_gradients: Sequence[int]  # made by backward, those of shared parameters each time
    streaming: bool  # ... and freed right after it by the update of the layer; else they stay until the step ends
    forward_flops: Sequence[int]  # f_l
    backward_flops: Sequence[int]  # b_l
    needs_saved: frozenset[int] = frozenset()
    saves_input: frozenset[int] = frozenset()  # those of them whose input is among what they save
    loss_bytes: int = 0  # the most that the loss takes besides the output: D_L included
    parameters: int = 0
    optimizer: int = 0
    accumulated: int = 0  # gradients of the micro-batches before
    communication: int = 0  # buffers in which gradients are summed over several processes
    small: int = 0  # on a device: for single rows and columns, and for what reductions take
    overlapping: bool = False  # on a device: activations travel to the host while it computes (`npnet.transfers`)
    waiting: Sequence[int] | None = None  # gradients alive after backward l, where layers share parameters: see `kept`
    gradient_given: bool = False  # D_L is there from the start (a model of the literature; in npnet the loss makes it)

    @property
    def depth(self) -> int:
        """L."""
        return len(self.activation) - 1

    @property
    def fixed(self) -> int:
        """Bytes that are alive throughout, whatever the schedule."""
        return self.parameters + self.optimizer + self.accumulated + self.communication + self.small

    @property
    def kept(self) -> Sequence[int]:
        """Bytes of parameters' gradients that are alive once the backward pass of layer l is done (entry l).

        Those of layers whose update comes later: at the end of the step, or when the lowest layer that shares a
        parameter is done.
        """
        if self.waiting is not None:
            return self.waiting
        if self.streaming:
            return [0] * (self.depth + 1)
        return list(accumulate(reversed(self.parameter_gradients)))[::-1]

    @property
    def step_flops(self) -> int:
        """Flops of a plain training step: each layer forward and backward once."""
        return sum(self.forward_flops) + sum(self.backward_flops)

    def recompute_flops(self, schedule: Schedule) -> int:
        """Flops of all forwards of ``schedule`` but the first of each layer."""
        return sum((count - 1) * self.forward_flops[layer] for layer, count in schedule.forwards.items())

    def moved_bytes(self, schedule: Schedule) -> int:
        """What ``schedule`` moves out of memory; as much comes back."""
        return sum(self.activation[action.layer] for action in schedule if action.kind is OFFLOAD)

    def peak_bytes(self, schedule: Schedule) -> int:
        """The most bytes alive at once under ``schedule``."""
        return max(moment.peak_bytes for moment in timeline(schedule, self))


class Moment(NamedTuple):
    """Bytes alive after an action, by what they are, and ``workspace``: how many more there were at its worst."""

    action: Action
    parameters: int
    optimizer: int
    gradients: int  # of the parameters, with buffers that sum them, and the one that is passed down
    checkpoints: int  # activations from which others are computed again
    segment: int  # activations, and what layers saved, that wait for their own backward pass (or move: up, out, back)
    workspace: int

    @property
    def peak_bytes(self) -> int:
        """The most that is alive during the action."""
        return sum(self[1:])


def timeline(schedule: Schedule, chain: Chain) -> list[Moment]:
    """What is alive during and after each action of ``schedule``."""
    restarted = _restarted(schedule)
    last_forward = {action.layer: i for i, action in enumerate(schedule) if action.kind is FORWARD}
    gradients_kept = chain.kept
    held: dict[int, int] = {}  # layer -> bytes of its activation and of what it saved
    checkpoints = segment = kept = 0
    passed = chain.gradient[chain.depth] if chain.gradient_given else 0
    moments = []
    saving = set[int]()  # layers that hold what they saved, their input among it
    saved_inputs: dict[int, int] = {}  # such a layer -> bytes of its input, which the schedule has let go
    made: dict[int, int] = {}  # layer -> index of the action that made the activation held
    overlapping = chain.overlapping and schedule.offload_to != "disk"
    on_the_way = _moving(schedule, chain.activation) if overlapping else repeat(0, len(schedule))
    for i, (action, moving) in enumerate(zip(schedule, on_the_way, strict=True)):
        kind, layer = action
        before = checkpoints + segment + kept + passed + moving
        if kind is FORWARD:
            saved = chain.saved[layer] if last_forward[layer] == i else 0
            held[layer], made[layer] = chain.activation[layer] + saved, i
            if last_forward[layer] == i and layer in chain.saves_input:
                saving.add(layer)
            peak = before + chain.activation[layer] + max(saved, chain.forward_bytes[layer])
            change = held[layer]
        elif kind is FETCH:
            change = held[layer] = chain.activation[layer]
            peak = 0  # no more than is there afterwards
        else:
            change = -held.pop(layer)
            peak = 0  # to drop or to offload takes nothing; backward: below
        if made[layer] in restarted:
            checkpoints += change
        else:
            segment += change
        if kind in (DROP, OFFLOAD) and layer + 1 in saving:  # no more than a name is let go
            saved_inputs[layer + 1] = chain.activation[layer]
            segment += chain.activation[layer]
        if kind is BACKWARD:
            peak = before + chain.backward_bytes[layer]
            if layer == chain.depth and not chain.gradient_given:  # the loss makes the first gradient
                peak = before + max(chain.loss_bytes, chain.gradient[layer] + chain.backward_bytes[layer])
            kept = gradients_kept[layer]
            passed = chain.gradient[layer - 1] if layer > 1 else 0
            saving.discard(layer)
            segment -= saved_inputs.pop(layer, 0)
        alive = checkpoints + segment + kept + passed + moving
        moments.append(
            Moment(
                action,
                chain.parameters,
                chain.optimizer,
                chain.accumulated + chain.communication + kept + passed,
                checkpoints,
                segment + moving,
                max(peak - alive, 0) + chain.small,
            )
        )
    return moments


def _moving(schedule: Iterable[Action], activation: Sequence[int]) -> Iterator[int]:
    """Bytes that are on their way out of memory, or back ahead of need, after each action: see `npnet.transfers`."""
    out: list[int] = []
    leaving = ahead = 0  # layers; 0 is none, and A_0 = 0
    for kind, layer in schedule:
        if kind is OFFLOAD:
            out.append(layer)
            leaving = layer
        elif kind is FETCH:
            out.remove(layer)
            leaving, ahead = 0, 0 if ahead == layer else ahead
            if out and not ahead:
                ahead = out[-1]
        yield activation[leaving] + activation[ahead]


def _restarted(schedule: Schedule) -> set[int]:
    """The indices of forward actions whose activation is a checkpoint: the next layer is run from it more than once."""
    made: dict[int, int] = {}
    runs: dict[int, int] = {}
    restarted = set()
    for i, (kind, layer) in enumerate(schedule):
        if kind is not FORWARD:
            continue
        made[layer], runs[layer] = i, 0
        if layer > 1:
            runs[layer - 1] += 1
            if runs[layer - 1] > 1:
                restarted.add(made[layer - 1])
    return restarted
