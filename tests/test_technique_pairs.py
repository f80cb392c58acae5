"""Every pair of techniques together: gradients as promised, and the peak within what was predicted."""

from itertools import combinations, pairwise

import numpy as np
import pytest

import npnet
from npnet import Dense, Dropout, Linear, Residual, Sequential, schedules
from npnet.checkpoint import checkpoint
from npnet.layer import needs_saved
from npnet.optimal import smallest_budget
from npnet.random import _state, one_step
from npnet.step import accumulated_step
from tests import test_precision as precision

TECHNIQUES = ["dropout", "accumulation", "mixed precision", "schedule", "parts", "planner"]
PAIRS = list(combinations(TECHNIQUES, 2))
SAMPLES, CUT = 1200, [0, 400, 800, 1200]


class Kept(npnet.Optimizer):
    """Keeps the gradients, and updates nothing."""

    def __init__(self):
        super().__init__(0.0)
        self.seen = []

    def _update(self, parameter, gradient):
        self.seen.append((parameter, gradient))


def model_of(names, part):
    """Dense layers, a residual connection, and what the techniques add; ``part`` may checkpoint two of its parts."""
    rng = np.random.default_rng(0)
    drop = (lambda: [Dropout(0.3, rng=rng)]) if "dropout" in names else list
    inner = Sequential(Linear(48, 48, rng=rng), npnet.GELU("tanh"), *drop(), Linear(48, 48, rng=rng))
    layers = [Dense(16, 48, "tanh", rng=rng), *drop(), npnet.LayerNorm(48), part(Residual(inner))]
    layers += [part(Sequential(Dense(48, 48, "tanh", rng=rng), *drop())), *(Dense(48, 48, rng=rng) for _ in range(4))]
    model = Sequential(*layers, Linear(48, 3, rng=rng))
    return npnet.mixed_precision(model) if "mixed precision" in names else model


def data():
    rng = np.random.default_rng(1)
    return rng.standard_normal((SAMPLES, 16)).astype(np.float32), rng.random((SAMPLES, 3)).astype(np.float32)


def gradients(model, schedule, cuts, optimizer=None):
    """The loss and all gradients of a step that always has the same number, so that dropout drops the same."""
    x, y = data()
    _state.next_step = 77
    optimizer = optimizer or Kept()
    batches = [(x[a:b], y[a:b]) for a, b in pairwise(cuts)]
    value = accumulated_step(model, npnet.MeanSquaredError(), optimizer, schedule, batches, SAMPLES)
    if isinstance(optimizer, Kept):
        seen = {id(parameter): gradient for parameter, gradient in optimizer.seen}
        return value, [seen[id(parameter)] for parameter in model.parameters()]
    return value, []


def planned(model, batch, steps):
    """A plan for the budget in the middle between the least and the most."""
    options = {"loss": npnet.MeanSquaredError(), "accumulation_steps": steps}
    plain = npnet.plan(model, batch, **options)
    budget = (plain.peak_bytes + smallest_budget(plain.chain)[0] + plain.chain.fixed) // 2
    return npnet.plan(model, batch, memory_budget=budget, **options)


@pytest.mark.parametrize("names", PAIRS, ids=" and ".join)
def test_two_techniques_together_keep_their_promises(names, monkeypatch):
    monkeypatch.setattr(npnet.planner, "MOST_CELLS", 300_000)  # sizes are rounded, and the schedule is found soon
    monkeypatch.setattr(_state, "next_step", 77)
    cuts = CUT if "accumulation" in names else [0, SAMPLES]
    plain = model_of(names, lambda layer: layer)
    saving = needs_saved(plain.layers)
    depth = len(plain.layers)
    value, expected = gradients(plain, schedules.none(depth, saving), cuts)
    assert np.isfinite(value)
    assert all(gradient.any() and gradient.dtype == np.float32 for gradient in expected)

    model = model_of(names, checkpoint if "parts" in names and "mixed precision" not in names else lambda layer: layer)
    if names == ("mixed precision", "parts"):  # of layers that store in half, as they are
        model = Sequential(*model.layers[:2], checkpoint(Sequential(*model.layers[2:5])), *model.layers[5:])
    depth, saving = len(model.layers), needs_saved(model.layers)
    tried = [schedules.none(depth, saving), schedules.every_nth(depth, 2, saving), schedules.revolve(depth, 3, saving)]
    if "planner" in names:
        plan = planned(model, cuts[1], len(cuts) - 1)
        assert plan.schedule.extra_forwards
        tried.append(plan.schedule)
    for schedule in tried:
        found = gradients(model, schedule, cuts)
        assert found[0] == value
        assert all(map(np.array_equal, found[1], expected))

    if "accumulation" in names and "dropout" not in names:  # whose masks are other ones for a large batch
        large = gradients(plain, schedules.none(depth, needs_saved(plain.layers)), [0, SAMPLES])
        rel = 1e-2 if "mixed precision" in names else 1e-4
        assert value == pytest.approx(large[0], rel=rel)
        for ours, theirs in zip(expected, large[1], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=rel * np.abs(theirs).max())
    if "dropout" in names:
        other = gradients(model, tried[0], cuts)
        assert other[0] == value
        _state.next_step += 1
        x, y = data()
        assert npnet.add_gradients(model, npnet.MeanSquaredError(), x, y) != value
    if "planner" in names:
        step = model, plan.schedule, cuts, npnet.SGD(0.0)
        gradients(*step)
        traced = npnet.measure_peak(gradients, *step).increase_bytes - sum(array.nbytes for array in data())
        allowed = plan.memory_budget - plan.chain.parameters - plan.chain.optimizer
        assert 0.5 * allowed < traced <= allowed + 0.01 * plan.memory_budget + 128 * 1024


def test_a_part_whose_output_is_stored_in_half_has_the_gradients_of_the_part_that_is_not_checkpointed():
    found = []
    for part in (lambda layer: layer, checkpoint):
        model = model_of(["mixed precision"], part)
        found.append(gradients(model, schedules.none(len(model.layers), needs_saved(model.layers)), [0, SAMPLES])[1])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-2 * np.abs(theirs).max())
    assert all(map(np.array_equal, *found))


# A scaler, with all the rest.

ENTROPY = npnet.SoftmaxCrossEntropy()


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_scaling_by_a_power_of_two_changes_no_bit_where_nothing_over_or_underflows(half, clip_norm):
    if half == "bfloat16":
        pytest.importorskip("ml_dtypes")
    found, (x, y) = [], precision.batch_of()
    for scaler in (None, npnet.GradScaler(2.0**12, growth_interval=2)):
        model, optimizer = npnet.mixed_precision(precision.model_of("dropout"), half), npnet.Adam(0.01)
        options, values = {"clip_norm": clip_norm, "scaler": scaler}, []
        for step in range(4):
            parts = [(x[:32], y[:32]), (x[32:], y[32:])]
            with one_step(step):
                values.append(accumulated_step(model, ENTROPY, optimizer, precision.plain(model), parts, 64, **options))
        found.append([*precision.weights(model), np.array(values)])
    assert precision.same(*found)
    assert scaler.state_dict() == {"scale": 2.0**14, "good_steps": 4, "skipped_steps": 0}


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"accumulation_steps": 2}, {"schedule": "sqrt"}], ids=str)
def test_training_survives_an_overflow_and_then_learns(options, products):
    model = npnet.mixed_precision(precision.model_of("mixed"), "float16", products)
    (x, y), scaler, optimizer, before = precision.batch_of(), npnet.GradScaler(2.0**130), npnet.Adam(0.01), []
    before = precision.weights(model)
    clip = {"clip_norm": options.get("clip_norm")}
    value = accumulated_step(model, ENTROPY, optimizer, precision.plain(model), [(x, y)], 64, scaler=scaler, **clip)
    assert value == pytest.approx(float(ENTROPY(model.predict(x), y)), rel=1e-5)
    assert precision.same(precision.weights(model), before)
    assert not optimizer._state
    assert [parameter.gradient for parameter in model.parameters()] == [None] * len(before)
    assert scaler.state_dict() == {"scale": 2.0**129, "good_steps": 0, "skipped_steps": 1}
    settings = {"loss": ENTROPY, "epochs": 150, "batch_size": 16, "rng": 0, "log": False, **options}
    history = npnet.fit(model, (x, y), optimizer=optimizer, scaler=scaler, **settings)
    assert 1 < scaler.skipped_steps < 150
    assert scaler.good_steps
    assert history.epochs[-1].loss < 0.5 * history.epochs[0].loss
    assert all(np.isfinite(weight).all() for weight in precision.weights(model))


@pytest.mark.parametrize("number", range(6))
def test_a_layer_that_stores_in_half_takes_what_it_says(number):
    layer = npnet.mixed_precision(precision.model_of("mixed", 128)).layers[number]
    x = np.ones((2000, 128), np.float32 if number == 0 else np.float16)
    cost = layer.cost(x.shape, np.dtype(np.float32), needs_dx=number > 0)
    gradient = np.ones(cost.output_shape, np.float32)
    layer.backward_(gradient.copy(), layer.forward(x)[1], number > 0)  # what is made once is there then
    run = npnet.measure_peak(layer.forward, x)
    npnet.SGD(0.0).zero_grad(layer.parameters())
    back = npnet.measure_peak(layer.backward_, gradient.copy(), run.result[1], number > 0).increase_bytes
    assert run.increase_bytes == pytest.approx(cost.output_bytes + cost.forward_bytes, abs=128 * 1024)
    assert back == pytest.approx(cost.backward_bytes, abs=128 * 1024)
    assert gradient.nbytes == cost.dy_bytes


@pytest.mark.parametrize("products", [False, True])
def test_gradients_add_up_in_single_precision(products):
    model, (x, y) = npnet.mixed_precision(precision.model_of("mixed"), "float16", products), precision.batch_of()
    halves = [npnet.value_and_grad(model, ENTROPY, x[rows], y[rows])[1] for rows in (slice(32), slice(32, 64))]
    for rows in (slice(32), slice(32, 64)):
        npnet.add_gradients(model, ENTROPY, x[rows], y[rows])
    for name, parameter in model.named_parameters().items():
        assert np.array_equal(parameter.gradient, halves[0][name] + halves[1][name])
        assert parameter.gradient.dtype == parameter.value.dtype == np.float32
