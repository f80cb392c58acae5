"""How often a training step waits for the device, counted on the guard: what is documented, and no more."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import schedules
from npnet.checks import all_finite
from npnet.layer import Parameter
from tests.guard import GuardModule
from tests.scenarios import fresh_registry as fresh_registry
from tests.scenarios import guard_module as guard_module

DEPTH = 6
RNG = np.random.default_rng(0)


def data(samples: int) -> Any:
    x = RNG.standard_normal((samples, 5)).astype(np.float32)
    return npnet.to_backend(x, "guard"), npnet.to_backend(np.eye(3, dtype=np.float32)[np.arange(samples) % 3], "guard")


def fitted(steps: int, scaler: bool = False, half: bool = False, batches: int = 1, **options: Any) -> None:
    model = npnet.mlp([5, *[4] * (DEPTH - 1), 3], "tanh", rng=0, backend="guard")
    if half:
        model = npnet.mixed_precision(model, half_products=False)
    options |= {"scaler": npnet.GradScaler()} if scaler else {}
    npnet.fit(
        model, data(10 * steps * batches), loss=npnet.SoftmaxCrossEntropy(), optimizer=npnet.Adam(), epochs=1,
        batch_size=10, accumulation_steps=batches, log=False, **options,
    )  # fmt: skip


def lab(steps: int, **options: Any) -> None:
    sizes = [5, *[4] * (DEPTH - 1), 3]
    network = npnet.NetworkWithCheckpointing(sizes, rng=0, dtype=np.float32, backend="guard", **options)
    network.SGD(data(10 * steps), 1, 10, 0.5, log=False)


LOSS = {"float": 1}
RUNS: dict[str, tuple[Callable[[int], None], dict[str, int]]] = {
    "fit": (fitted, LOSS),
    "fit, every 2": (lambda n: fitted(n, schedule=schedules.every_nth(DEPTH, 2)), LOSS),
    "fit, optimal": (lambda n: fitted(n, memory_budget="100 kB"), LOSS),
    "fit, at the end": (lambda n: fitted(n, streaming=False), LOSS),
    "fit, half": (lambda n: fitted(n, half=True), LOSS),
    "fit, accumulated": (lambda n: fitted(n, batches=3), {"float": 3}),  # the loss of each batch
    "fit, clipped": (lambda n: fitted(n, clip_norm=0.1), {"float": 2}),  # and the norm
    "fit, scaled": (lambda n: fitted(n, scaler=True), {"float": 1, "bool": 1}),  # and whether all are finite
    "fit, all of it": (
        lambda n: fitted(n, batches=2, clip_norm=0.1, scaler=True, half=True), {"float": 3, "bool": 1},
    ),
    "fit, offloaded": (lambda n: fitted(n, schedule="offload"), {"float": 1, "asnumpy": DEPTH - 2}),
    "SGD": (lab, LOSS),
    "SGD, every 2": (lambda n: lab(n, checkpoint_every_nth_layer=2), LOSS),
    "SGD, optimal": (lambda n: lab(n, memory_budget="100 kB"), LOSS),
}  # fmt: skip


def waits(xp: GuardModule, run: Callable[[int], None], steps: int) -> Counter[str]:
    xp.syncs.clear()
    run(steps)
    return Counter(xp.syncs)


@pytest.mark.parametrize("name", RUNS)
def test_a_step_waits_as_often_as_is_documented(xp: GuardModule, name: str) -> None:
    run, expected = RUNS[name]
    few, many = waits(xp, run, 3), waits(xp, run, 13)
    assert many - few == Counter({cause: 10 * count for cause, count in expected.items()})


class Curious(npnet.SGD):
    """An optimizer that looks at each gradient."""

    def _update(self, parameter: Parameter, gradient: Any, *factors: Any) -> None:
        float(gradient.sum())
        super()._update(parameter, gradient, *factors)


def test_a_wait_too_many_is_counted(xp: GuardModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npnet, "Adam", lambda: Curious(0.1))
    assert waits(xp, fitted, 13) - waits(xp, fitted, 3) == {"float": 10 * (1 + 2 * DEPTH)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, None])
@pytest.mark.parametrize("backend", ["numpy", "guard"])
@pytest.mark.usefixtures("xp")
def test_all_are_finite_or_not(backend: str, bad: float | None) -> None:
    arrays = [np.linspace(-1e38, 1e38, 7, dtype=np.float32).reshape(7, 1) for _ in range(3)]  # whose sum overflows
    if bad is not None:
        arrays[1][3, 0] = bad
    assert all_finite(npnet.to_backend(array, backend) for array in arrays) is (bad is None)
    assert all_finite([]) is True
