"""What training steps cost, measured: time, peak bytes, and bytes action by action."""

import copy
import functools
import math
import statistics
import time
import tracemalloc
from collections.abc import Iterable
from dataclasses import dataclass

from npnet.backend import Array, array_module, backend_of
from npnet.checks import check_flag, check_kind, check_number, check_whole
from npnet.layer import Layer, Saved, needs_saved
from npnet.layers import Sequential
from npnet.losses import Loss
from npnet.memory import measuring, peak_of, tracing
from npnet.optimizers import Optimizer
from npnet.parameter import Parameter
from npnet.schedule import BACKWARD, FORWARD, Schedule
from npnet.schedules import as_schedule
from npnet.step import train_step


@dataclass(frozen=True)
class StepCost:
    """What a training step costs.

    ``ratio`` is the median of the ratios, round by round, to the first schedule measured: it holds when the machine is
    busy. ``peak_bytes`` counts all that npnet allocates for training (parameters, optimizer state, gradients,
    activations), not the caller's data. ``rounds`` is how many times are behind each median.
    """

    schedule: str
    seconds: float
    ratio: float
    peak_bytes: int
    extra_forwards: int
    rounds: int


def step_costs(
    model: Sequential,
    loss: Loss,
    optimizer: Optimizer,
    schedules: Iterable[Schedule],
    x: Array,
    y: Array,
    rounds: int = 60,
    *,
    seconds: float | None = None,
    log: bool = False,
) -> list[StepCost]:
    """Measure training steps on copies of the model: median times, untraced, of ``rounds`` rounds in which every
    schedule takes one step, and the traced peak of building the copy and taking two steps.

    Times mean little while other threads work, or while tracemalloc traces for you: that is not stopped.

    Args:
        seconds: begin no round that would end later than so many after the call, as long as the one before took; the
            first is taken in any case.
        log: show a progress bar.

    Raises:
        RuntimeError: another measurement is running.
    """
    from tqdm.auto import tqdm

    start = time.perf_counter()
    check_kind(model, Sequential, "model", "mlp([784, 30, 10])")
    check_kind(optimizer, Optimizer, "optimizer", "Adam(1e-3)")
    check_kind(schedules, Iterable, "schedules", "[npnet.schedules.none(3)]")  # type: ignore[type-abstract]
    plans = [check_kind(each, Schedule, "schedules", "npnet.schedules.none(3)") for each in schedules]
    backend, xp = backend_of(x).name, array_module(x)
    wait = xp.cuda.runtime.deviceSynchronize if hasattr(xp, "cuda") else lambda: None  # it goes on behind the calls
    rounds = check_whole(rounds, "rounds", least=1)
    end = math.inf if seconds is None else start + check_number(seconds, "seconds")
    log = check_flag(log, "log")

    def own_copy() -> tuple[Sequential, Optimizer]:
        layouts = {
            id(array): array.copy(order="K") for array in optimizer.held(model.parameters())
        }  # CuPy forgets them
        own_model, own_optimizer = copy.deepcopy((model, optimizer), layouts)
        own_optimizer.learning_rate = 0.0  # the same arithmetic, and no number of steps diverges
        return own_model, own_optimizer

    def two_steps(plan: Schedule) -> None:
        own_model, own_optimizer = own_copy()
        for _ in range(2):  # the optimizer allocates its state in the first
            train_step(own_model, loss, own_optimizer, plan, x, y)

    def timed(plan: Schedule, own_model: Sequential, own_optimizer: Optimizer) -> float:
        start = time.perf_counter()
        train_step(own_model, loss, own_optimizer, plan, x, y)
        wait()
        return time.perf_counter() - start

    times: list[list[float]] = []  # a round, and in it a schedule
    peaks = []
    most = "" if seconds is None else f", {seconds:g} s at most"
    what = {"desc": f"measuring steps{most}", "unit": "part", "disable": not log, "leave": False}
    # to the end: tracing for somebody else's measurement would slow these steps down
    with tqdm(total=len(plans) + rounds + 1, **what) as bar, measuring():
        for plan in plans:
            peaks.append(peak_of(functools.partial(two_steps, plan), backend).increase_bytes)
            bar.update()
        turns = [(plan, *own_copy()) for plan in plans]
        while len(times) <= rounds and (not times or time.perf_counter() + sum(times[-1]) <= end):
            order = 1 if len(times) % 2 else -1
            times.append([timed(*turn) for turn in turns[::order]][::order])
            bar.update()
    times = times[1:] or times  # the first is warming up, if there is time for another
    return [
        StepCost(
            plan.name,
            statistics.median(each[place] for each in times),
            statistics.median(each[place] / each[0] for each in times),
            peak,
            plan.extra_forwards,
            len(times),
        )
        for place, (plan, peak) in enumerate(zip(plans, peaks, strict=True))
    ]


def measure_timeline(
    model: Sequential, loss: Loss, optimizer: Optimizer, schedule: Schedule, x: Array, y: Array
) -> list[int]:
    """The bytes of one training step, action by action: a number for each action of ``schedule``.

    It is the traced peak during a forward or backward action, and what is left after a drop; all above what was there
    before the step. To be compared with `npnet.Plan.timeline`, less its parameters and optimizer state: take a step
    before, in which the optimizer allocates that. On NumPy only. Trains the model by this one step.

    Raises:
        RuntimeError: as for `measure_peak`; what is said there of other threads holds here, too.
        TypeError, ValueError: as for `npnet.train_step`.
    """
    check_kind(model, Sequential, "model", "mlp([784, 30, 10])")
    check_kind(loss, Loss, "loss", "SoftmaxCrossEntropy()")
    schedule = as_schedule(schedule, len(model.layers), needs_saved(model.layers))
    with measuring(), tracing():
        meter = _Meter()
        last = len(model.layers) - 1
        traced = Sequential(*(_Traced(layer, meter, number == last) for number, layer in enumerate(model.layers)))
        meter.start()
        train_step(traced, _TracedLoss(loss, meter), optimizer, schedule, x, y)
        meter.note()
    samples = iter(meter.samples)
    result: list[int] = []
    alive = 0
    for kind, _ in schedule:
        if kind not in (FORWARD, BACKWARD):
            result.append(alive)
        else:
            peak, alive = next(samples)
            result.append(peak)
    return result


class _Meter:
    """Notes (peak, alive) bytes for each action, when the next one begins: what was dropped in between is gone then."""

    def start(self) -> None:
        self.samples: list[tuple[int, int]] = []
        self.base = tracemalloc.get_traced_memory()[0]
        self.running = False

    def note(self) -> None:
        alive, peak = tracemalloc.get_traced_memory()
        if self.running:
            self.samples.append((peak - self.base, alive - self.base))
        self.running = True
        tracemalloc.reset_peak()


class _Traced(Layer):
    """A layer that tells the meter when it begins to work; the last one's backward action begins with the loss."""

    def __init__(self, layer: Layer, meter: _Meter, last: bool) -> None:
        self.layer, self.meter, self.last = layer, meter, last
        self.output_suffices = layer.output_suffices  # type: ignore[misc]

    def __repr__(self) -> str:
        return repr(self.layer)

    def parameters(self) -> list[Parameter]:
        return self.layer.parameters()

    def forward(self, x: Array) -> tuple[Array, Saved]:
        self.meter.note()
        return self.layer.forward(x)

    def check_gradient(self, dy: Array, y: Array) -> None:
        self.layer.check_gradient(dy, y)

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array | None:
        if not self.last:
            self.meter.note()
        return self.layer.backward_(dy, saved, needs_dx)


class _TracedLoss(Loss):
    """A loss that tells the meter when it begins to work."""

    def __init__(self, loss: Loss, meter: _Meter) -> None:
        self.loss, self.meter = loss, meter

    def value_and_gradient(self, output: Array, target: Array) -> tuple[Array, Array]:
        self.meter.note()
        return self.loss.value_and_gradient(output, target)
