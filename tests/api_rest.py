"""Plans, measurements, data, backends, second derivatives and pictures, called with arguments that are right."""

from pathlib import Path
from typing import Any

import numpy as np

import npnet
from npnet import initializers, plots, schedules
from tests.api_calls import BATCH, DROPPING, EVERY, LOSS, MODEL, SGD, X, Y, call, plots_axes

for name in ("none", "sqrt"):
    call(f"schedules.{name}", getattr(schedules, name), depth=5, needs_saved=[2])
call("schedules.every_nth", schedules.every_nth, depth=5, n=2, needs_saved=[2])
call("schedules.selective", schedules.selective, depth=5, checkpoints=[2, 4], needs_saved=[2])
call("schedules.offloaded", schedules.offloaded, depth=5, n=2, most=1, needs_saved=[2], to="disk")
call("schedules.revolve", schedules.revolve, depth=5, slots=2, needs_saved=[2])
call("schedules.as_schedule", schedules.as_schedule, schedule="sqrt", depth=5, needs_saved=[2])
call("Schedule.for_layers", lambda needs_saved: schedules.sqrt(3).for_layers(needs_saved), needs_saved={2})
call(
    "Schedule", npnet.Schedule, actions=list(schedules.sqrt(3)), depth=3, name="mine", needs_saved=[2], offload_to=None
)
PLANNED = {"network": MODEL, "batch_size": 100, "loss": LOSS, "optimizer": npnet.Adam(), "features": 3}
call("plan", npnet.plan, NotImplementedError, **PLANNED, memory_budget="1 MB", streaming=True, accumulation_steps=1)
call("plan [strategy]", npnet.plan, NotImplementedError, network=DROPPING, batch_size=10, strategy="sqrt")
call("plan [every nth]", npnet.plan, NotImplementedError, network=DROPPING, batch_size=10, every_nth=2)
call("plan [offload]", npnet.plan, NotImplementedError, network=DROPPING, batch_size=10, offload="disk")
call("tradeoff", npnet.tradeoff, NotImplementedError, **PLANNED, streaming=True)
call("summary", lambda **o: str(npnet.summary(**o)), NotImplementedError, network=MODEL, batch_size=2, features=3)
PLAN = npnet.plan(DROPPING, 10)


# Measuring.

MEASURED = {"model": MODEL, "loss": LOSS, "optimizer": SGD}


def uncallable(function: Any) -> Any:
    """What a function raises is its own: here, none is called but ``dict``."""
    return dict if callable(function) else function


call(
    "measure_peak", lambda function, **o: npnet.measure_peak(uncallable(function), **o), function=dict, backend="numpy"
)


def limited(size: Any, backend: Any) -> None:
    """A limit, which NumPy has none of."""
    with npnet.limit_memory(size, backend):
        pass


call("limit_memory", limited, ValueError, size="1 MB", backend="numpy")
call("measure_rss_peak", lambda function: npnet.measure_rss_peak(uncallable(function)), function=dict)
call("measure_timeline", lambda **o: npnet.measure_timeline(**o) and None, **MEASURED, schedule=EVERY, **BATCH)
call(
    "step_costs",
    lambda **o: npnet.step_costs(**o) and None,
    **MEASURED,
    schedules=[EVERY],
    **BATCH,
    rounds=1,
    seconds=9.0,
    log=False,
)


# Data.

DATA = Path(npnet.__file__).parents[1] / "data"
call("load_mnist", npnet.load_mnist, FileNotFoundError, path=str(DATA / "diabetes.csv"), dtype="f4")
call("load_diabetes", npnet.load_diabetes, FileNotFoundError, path=DATA, dtype="f4", standardize=True)
call("one_hot", npnet.one_hot, labels=np.array([0, 2, 1]), classes=3, dtype=np.float32)
call("make_linear", npnet.make_linear, n=5, noise=0.1, low=-1.0, high=2.0, rng=0, dtype="f4")
call("batches", lambda **o: list(npnet.batches(**o)), **BATCH, batch_size=4, rng=0, shuffle=True, drop_last=False)


# Backends and random numbers.

call("array_module", lambda x: npnet.array_module(x).__name__, x=X)
call("available_backends", npnet.available_backends)
call("get_backend", npnet.get_backend, name="numpy")
call("to_backend", npnet.to_backend, x=X, name="numpy")
call("to_host", npnet.to_host, x=X)


def used(name: Any) -> str:
    """The backend chosen, for a moment."""
    with npnet.use_backend(name) as backend:
        return backend.name


def registered(name: Any, load: Any) -> Any:
    """A backend registered, used, and forgotten."""
    from npnet import backend

    before = dict(backend._loaders), dict(backend._loaded), dict(backend._by_type)
    try:
        npnet.register_backend(name, load)
        return npnet.get_backend(name).name
    finally:
        for table, old in zip((backend._loaders, backend._loaded, backend._by_type), before, strict=True):
            table.clear()
            table.update(old)


def seeded(seed: Any) -> Any:
    """What is drawn after set_seed; the state of this process stays."""
    from npnet import random

    before = random._state.generator, random._state.next_step, np.random.get_state()
    try:
        npnet.set_seed(seed)
        return npnet.Dropout().key
    finally:
        random._state.generator, random._state.next_step = before[:2]
        np.random.set_state(before[2])


call("use_backend", used, name="numpy")
call("register_backend", registered, name="mine", load=lambda: npnet.get_backend("numpy"))
call("set_seed", seeded, seed=3)
for name in ("zeros", "normal", "xavier_normal", "xavier_uniform", "kaiming_normal", "kaiming_uniform"):
    call(f"initializers.{name}", getattr(initializers, name), shape=(2, 3), generator=np.random.default_rng(0))
call(
    "initializers.normal [std]",
    lambda **o: initializers.normal((2, 3), np.random.default_rng(0), **o),
    mean=0.0,
    std=1.0,
)
for name in ("xavier_normal", "xavier_uniform"):
    call(
        f"initializers.{name} [gain]",
        lambda gain, name=name: getattr(initializers, name)((2, 3), np.random.default_rng(0), gain=gain),
        gain=2.0,
    )
for name in ("kaiming_normal", "kaiming_uniform"):
    call(
        f"initializers.{name} [mode]",
        lambda name=name, **o: getattr(initializers, name)((2, 3), np.random.default_rng(0), **o),
        mode="fan_out",
        nonlinearity="tanh",
    )
call("initializers.calculate_gain", initializers.calculate_gain, nonlinearity="relu")


# Second derivatives.

CURVED = {"model": npnet.mlp([3, 2, 2], "tanh", rng=0), "loss": LOSS, **BATCH}
VECTOR = {name: array + 1 for name, array in CURVED["model"].state_dict().items()}
call("hessian_vector_product", npnet.hessian_vector_product, **CURVED, vector=VECTOR, schedule="sqrt")
call("gradient_norm_gradient", npnet.gradient_norm_gradient, **CURVED, schedule="sqrt")
call("second_order_step", npnet.second_order_step, **CURVED, learning_rate=0.1, curvature_rate=0.1, schedule="none")
call("hessian", npnet.hessian, **CURVED)
call("largest_eigenvalue", npnet.largest_eigenvalue, **CURVED, iterations=3, tolerance=1e-3, rng=0, schedule="sqrt")


# Pictures.

CURVE = npnet.tradeoff(npnet.mlp([3, 4, 4, 2]), 5)
HISTORY = npnet.History()
COSTS = npnet.step_costs(MODEL, LOSS, SGD, [EVERY], X, Y, rounds=1)


def drawn(function: Any) -> Any:
    """Nothing to compare."""
    return lambda **options: function(**options) and None


call("plots.plot_history", drawn(plots.plot_history), history=HISTORY, ax=None)
call(
    "plots.plot_bars",
    drawn(plots.plot_bars),
    values={"a": 1.0, "b": 2.0},
    ax=None,
    title="t",
    ylabel="y",
    labels=["1", "2"],
)
call("plots.plot_accuracies", drawn(plots.plot_accuracies), accuracies={"a": [0.5, 0.6]}, ax=None)
call("plots.plot_costs", drawn(plots.plot_costs), costs=COSTS, axes=plots_axes())
call("plots.plot_timeline", drawn(plots.plot_timeline), plan=PLAN, measured=None, ax=None)
call("plots.plot_timelines", drawn(plots.plot_timelines), plans=[PLAN], measured=None, axes=None)
call("plots.plot_tradeoff", drawn(plots.plot_tradeoff), tradeoff=CURVE, measured=[(900, 0.25)], ax=None)
call("plots.plot_schedule", drawn(plots.plot_schedule), schedule=EVERY, ax=None)


def animated(**options: Any) -> None:
    """matplotlib warns of an animation that nobody looked at."""
    plots.animate_schedule(**options)._draw_was_started = True


call("plots.animate_schedule", animated, plan=PLAN, ax=None, interval=200)
