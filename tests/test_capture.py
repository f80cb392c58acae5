"""A captured step: the same numbers as `train_step`, in the memory that the schedule takes, all or nothing."""

import copy
import pickle
import tracemalloc
from functools import partial

import numpy as np
import pytest

import npnet
from npnet import CapturedStep, Dense, Dropout, LayerNorm, Linear, Residual, Sequential
from npnet.checkpoint import checkpoint
from npnet.layer import needs_saved
from npnet.random import next_step, set_next_step
from npnet.tracing import CannotCapture

FEATURES, OUTPUTS = 12, 5

MODELS = {
    "sigmoid": lambda dtype: npnet.mlp([FEATURES, *[9] * 7, OUTPUTS], "sigmoid", "sigmoid", dtype=dtype, rng=0),
    "tanh": lambda dtype: npnet.mlp([FEATURES, *[9] * 7, OUTPUTS], "tanh", dtype=dtype, rng=0),
    "relu": lambda dtype: npnet.mlp([FEATURES, *[9] * 7, OUTPUTS], dtype=dtype, rng=0),
    "softmax": lambda dtype: npnet.mlp([FEATURES, 9, OUTPUTS], "relu", "softmax", dtype=dtype, rng=0),
    "blocks": lambda dtype: Sequential(
        Linear(FEATURES, 9, dtype=dtype, rng=1),
        LayerNorm(9, dtype=dtype),
        npnet.GELU(),
        Residual(Sequential(Linear(9, 9, dtype=dtype, rng=2), npnet.GELU("tanh"), Linear(9, 9, dtype=dtype, rng=3))),
        npnet.Tanh(),
        Linear(9, OUTPUTS, dtype=dtype, rng=4),
    ),
    "dropout": lambda dtype: Sequential(
        Dense(FEATURES, 9, dtype=dtype, rng=1),
        Dropout(0.3, rng=2),
        Dense(9, 9, dtype=dtype, rng=3),
        Dropout(0.5, rng=4),
        Linear(9, OUTPUTS, dtype=dtype, rng=5),
    ),
    "checkpointed parts": lambda dtype: Sequential(
        Dense(FEATURES, 9, dtype=dtype, rng=1),
        checkpoint(Sequential(Dense(9, 9, dtype=dtype, rng=2), Dropout(0.3, rng=4), Dense(9, 9, dtype=dtype, rng=3))),
        Linear(9, OUTPUTS, dtype=dtype, rng=5),
    ),
    "half storage": lambda dtype: npnet.mixed_precision(
        npnet.mlp([FEATURES, 9, 9, OUTPUTS], "tanh", dtype=dtype, rng=0)
    ),
}
LOSSES = {
    "quadratic": npnet.Quadratic,
    "mean squared": npnet.MeanSquaredError,
    "cross-entropy": npnet.SoftmaxCrossEntropy,
    "bce": npnet.BCEWithLogits,
}
OPTIMIZERS = {
    "sgd": lambda: npnet.SGD(0.1),
    "decay": lambda: npnet.SGD(0.1, weight_decay=0.01),
    "momentum": lambda: npnet.SGD(0.1, momentum=0.9),
    "adam": lambda: npnet.Adam(0.01, weight_decay=0.01),
}


def batch(rows=16, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, FEATURES)).astype(dtype), np.eye(OUTPUTS, dtype=dtype)[rng.integers(0, 5, rows)]


def train(model, loss, optimizer, schedule, captured, batches, rates=()):
    """Losses, parameters and what the optimizer remembers, after a step on each batch."""
    set_next_step(7)
    schedule = npnet.schedules.as_schedule(schedule, len(model.layers), needs_saved(model.layers))
    step = CapturedStep(model, loss, optimizer, schedule)
    losses = []
    for number, (x, y) in enumerate(batches):
        if rates:
            optimizer.learning_rate = rates[number]
        one = step if captured else lambda x, y: npnet.train_step(model, loss, optimizer, schedule, x, y)
        losses.append(one(x, y))
    return losses, model.state_dict(), optimizer.state_dict(model.named_parameters()), next_step(), step


def assert_same(first, second):
    assert first[0] == second[0]
    for a, b in zip(first[1:3], second[1:3], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], strict=True)
    assert first[3] == second[3]


def both(name, loss="quadratic", optimizer="sgd", schedule="none", dtype="float32", rows=(16,) * 4, rates=()):
    batches = [batch(count, dtype, seed) for seed, count in enumerate(rows)]
    results = [
        train(MODELS[name](dtype), LOSSES[loss](), OPTIMIZERS[optimizer](), schedule, captured, batches, rates)
        for captured in (False, True)
    ]
    assert_same(*results)
    return results[1][-1]


@pytest.mark.filterwarnings("ignore:the model ends with softmax")  # as the loss's own does: any activation will do here
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("schedule", ["none", "sqrt", "revolve", "every 1"])
@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_those_of_a_step(name, schedule, dtype):
    if schedule == "every 1":
        depth = len(MODELS[name](dtype).layers)
        schedule = npnet.schedules.every_nth(depth, 1, needs_saved(MODELS[name](dtype).layers))
    assert both(name, "cross-entropy", "adam", schedule, dtype).calls > 20


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_with_every_loss_and_optimizer(loss, optimizer):
    both("relu", loss, optimizer, "sqrt", rates=(0.1, 0.05, 0.2, 0.0))


def test_a_factor_that_is_not_followed_would_be_seen(monkeypatch):
    monkeypatch.setattr("npnet.tracing.Factor.set", lambda *_: None)
    with pytest.raises(AssertionError):
        both("relu")


def test_a_mask_that_is_drawn_once_would_be_seen(monkeypatch):
    monkeypatch.setattr("npnet.tracing.current_step", lambda: 7)
    monkeypatch.setattr("npnet.blocks.current_step", lambda: 7)
    masks = [npnet.blocks.keep_mask(np.ones((4, 5)), 3, 0.5) for _ in range(2)]
    assert np.array_equal(*masks)
    monkeypatch.undo()
    monkeypatch.setattr("npnet.into.draw", lambda key, p, out: np.copyto(out, True))
    with pytest.raises(AssertionError):
        both("dropout")


def test_batches_of_other_sizes_share_the_arena():
    step = both("tanh", "mean squared", "adam", "sqrt", rows=(4, 16, 3, 16, 4))
    alone = both("tanh", "mean squared", "adam", "sqrt")
    assert step.arena_bytes == alone.arena_bytes


@pytest.mark.parametrize("schedule", ["none", "sqrt", "revolve"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_arena_is_at_most_what_the_plan_predicts(schedule, dtype):
    model, optimizer, loss = npnet.mlp([64, *[96] * 15, 10], dtype=dtype, rng=0), npnet.SGD(0.1), npnet.Quadratic()
    rng = np.random.default_rng(0)
    x, y = rng.random((200, 64)).astype(dtype), np.eye(10, dtype=dtype)[rng.integers(0, 10, 200)]
    step = CapturedStep(model, loss, optimizer, schedule)
    step(x, y)
    planned = npnet.plan(model, 200, strategy=step.schedule, loss=loss, optimizer=optimizer)
    transient = planned.peak_bytes - planned.chain.fixed
    rows = 64 * len(model.layers) * 4  # biases' gradients and what rounds sizes up: not in the plan
    assert 0.8 * transient < step.arena_bytes < 1.02 * transient + rows


def test_a_replay_allocates_nothing():
    step = CapturedStep(npnet.mlp([64, *[96] * 9, 10], rng=0), npnet.SoftmaxCrossEntropy(), npnet.Adam(), "sqrt")
    rng = np.random.default_rng(0)
    x, y = rng.random((200, 64), np.float32), np.eye(10, dtype=np.float32)[rng.integers(0, 10, 200)]
    step(x, y)
    tracemalloc.start()
    try:
        step(x, y)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 80_000 < step.arena_bytes  # NumPy's own buffer for casts


def test_a_loss_that_is_not_finite_updates_nothing():
    model, optimizer = MODELS["relu"]("float32"), npnet.Adam()
    step = CapturedStep(model, npnet.Quadratic(), optimizer, "sqrt")
    x, y = batch()
    step(x, y)
    before, remembered = model.state_dict(), copy.deepcopy(optimizer.state_dict(model.named_parameters()))
    bad = x.copy()
    bad[3, 4] = np.inf
    with pytest.raises(npnet.TrainingDiverged, match="layer 0"):
        step(bad, y)
    after = optimizer.state_dict(model.named_parameters())
    for a, b in ((before, model.state_dict()), (remembered, after)):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    step(x, y)


def test_arrays_put_in_their_places_are_seen():
    """Loading, lending and assigning between steps: the step goes on with what is there."""
    x, y = batch()
    results = []
    for captured in (False, True):
        model, optimizer = MODELS["relu"]("float32"), npnet.Adam(0.01)
        schedule = npnet.schedules.none(len(model.layers))
        recorded = CapturedStep(model, npnet.Quadratic(), optimizer, schedule)
        eager = partial(npnet.train_step, model, npnet.Quadratic(), optimizer, schedule)
        step = recorded if captured else eager
        step(x, y)
        state, remembered = model.state_dict(), optimizer.state_dict(model.named_parameters())
        remembered = {name: array.copy() for name, array in remembered.items()}
        step(x, y)
        model.load_state_dict(state)
        step(x, y)
        optimizer.load_state_dict(remembered, model.named_parameters())
        step(x, y)
        parameter = model.parameters()[0]
        lent, parameter.lent = parameter.value, True
        kept = lent.copy()
        step(x, y)
        assert np.array_equal(lent, kept)
        model.eval()
        step(x, y)
        model.train()
        results.append(([step(x, y)], model.state_dict(), optimizer.state_dict(model.named_parameters()), 0))
    assert_same(*results)


def test_a_layers_parameters_are_moved_side_by_side_and_updated_by_one_call():
    model, optimizer = MODELS["relu"]("float32"), npnet.Adam()
    step = CapturedStep(model, npnet.Quadratic(), optimizer)
    before, x, y = model.state_dict(), *batch()
    assert step.listing(x, y).count("sqrt") == len(model.layers)
    assert all(np.array_equal(before[name], array) for name, array in model.state_dict().items())
    for layer in model.layers:
        weight, bias = layer.weight.value, layer.bias.value
        assert weight.base is bias.base is not None
        assert weight.flags.f_contiguous


@pytest.mark.parametrize("how", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))])
def test_a_copy_goes_on_alone(how):
    x, y = batch()
    step = CapturedStep(MODELS["relu"]("float32"), npnet.Quadratic(), npnet.Adam(), "sqrt")
    step(x, y)
    other = how(step)
    losses = [step(x, y) for _ in range(3)]
    assert [other(x, y) for _ in range(3)] == losses
    assert losses[0] > losses[-1]


def test_a_listing_does_not_hide_that_arrays_were_replaced():
    x, y = batch()
    model, optimizer = MODELS["relu"]("float32"), npnet.Adam()
    step, first = CapturedStep(model, npnet.Quadratic(), optimizer), model.state_dict()
    losses = [step(x, y), step(x, y)]
    model.load_state_dict(first)
    step.listing(x, y)
    assert step(x, y) == losses[0]
    assert not np.array_equal(model.state_dict()["0.weight"], first["0.weight"])


def test_parameters_of_a_layer_that_were_updated_a_different_number_of_times():
    results = []
    for captured in (False, True):
        model, optimizer = MODELS["relu"]("float32"), npnet.Adam(0.01)
        train(model, npnet.Quadratic(), optimizer, "none", False, [batch()] * 3)
        parameters = model.named_parameters()
        state = {name: array for name, array in optimizer.state_dict(parameters).items() if "bias" not in name}
        optimizer.load_state_dict(state, parameters)  # the biases begin anew
        results.append(train(model, npnet.Quadratic(), optimizer, "sqrt", captured, [batch()] * 3))
    assert_same(*results)
    assert results[0][2]["steps/0.weight"] == 6 > results[0][2]["steps/0.bias"]


class Idle(npnet.Layer):
    """Has a parameter that gets no gradient."""

    output_suffices = True

    def __init__(self):
        self.weight = npnet.Parameter(np.ones(9, np.float32))

    def forward(self, x):
        y = x + self.weight.value
        return y, (x, y)

    def backward(self, dy, saved):
        return dy * 1


def test_parameters_without_a_gradient_are_not_counted_as_updated(monkeypatch):
    layers = lambda dtype: Sequential(Dense(FEATURES, 9, rng=0), Idle(), Linear(9, OUTPUTS, rng=0))  # noqa: E731
    monkeypatch.setitem(MODELS, "idle", layers)
    both("idle", optimizer="momentum")


def test_two_steps_of_one_model_take_turns():
    x, y = batch()
    model, optimizer = MODELS["relu"]("float32"), npnet.Adam()
    steps = [CapturedStep(model, npnet.Quadratic(), optimizer, schedule) for schedule in ("none", "sqrt")]
    losses = [steps[number % 2](x, y) for number in range(4)]
    assert losses == train(MODELS["relu"]("float32"), npnet.Quadratic(), npnet.Adam(), "none", False, [(x, y)] * 4)[0]


def test_recording_changes_nothing():
    model, optimizer = MODELS["dropout"]("float32"), npnet.Adam()
    before, number = model.state_dict(), next_step()
    step = CapturedStep(model, npnet.Quadratic(), optimizer)
    step._program(*batch())
    assert all(np.array_equal(before[name], array) for name, array in model.state_dict().items())
    assert not optimizer.state_dict(model.named_parameters())
    assert next_step() == number
    assert all(parameter.gradient is None for parameter in model.parameters())


class Peeking(npnet.Layer):
    """Decides by a number."""

    output_suffices = True

    def forward(self, x):
        return (x * 2 if x.sum() > 0 else x * 3), (x, None)

    def backward(self, dy, saved):
        return dy * 2


class Noisy(Peeking):
    """Draws numbers that the engine does not know of."""

    def forward(self, x):
        return x + np.random.default_rng().standard_normal(x.shape).astype(x.dtype), (x, None)


class Replacing(npnet.SGD):
    """Puts new arrays in the parameters' places."""

    def _update(self, parameter, gradient, *factors):
        parameter.value = parameter.value - gradient


class Kept(npnet.Optimizer):
    """Does not say which of its factors change."""

    def _update(self, parameter, gradient, *factors):
        parameter.value -= gradient * self.learning_rate


@pytest.mark.parametrize(
    ("layers", "optimizer", "words"),
    [
        ([Peeking()], npnet.SGD(0.1), "decides by the numbers"),
        ([Noisy()], npnet.SGD(0.1), "makes an array of its own"),
        ([], Replacing(0.1), "replaces a parameter's array"),
        ([], Kept(0.1), "Kept has no method _factors"),
        ([checkpoint(Dropout(0.5), preserve_rng_state=False)], npnet.SGD(0.1), "other random numbers"),
    ],
)
def test_what_cannot_be_captured_is_refused_and_nothing_is_changed(layers, optimizer, words):
    model = Sequential(Dense(FEATURES, 9, rng=0), *layers, Linear(9, OUTPUTS, rng=0))
    before, number = model.state_dict(), next_step()
    step = CapturedStep(model, npnet.Quadratic(), optimizer)
    with pytest.raises(CannotCapture, match=words):
        step(*batch())
    assert next_step() == number
    assert all(np.array_equal(before[name], array) for name, array in model.state_dict().items())
    assert all(
        isinstance(parameter.value, np.ndarray) and parameter.gradient is None for parameter in model.parameters()
    )


def test_a_layer_of_ones_own_is_captured():
    class Scale(npnet.Layer):
        output_suffices = True

        def __init__(self):
            self.weight = npnet.Parameter(np.full(9, 1.5, np.float32))

        def forward(self, x):
            y = np.tanh(x) * self.weight.value
            return y, (x, y)

        def backward(self, dy, saved):
            x, _ = saved
            t = np.tanh(x)
            self.weight.accumulate((dy * t).sum(axis=0))
            return dy * self.weight.value * (1 - t * t)

    MODELS["own"] = lambda dtype: Sequential(Dense(FEATURES, 9, rng=0), Scale(), Linear(9, OUTPUTS, rng=0))
    try:
        both("own", optimizer="momentum", schedule="sqrt")
    finally:
        del MODELS["own"]


@pytest.mark.parametrize(
    ("x", "y", "error"),
    [
        (np.ones((3, FEATURES + 1), np.float32), np.ones((3, OUTPUTS), np.float32), ValueError),
        (np.ones((3, FEATURES), np.float32), np.ones((4, OUTPUTS), np.float32), ValueError),
        (np.ones((3, FEATURES)), np.ones((3, OUTPUTS)), TypeError),
        ([[1.0]], [[1.0]], TypeError),
    ],
)
def test_batches_that_do_not_fit_are_refused_as_by_a_step(x, y, error):
    model = MODELS["relu"]("float32")
    messages = []
    for step in (
        CapturedStep(model, npnet.Quadratic(), npnet.SGD(0.1)),
        lambda x, y: npnet.train_step(model, npnet.Quadratic(), npnet.SGD(0.1), npnet.schedules.none(8), x, y),
    ):
        with pytest.raises(error) as raised:
            step(x, y)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
