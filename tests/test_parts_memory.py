"""The memory of parts: of a checkpointed one only the input is kept, and it takes what its cost and the plan say."""

import gc
import weakref

import numpy as np
import pytest

import npnet
from npnet import planner
from npnet.blocks import GELU, Dropout, LayerNorm, Residual
from npnet.checkpoint import checkpoint
from npnet.layers import Dense, Linear, Sequential
from npnet.optimal import smallest_budget
from npnet.step import train_step
from tests.test_checkpoint import taken
from tests.test_parts import Counted, bare

KIB = 1024


pytestmark = pytest.mark.usefixtures("fast_collection")


def batch_of(size, features):
    return np.random.default_rng(size).standard_normal((size, features)).astype(np.float32)


def inverted(rng, inner=bare, outer=bare):
    """Of 128 features in and out, float32, and more in between."""
    return outer(Sequential(inner(Dense(128, 256, rng=rng)), GELU("tanh"), Linear(256, 128, rng=rng)))


EXACT = {
    "dense": lambda rng: Dense(128, 128, "tanh", rng=rng),
    "gelu": lambda rng: GELU("tanh"),
    "inverted": inverted,
    "inverted with a part": lambda rng: inverted(rng, checkpoint),
    "with dropout": lambda rng: Sequential(Dropout(0.4, rng=rng), Dense(128, 128, rng=rng)),
}
MORE_IS_COUNTED = {
    "norm": lambda rng: LayerNorm(128),
    "residual": lambda rng: Residual(Sequential(LayerNorm(128), inverted(rng))),
    "a part": lambda rng: inverted(rng, outer=checkpoint),
    "dropout, with a norm before": lambda rng: Sequential(LayerNorm(128), Dropout(0.4, rng=rng)),
}
INSIDES = [pytest.param(make, id=name) for name, make in EXACT.items()]
INSIDES += [pytest.param(make, id=name) for name, make in MORE_IS_COUNTED.items()]


def test_of_a_part_only_the_input_is_kept():
    alive = []

    class Watched(Counted):
        def forward(self, x):
            y, saved = super().forward(x)
            alive.append(weakref.ref(y))
            return y, saved

    x = batch_of(2, 4)
    y, saved = checkpoint(Sequential(Watched(), checkpoint(Sequential(Watched(), Watched())), Watched())).forward(x)
    assert [ref() is not None for ref in alive] == [False, False, False, True]  # the last is y
    del y
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4
    assert saved.x is x


@pytest.mark.parametrize("make", INSIDES)
def test_what_a_part_takes_is_what_it_says(make):
    part, x = checkpoint(make(np.random.default_rng(0))), batch_of(2000, 128)
    cost = part.cost(x.shape, x.dtype)
    part.backward_(x.copy(), part.forward(x)[1])  # what is made once is there then
    taken([part])
    forward = npnet.measure_peak(part.forward, x).increase_bytes
    saved = npnet.measure_peak(lambda: part.forward(x)[1])
    backward = npnet.measure_peak(part.backward_, x.copy(), saved.result).increase_bytes
    assert (cost.saved_bytes, cost.output_bytes) == (0, x.nbytes)
    assert forward == pytest.approx(cost.output_bytes + cost.forward_bytes, abs=128 * KIB)
    assert backward == pytest.approx(cost.backward_bytes, abs=128 * KIB)


LAYERS = {
    "dense": EXACT["dense"],
    "gelu": EXACT["gelu"],
    "norm": MORE_IS_COUNTED["norm"],
    "residual": MORE_IS_COUNTED["residual"],
    "part": MORE_IS_COUNTED["a part"],
    "part with dropout": lambda rng: checkpoint(EXACT["with dropout"](rng)),
    "dropout": lambda rng: Dropout(0.4, rng=rng),
    "residual of a part": lambda rng: Residual(inverted(rng, outer=checkpoint)),
}
CHAINS = [pytest.param(seed, [*LAYERS][:-1] * 2, id=f"{seed}") for seed in range(6)]
CHAINS += [pytest.param(0, [*LAYERS][-1:] * 6, id="residuals of parts")]


@pytest.mark.parametrize(("seed", "names"), CHAINS)
def test_the_predicted_peak_of_a_mixed_chain_is_the_traced_one(seed, names, monkeypatch):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(planner, "MOST_CELLS", 1_000_000)  # sizes are rounded, and the schedule is found soon
    inputs, batch = int(rng.integers(64, 257)), int(rng.integers(1000, 4001))
    parts = [LAYERS[name](rng) for name in rng.permutation(names)]
    model = Sequential(Dense(inputs, 128, rng=rng), *parts, Linear(128, 10, rng=rng))
    loss, optimizer = npnet.SoftmaxCrossEntropy(), [npnet.SGD(0.0), npnet.Adam(0.0)][seed % 2]
    x, y = batch_of(batch, inputs), np.full((batch, 10), 0.1, np.float32)
    plain = npnet.plan(model, batch, loss=loss, optimizer=optimizer)
    train_step(model, loss, optimizer, plain.schedule, x, y)
    budget = (plain.peak_bytes + smallest_budget(plain.chain)[0] + plain.chain.fixed) / 2
    for options in ({}, {"strategy": "sqrt"}, {"every_nth": 2}, {"memory_budget": budget}):
        plan = npnet.plan(model, batch, loss=loss, optimizer=optimizer, **options)
        traced = npnet.measure_peak(train_step, model, loss, optimizer, plan.schedule, x, y).increase_bytes
        assert plan.peak_bytes - plan.chain.fixed == pytest.approx(traced, abs=0.01 * plan.peak_bytes + 128 * KIB)


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_what_a_layer_takes_is_what_it_says(name, mode, needs_dx):
    layer, x = LAYERS[name](np.random.default_rng(0)).train(mode), batch_of(4000, 128)
    cost = layer.cost(x.shape, x.dtype, needs_dx)
    layer.backward_(x.copy(), layer.forward(x)[1], needs_dx)  # what is made once is there then
    taken([layer])
    forward = npnet.measure_peak(layer.forward, x)
    y, saved = forward.result
    backward = npnet.measure_peak(layer.backward_, x.copy(), saved, needs_dx).increase_bytes
    assert forward.increase_bytes == pytest.approx(y.nbytes + cost.forward_bytes, abs=150 * KIB)
    assert backward == pytest.approx(cost.backward_bytes, abs=150 * KIB)
    assert (y.shape, y.nbytes) == (cost.output_shape, cost.output_bytes)


def test_fit_keeps_to_a_budget_as_in_training_also_with_a_model_that_was_in_eval():
    layers = [layer for seed in range(4) for layer in (Dense(64, 64, rng=seed), Dropout(0.5, rng=seed))]
    model, x, optimizer = Sequential(*layers), batch_of(1000, 64), npnet.SGD(0.1)
    chain = npnet.plan(model, 1000, loss=npnet.Quadratic(), optimizer=optimizer).chain
    budget = smallest_budget(chain)[0] + chain.fixed - 1
    settings = {"loss": npnet.Quadratic(), "optimizer": optimizer, "epochs": 1, "batch_size": 1000, "log": False}
    for mode in (True, False):
        with pytest.raises(npnet.InfeasibleBudget):
            npnet.fit(model.train(mode), (x, x), memory_budget=budget, **settings)
