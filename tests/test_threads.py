"""Several threads at once: each training gives, bit for bit, what it gives alone; two measurements do not mix."""

import ast
import os
import random
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import backend as registry
from npnet import checkpoint as engine
from npnet import random as draws
from npnet import schedules
from npnet.activations import Sigmoid
from npnet.checkpoint import checkpoint, checkpoint_sequential
from npnet.memory import measure_peak
from tests.scenarios import fresh_registry as fresh_registry

THREADS = 4
SIZES = [6, 16, 8, 16, 8, 3]
ROOT = Path(__file__).parents[1]
PACKAGE = str(ROOT / "npnet")


def pauses(seed: int) -> Callable[..., Any]:
    """A trace function that has the thread stop at one in ten of npnet's lines, and others go on.

    Left to themselves, threads that are done in milliseconds hardly ever take turns, however short the interval of
    ``sys.setswitchinterval``.
    """
    generator = random.Random(seed)

    def trace(frame: Any, event: str, _: Any) -> Any:
        if event == "call":
            return (
                trace if frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_name == "backward_" else None
            )
        if generator.random() < 0.1:
            time.sleep(1e-6)
        return trace

    return trace


@pytest.fixture(autouse=True)
def eager_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def data(seed: int, samples: int = 48, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, SIZES[0])).astype(dtype)
    return x, np.eye(SIZES[-1], dtype=dtype)[rng.integers(SIZES[-1], size=samples)]


def block(seed: int, width: int = 16) -> npnet.Layer:
    inner = npnet.Linear(width, width, rng=seed), npnet.GELU("tanh"), npnet.Dropout(0.3, rng=seed)
    return npnet.Residual(npnet.Sequential(npnet.LayerNorm(width), *inner))


def with_parts(seed: int) -> npnet.Sequential:
    """Dropout at the top, in a checkpointed part, and in a part of that part."""
    inner = npnet.Sequential(block(seed + 1), checkpoint(block(seed + 2)))
    return npnet.Sequential(
        npnet.Linear(SIZES[0], 16, rng=seed),
        npnet.Dropout(0.2, rng=seed),
        block(seed),
        checkpoint(inner, determinism_check=True),
        npnet.Linear(16, SIZES[-1], rng=seed),
    )


def arrays(model: npnet.Layer) -> list[Any]:
    return [parameter.value for parameter in model.parameters()]


# What is trained: functions of a seed that return all numbers they came to.


def lab(seed: int, **options: Any) -> list[Any]:
    kind = npnet.NetworkWithCheckpointing if options else npnet.Network
    net, pair = kind(SIZES, rng=seed, **options), data(seed, dtype=np.float64)
    before = net.weights
    net.SGD(pair, 5, 8, 3.0, log=False)
    return [*before, *net.weights, *net.biases, net.evaluate(pair)]


def fitted(seed: int, *, model: npnet.Sequential | None = None, **options: Any) -> list[Any]:
    model = with_parts(seed) if model is None else model
    options = {"optimizer": npnet.Adam(0.01), "schedule": "sqrt", "batch_size": 8} | options
    pair = data(seed)
    history = npnet.fit(
        model, pair, loss=npnet.SoftmaxCrossEntropy(), epochs=4, rng=seed, test_data=pair, log=False, **options
    )
    return [*arrays(model), *(epoch.loss for epoch in history.epochs), history.accuracy]


def half(seed: int) -> list[Any]:
    scaler = npnet.GradScaler(2.0**17, growth_interval=3)  # overflows now and then
    model = npnet.mixed_precision(with_parts(seed))
    options = {"optimizer": npnet.SGD(0.1, momentum=0.9), "accumulation_steps": 2, "clip_norm": 1.0}
    return [*fitted(seed, model=model, scaler=scaler, **options), *scaler.state_dict().values()]


def in_segments(seed: int) -> list[Any]:
    model, (x, _) = with_parts(seed), data(seed)
    y, tape = checkpoint_sequential(model, 3, x)
    dx = tape.backward(np.ones_like(y))
    return [y, dx, *(parameter.gradient for parameter in model.parameters())]


def checked(seed: int) -> list[Any]:
    """With the check of what is recomputed, of all parts: it is switched on in this thread alone."""
    return fitted(seed, determinism_check=True, schedule=partial(schedules.every_nth, n=2, needs_saved=range(1, 6)))


def second_order(seed: int) -> list[Any]:
    small, loss, (x, y) = npnet.mlp([6, 5, 3], "tanh", rng=seed), npnet.Quadratic(), data(seed, 16)
    _, gradient = npnet.value_and_grad(small, loss, x, y)
    product = npnet.hessian_vector_product(small, loss, x, y, gradient, schedule="sqrt")
    value, vector = npnet.largest_eigenvalue(small, loss, x, y, rng=seed, iterations=10)
    whole = npnet.hessian(small, loss, x, y)
    losses = [npnet.second_order_step(small, loss, x, y, 0.1, 0.01) for _ in range(5)]
    return [*product.product.values(), value, *vector.values(), whole, *losses, *arrays(small)]


def planned(seed: int) -> list[Any]:
    found = npnet.plan(npnet.Network([20, *[30 + seed] * 12, 10]), 50, memory_budget="400 kB")
    return [found.peak_bytes, found.recompute_flops, [moment.peak_bytes for moment in found.timeline]]


JOBS: dict[str, Callable[[int], list[Any]]] = {
    "lab": lab,
    "lab, every 2": partial(lab, checkpoint_every_nth_layer=2),
    "lab, budget": partial(lab, memory_budget="40 kB"),
    "fit": fitted,
    "fit, plain, clipped": partial(fitted, schedule="none", clip_norm=0.5),
    "half precision": half,
    "segments": in_segments,
    "determinism check": checked,
    "second order": second_order,
    "plan": planned,
}


def run_in_threads(*tasks: Callable[[], Any]) -> list[Any]:
    """What the tasks return, each in a fresh thread, all let go at once; or the first error among them."""
    results: list[Any] = [None] * len(tasks)
    ready = threading.Barrier(len(tasks), timeout=60)

    def work(number: int, task: Callable[[], Any]) -> None:
        try:
            ready.wait()
            if len(tasks) > 1:
                sys.settrace(pauses(number))
            results[number] = task()
        except BaseException as error:
            results[number] = error
        finally:
            sys.settrace(None)

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def alone_and_together(*tasks: Callable[[], list[Any]]) -> list[bool]:
    """Whether each task gives, with all the others at its side, what it gives in a thread of its own."""
    alone = [run_in_threads(task)[0] for task in tasks]
    return list(map(same, alone, run_in_threads(*tasks)))


# Trainings.


@pytest.mark.parametrize("name", JOBS)
def test_four_at_once_give_what_each_gives_alone(name: str) -> None:
    assert all(alone_and_together(*(partial(JOBS[name], seed) for seed in range(THREADS))))


def test_all_kinds_at_once_give_what_each_gives_alone() -> None:
    assert all(alone_and_together(*(partial(job, seed) for seed, job in enumerate(JOBS.values()))))


def test_seeds_matter_and_layers_draw() -> None:
    """Negative control: the numbers compared are those of a training that the seed and the masks decide."""
    for job in JOBS.values():
        assert not same(job(0), job(1))
    for job in (fitted, half, in_segments, checked):
        first, second, other = (run_in_threads(partial(seeded, seed, job))[0] for seed in (5, 5, 6))
        assert same(first, second)
        assert same(first, other)  # every rng= is given: the seed of the thread decides nothing more
        assert not same(first, *run_in_threads(lambda job=job: (npnet.random.new_step(), job(0))[1]))  # other masks


def seeded(seed: int, job: Callable[[int], list[Any]]) -> list[Any]:
    npnet.set_seed(seed)
    return job(0)


def shared_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps numbered by the process, not by the thread."""
    monkeypatch.setattr(
        draws, "_state", types.SimpleNamespace(generator=None, next_step=0, step=None, updates=None, first_row=0)
    )


def shared_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace that is allocated once for all, to save an allocation."""
    buffers: dict[Any, np.ndarray] = {}

    def backward_(self: Sigmoid, dy: np.ndarray, saved: Any, needs_dx: bool = True) -> np.ndarray:
        _, y = saved
        slope = buffers.setdefault((y.shape, y.dtype), np.empty_like(y))
        np.subtract(1, y, out=slope)
        np.multiply(slope, y, out=slope)
        np.multiply(dy, slope, out=dy)
        return dy

    monkeypatch.setattr(Sigmoid, "backward_", backward_)


@pytest.mark.parametrize(("mistake", "job"), [(shared_steps, fitted), (shared_buffer, lab)])
def test_what_threads_would_share_is_caught(mistake: Callable[..., None], job: Any, monkeypatch: Any) -> None:
    """Negative control."""
    mistake(monkeypatch)
    for _ in range(20):  # each time nearly sure
        try:
            if not all(alone_and_together(*(partial(job, seed) for seed in range(THREADS)))):
                return
        except npnet.checkpoint.NondeterministicLayer:  # seen by the check within
            return
    pytest.fail("not caught")


def test_the_check_of_one_thread_is_not_switched_on_in_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the layer draws differs each time: with the check an error, without it none."""

    class Restless(npnet.Layer):
        def forward(self, x: Any) -> Any:
            assert inside.wait(60)
            return x + next(numbers), None

        def backward(self, dy: Any, saved: Any) -> Any:
            return dy.copy()

    inside, done, numbers = threading.Event(), threading.Event(), iter(range(100))

    def check() -> None:
        def hold(*_: Any) -> Any:
            inside.set()
            assert done.wait(60)
            return np.zeros((2, 3))

        engine.backpropagate(
            [npnet.ReLU()], schedules.none(1, [1]), np.ones((2, 3)), hold, determinism_check=True
        )  # in the middle of a checked pass...

    def train() -> None:  # ... another thread has an unchecked one
        try:
            layer = checkpoint(Restless())
            engine.backpropagate([layer], schedules.none(1, [1]), np.ones((2, 3)), np.ones_like)
        finally:
            done.set()

    run_in_threads(check, train)
    inside.clear()
    done.clear()
    monkeypatch.setattr(engine, "_checking", types.SimpleNamespace(always=False))  # negative control: shared by all
    with pytest.raises(npnet.checkpoint.NondeterministicLayer):
        run_in_threads(check, train)


def test_a_pools_threads_train_alike_once_seeded() -> None:
    """A pool's thread has gone through other trainings before, so steps are numbered from 0 by `set_seed`."""
    alone = [run_in_threads(partial(fitted, seed))[0] for seed in range(6)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda seed: (npnet.set_seed(0), fitted(seed))[1], range(6)))
    assert all(map(same, alone, found))


def test_a_forward_pass_may_go_back_in_another_thread() -> None:
    model, (x, _) = with_parts(0), data(0)
    (y, tape), *_ = run_in_threads(lambda: checkpoint_sequential(model, 3, x))
    (dx,) = run_in_threads(lambda: (npnet.random.new_step(), tape.backward(np.ones_like(y)))[1])
    found = [y, dx, *(parameter.gradient for parameter in model.parameters())]
    assert same(found, *run_in_threads(partial(in_segments, 0)))


def test_progress_bars_of_several_threads(capfd: pytest.CaptureFixture[str]) -> None:
    def train(seed: int) -> list[Any]:
        model = npnet.mlp(SIZES, rng=seed)
        options = {"loss": npnet.Quadratic(), "optimizer": npnet.Adam(), "epochs": 3, "batch_size": 8, "rng": seed}
        npnet.fit(model, data(seed), **options)
        return arrays(model)

    assert all(alone_and_together(*(partial(train, seed) for seed in range(THREADS))))
    assert "epoch 3" in capfd.readouterr().err


BLAS = """
import threading, numpy as np, npnet
from functools import partial
rng = np.random.default_rng(0)
x, y = rng.standard_normal((2, 256, 200))

def train(seed, into):
    net = npnet.NetworkWithCheckpointing([200] * 4, 2, rng=seed)
    for _ in range(2):
        net.update_mini_batch((x, y), 0.1)
    into[seed] = [*net.weights, *net.biases]

alone, together = {}, {}
for seed in range(4):
    train(seed, alone)
threads = [threading.Thread(target=train, args=(seed, together)) for seed in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(all(np.array_equal(a, b) for seed in alone for a, b in zip(alone[seed], together[seed], strict=True)))
"""


def test_products_large_enough_for_several_blas_threads() -> None:
    """They are shared out in the same way whoever else computes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    process = subprocess.run(
        [sys.executable, "-c", BLAS], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.stdout == "True\n", process.stderr


# What belongs to the process.


class Cold(np.ndarray):
    """An array type of a backend that takes a while to load."""


def slow_backend() -> registry.Backend:
    time.sleep(0.01)
    return registry.Backend("slow", np, type("Fresh", (Cold,), {}), np.asarray)


def loaded_at_once() -> bool:
    """Whether threads that load a backend at the same time all get one and the same."""
    registry.register_backend("slow", slow_backend)
    found = run_in_threads(*[partial(npnet.get_backend, "slow")] * THREADS)
    first = npnet.get_backend("slow")
    known = registry.backend_of(np.zeros(2).view(first.array_type)) is first
    return known and all(backend is first for backend in found)


def test_a_backend_that_two_threads_load_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(loaded_at_once() for _ in range(5))

    class Last(dict[str, registry.Backend]):
        """Negative control: the last one stays, not the first."""

        def setdefault(self, name: Any, backend: Any) -> Any:
            self[name] = backend
            return backend

    monkeypatch.setattr(registry, "_loaded", Last(registry._loaded))
    assert not all(loaded_at_once() for _ in range(5))


def test_a_backend_may_be_loaded_while_another_thread_asks_whose_an_array_is() -> None:
    """Put in the same order each time by a type that, asked for an instance, has another one registered."""

    class Meanwhile(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            fresh = type("Fresh", (Cold,), {})
            run_in_threads(lambda: registry.register_array_type(registry.Backend("fresh", np, fresh, np.asarray)))
            return False

    odd = Meanwhile("Odd", (), {})
    registry.register_array_type(registry.Backend("odd", np, odd, np.asarray))
    registry.register_array_type(registry.Backend("odder", np, Meanwhile("Odder", (), {}), np.asarray))
    with pytest.raises(TypeError, match="expected an array of 'numpy', got list"):
        registry.backend_of([])


@pytest.mark.parametrize("shared", [registry.ones(np, 5, np.dtype("f4")), registry.scalar(np, 1.0, np.dtype("f4"))])
def test_arrays_that_all_threads_share_cannot_be_written(shared: np.ndarray) -> None:
    with pytest.raises(ValueError, match="read-only"):
        shared += 1
    assert (shared == 1).all()


def test_warnings_are_as_before_when_many_threads_have_read_data() -> None:
    """`warnings.catch_warnings` is the process's: two threads in it leave the filters of one behind."""
    before = list(warnings.filters)
    for _ in range(5):
        run_in_threads(*[npnet.load_diabetes] * 8)
    assert warnings.filters == before


PROCESS_WIDE = {
    *("catch_warnings", "simplefilter", "filterwarnings", "resetwarnings"),
    *("seterr", "set_printoptions", "seed", "set_state", "setrecursionlimit", "setswitchinterval", "setlocale"),
    *("chdir", "umask", "putenv", "freeze", "set_threshold", "use", "register_at_fork"),
}
ON_PURPOSE = {
    ("backend", "global _current"),  # use_backend, as its docstring says
    ("random", "seed"),  # set_seed, as its docstring says
    ("mnist", "seed"),  # the command that trains the exercise's network
    ("random", "set_state"),  # npnet.load puts the stream back that a class of one's own has drawn from
    ("compare", "seed"),  # the exercise's report, which draws the exercise's networks and puts the stream back
    ("compare", "set_state"),
    ("device_ranks", "use"),  # the GPU of a rank: of the thread
    ("launch", "catch_warnings"),  # around the fork of a command under mpiexec, before it has threads of its own
    ("launch", "simplefilter"),
}


def changes_of_the_process(name: str, code: str) -> Iterator[tuple[str, str]]:
    """Where code changes what belongs to all threads: ``global`` statements, calls that are known to."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Global):
            yield from ((name, f"global {variable}") for variable in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PROCESS_WIDE:
            yield name, node.func.attr


def test_the_package_changes_nothing_else_of_the_process() -> None:
    found = set()
    for path in sorted((ROOT / "npnet").glob("*.py")):
        found |= set(changes_of_the_process(path.stem, path.read_text(encoding="utf-8")))
    assert found == ON_PURPOSE
    wrong = "def f():\n    global a\n    a = 1\n    with warnings.catch_warnings():\n        np.seterr(all='ignore')\n"
    assert {what for _, what in changes_of_the_process("x", wrong)} == {"global a", "catch_warnings", "seterr"}


# Measurements.


class Holding(npnet.Quadratic):
    """A loss that waits in its n-th call until it is let go."""

    def __init__(self, call: int) -> None:
        self.inside, self.go, self.left = threading.Event(), threading.Event(), call

    def value_and_gradient(self, output: Any, target: Any) -> Any:
        self.left -= 1
        if not self.left:
            self.inside.set()
            assert self.go.wait(60)
        return super().value_and_gradient(output, target)


PLANS = [schedules.none(5), schedules.every_nth(5, 2)]


def step(loss: npnet.Loss) -> float:
    x, y = data(0)
    return npnet.train_step(npnet.mlp(SIZES, rng=0), loss, npnet.SGD(0.1), PLANS[0], x, y)


def peak(loss: npnet.Loss) -> int:
    return measure_peak(step, loss).increase_bytes


def costs(loss: npnet.Loss) -> Any:
    return npnet.step_costs(npnet.mlp(SIZES, rng=0), loss, npnet.SGD(0.1), PLANS, *data(0), rounds=3)


def timeline(loss: npnet.Loss) -> list[int]:
    return npnet.measure_timeline(npnet.mlp(SIZES, rng=0), loss, npnet.SGD(0.1), PLANS[1], *data(0))


MEASUREMENTS: dict[str, tuple[Callable[[npnet.Loss], Any], int]] = {  # and in which call of the loss to wait
    "peak": (peak, 1),
    "costs, counting bytes": (costs, 3),
    "costs, taking times": (costs, 4 + 2 * 3),
    "timeline": (timeline, 1),
}


@pytest.mark.parametrize("second", [peak, costs, timeline])
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_second_measurement_is_refused_and_the_first_goes_on(name: str, second: Callable[..., Any]) -> None:
    first, call = MEASUREMENTS[name]
    loss, result = Holding(call), list[Any]()
    thread = threading.Thread(target=lambda: result.append(first(loss)), daemon=True)
    thread.start()
    assert loss.inside.wait(60)
    try:
        with pytest.raises(RuntimeError, match="another measurement is running; measure one call at a time"):
            second(npnet.Quadratic())
    finally:
        loss.go.set()
        thread.join(60)
    assert len(result) == 1
    assert not tracemalloc.is_tracing()
    assert second(npnet.Quadratic())  # free again


def test_two_measurements_at_once_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the lock each counts the other's bytes, or stops the other's tracing."""
    inside, done, result = threading.Event(), threading.Event(), list[int]()

    def wait() -> None:
        inside.set()
        assert done.wait(60)

    monkeypatch.setattr(npnet.memory, "_measuring", types.SimpleNamespace(acquire=lambda **_: True, release=int))
    thread = threading.Thread(target=lambda: result.append(measure_peak(wait).increase_bytes), daemon=True)
    thread.start()
    assert inside.wait(60)
    measure_peak(np.zeros, 1_000_000)
    done.set()
    thread.join(60)
    assert result[0] > 8_000_000  # of a function that allocates nothing


@pytest.mark.parametrize("measure", [peak, costs, timeline])
def test_the_users_own_tracing_goes_on(measure: Callable[[npnet.Loss], Any]) -> None:
    tracemalloc.start(7)
    try:
        held = np.zeros(1_000_000, np.uint8)
        expected = measure(npnet.Quadratic())
        assert tracemalloc.is_tracing()
        assert tracemalloc.get_traceback_limit() == 7
        assert tracemalloc.get_traced_memory()[0] > held.nbytes
    finally:
        tracemalloc.stop()
    found = measure(npnet.Quadratic())
    if measure is not costs:  # which has times
        np.testing.assert_allclose(found, expected, atol=8_000)  # traced with seven frames, some objects take more
    assert not tracemalloc.is_tracing()


@pytest.mark.parametrize("measure", [peak, costs, timeline])
@pytest.mark.parametrize("tracing", [False, True])
def test_tracing_that_is_stopped_meanwhile_gives_no_number(measure: Callable[..., Any], tracing: bool) -> None:
    class Stopping(npnet.Quadratic):
        def value_and_gradient(self, output: Any, target: Any) -> Any:
            tracemalloc.stop()
            return super().value_and_gradient(output, target)

    if tracing:
        tracemalloc.start()
    with pytest.raises(RuntimeError, match="tracemalloc was stopped during the measurement"):
        measure(Stopping())
    assert not tracemalloc.is_tracing()
    assert measure(npnet.Quadratic())
