"""Mixed precision: half is what is stored, and loss scaling survives what overflows."""

import weakref
from functools import partial

import numpy as np
import pytest

import npnet
from npnet import Dense, Dropout, GradScaler, Linear, Residual, Sequential, mlp, schedules
from npnet.layer import Layer, needs_saved
from npnet.losses import TrainingDiverged
from npnet.random import one_step
from npnet.step import accumulated_step, train_step, value_and_grad

HALVES = ["float16", "bfloat16"]
LOSS = npnet.SoftmaxCrossEntropy()
try:
    import ml_dtypes  # noqa: F401
except ImportError:
    HALVES.remove("bfloat16")
every_half = pytest.mark.parametrize("half", HALVES)


def model_of(kind, width=32, depth=10):
    rng = np.random.default_rng(0)
    if kind == "dense":
        return mlp([width] * depth + [10], "tanh", rng=rng)
    inner = Sequential(Linear(width, width, rng=rng), npnet.GELU("tanh"), Linear(width, width, rng=rng))
    last = [Dropout(0.2, rng=rng)] * (kind == "dropout")
    blocks = [npnet.LayerNorm(width), npnet.GELU("tanh"), Residual(inner), Dense(width, width, "sigmoid", rng=rng)]
    ends = [Dense(width, width, rng=rng), Linear(width, 10, rng=rng)]
    return Sequential(Linear(width, width, rng=rng), *blocks, *last, *ends)


def batch_of(rows=64, width=32):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, width)).astype(np.float32)
    return x, npnet.one_hot(rng.integers(10, size=rows), 10, np.float32)


def plain(model):
    return schedules.none(len(model.layers), needs_saved(model.layers))


def weights(model):
    return [parameter.value.copy() for parameter in model.parameters()]


def same(ours, theirs):
    return len(ours) == len(theirs) > 0 and all(map(np.array_equal, ours, theirs))


# What is stored.


@every_half
@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("kind", ["dense", "mixed", "dropout"])
def test_gradients_are_the_same_bits_under_every_schedule_and_near_those_of_float32(kind, half, products):
    single, (x, y), found = model_of(kind), batch_of(), []
    model = npnet.mixed_precision(single, half, products)
    saving, depth = needs_saved(model.layers), len(model.layers)
    assert saving == needs_saved(single.layers)
    assert all(a is b for a, b in zip(single.parameters(), model.parameters(), strict=True))
    assert list(single.named_parameters()) == list(model.named_parameters())
    for schedule in ["none", "sqrt", "revolve", schedules.every_nth(depth, 2, saving)]:
        with one_step(3):
            found.append(value_and_grad(model, LOSS, x, y, schedule=schedule, determinism_check=True))
        assert found[-1][0] == found[0][0]
        assert same([*found[-1][1].values()], [*found[0][1].values()])
    assert {gradient.dtype for gradient in found[0][1].values()} == {np.dtype(np.float32)}
    with one_step(3):
        value, gradient = value_and_grad(single, LOSS, x, y)
    rel = 2e-2 if products or half == "bfloat16" else 2e-3
    assert 0 < abs(found[0][0] - value) < rel * value
    for name, expected in gradient.items():
        assert 0 < np.linalg.norm(found[0][1][name] - expected) < 10 * rel * np.linalg.norm(expected)


def arrays_in(saved):
    if isinstance(saved, (tuple, list)):
        return [array for part in saved for array in arrays_in(part)]
    return [] if saved is None else [saved]


@every_half
def test_input_and_output_are_kept_in_half_and_once(half):
    model, (x0, _) = npnet.mixed_precision(model_of("dropout"), half), batch_of()
    x, kind = x0, npnet.precision.storage_dtype(half)
    for number, layer in enumerate(model.layers):
        y, saved = layer.forward(x)
        kept = arrays_in(saved)
        own = {np.dtype(np.float32)} if isinstance(layer.inner, (Residual, npnet.LayerNorm)) else set()
        assert {each.dtype for each in kept if each is not x0 and each is not y} <= {kind, np.dtype(bool), *own}
        assert y.dtype == (np.float32 if number == len(model.layers) - 1 else kind)
        big = [array for array in kept if array.shape == x.shape and array.dtype == kind and np.array_equal(array, x)]
        assert all(array is x for array in big)  # and not a copy
        x = y
    assert {parameter.value.dtype for parameter in model.parameters()} == {np.dtype(np.float32)}


class Watched(Layer):
    """y = 2 x, which remembers whether its output is alive, in single precision."""

    output_suffices = True

    def __init__(self):
        self.outputs = []

    def forward(self, x):
        assert x.dtype == np.float32
        y = x * 2
        self.outputs.append(weakref.ref(y))
        return y, (x, y)

    def backward_(self, dy, saved, needs_dx=True):
        assert {array.dtype for array in (dy, *saved)} == {np.dtype(np.float32)}
        return dy * 2


def test_no_single_precision_output_outlives_its_layer_but_the_last():
    layers = [Watched() for _ in range(4)]
    model, (x, _) = npnet.mixed_precision(Sequential(*layers)), batch_of()

    def output_gradient(output):
        assert [layer.outputs[0]() is not None for layer in layers] == [False, False, False, True]
        return output.copy()

    npnet.backpropagate(model.layers, plain(model), x, output_gradient)


def traced(model, plan, x, y, optimizer):
    train_step(model, LOSS, optimizer, plan.schedule, x, y)
    return npnet.measure_peak(train_step, model, LOSS, optimizer, plan.schedule, x, y).increase_bytes


@every_half
@pytest.mark.parametrize("kind", ["dense", "mixed", "dropout"])
@pytest.mark.parametrize("strategy", ["none", "sqrt", "revolve"])
def test_the_peak_is_the_predicted_one_and_smaller_by_what_is_stored_in_half(kind, strategy, half):
    single, (x, y), optimizer = model_of(kind, 128, 24), batch_of(1500, 128), npnet.SGD(0.0)
    peaks = []
    for model in (single, npnet.mixed_precision(single, half)):
        plan = npnet.plan(model, 1500, strategy=strategy, loss=LOSS, optimizer=optimizer)
        predicted, peak = plan.peak_bytes - plan.chain.fixed, traced(model, plan, x, y, optimizer)
        tolerance = 0.01 * plan.peak_bytes + 128 * 1024
        assert peak < predicted + tolerance
        if kind != "dropout":  # of which more is counted
            assert predicted < peak + tolerance
        peaks.append(peak)
    if (kind, strategy) == ("dense", "none"):  # in a shorter chain the arrays in single precision weigh more
        assert 0.5 * peaks[0] < peaks[1] < 0.65 * peaks[0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: npnet.mixed_precision(Linear(2, 2)), TypeError, r"mixed_precision: expected a Sequential, got Linear"),
        (
            lambda: npnet.mixed_precision(mlp([2, 2]), "half"),
            ValueError,
            "dtype: expected 'float16' or 'bfloat16', got",
        ),
        (lambda: GradScaler(-1.0), ValueError, "init_scale: expected a finite number, at least "),
        (lambda: GradScaler(np.inf), ValueError, "init_scale: expected a finite number"),
        (lambda: GradScaler(growth_factor=0.5), ValueError, "growth_factor: expected a finite number, at least 1"),
        (lambda: GradScaler(backoff_factor=1), ValueError, "backoff_factor: .* below 1"),
        (lambda: GradScaler(growth_interval=0), ValueError, "growth_interval: expected a whole number, at least 1"),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# The scaler.


def velocities(optimizer):
    return [state["velocity"].copy() for state in optimizer._state.values()]


def scaled(gradients, scaler):
    """One step with each gradient; the scales, and the weights, after each."""
    parameter, optimizer = npnet.Parameter(np.zeros(2)), npnet.SGD(1.0, momentum=0.5)
    for gradient in gradients:
        parameter.gradient = np.array([gradient, 1.0]) * scaler.get_scale()
        before = (
            parameter.value.copy(),
            [array.copy() for array in (state["velocity"] for state in optimizer._state.values())],
        )
        done = scaler.step(optimizer, [parameter, npnet.Parameter(np.ones(1))])
        scaler.update()
        assert done == np.isfinite(gradient)
        assert parameter.gradient is None
        if not done:
            assert same(
                [parameter.value, *(state["velocity"] for state in optimizer._state.values())], [before[0], *before[1]]
            )
        yield scaler.get_scale(), parameter.value.tolist()


def test_a_scaler_grows_after_good_steps_and_shrinks_and_skips_where_a_gradient_is_not_finite():
    scaler = GradScaler(8.0, 4.0, 0.25, growth_interval=2)
    found = list(scaled([1, 1, np.inf, 1, np.nan, 1, 1], scaler))
    assert [scale for scale, _ in found] == [8, 32, 8, 8, 2, 2, 8]
    assert [weight[0] for _, weight in found] == [-1, -2.5, -2.5, -4.25, -4.25, -6.125, -8.0625]
    assert scaler.state_dict() == {"scale": 8.0, "good_steps": 2, "skipped_steps": 2}
    scaler.update()  # without a step before it does nothing
    assert (scaler.get_scale(), scaler.good_steps) == (8, 2)
    list(scaled([0], largest := GradScaler(2.0**1023, growth_interval=1)))
    assert largest.get_scale() == 2.0**1023


def test_a_scaler_goes_on_from_its_state_and_refuses_one_that_is_none():
    gradients = [1, 1, np.inf, 1, 1, 1, np.inf, 1, 1, 1, 1]
    whole, first, second = (GradScaler(16.0, growth_interval=3) for _ in range(3))
    expected = [scale for scale, _ in scaled(gradients, whole)]
    found = [scale for scale, _ in scaled(gradients[:5], first)]
    second.load_state_dict(first.state_dict())
    assert found + [scale for scale, _ in scaled(gradients[5:], second)] == expected
    state = second.state_dict()
    assert state == whole.state_dict()
    for bad, message in (
        ({"scale": 1.0}, "GradScaler.load_state_dict: missing good_steps, skipped_steps"),
        ({**state, "scale": "1"}, "scale: expected a finite number"),
        ({**state, "good_steps": 1.5}, "good_steps: expected a whole number"),
        ({**state, "skipped_steps": -1}, "skipped_steps: expected a whole number"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            second.load_state_dict({**bad, **({"scale": 3.0} if bad.get("scale") == state["scale"] else {})})
        assert second.state_dict() == state


def test_the_scales_are_those_of_torch():
    torch = pytest.importorskip("torch")
    bad = np.random.default_rng(0).random(60) < 0.15
    ours = GradScaler(2.0**16, 2.0, 0.5, growth_interval=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=3)
    weight = torch.zeros(1, requires_grad=True)
    optimizer, expected = torch.optim.SGD([weight], lr=1.0), []
    for inf in bad:
        optimizer.zero_grad()
        theirs.scale((weight * 1.0).sum()).backward()
        if inf:
            weight.grad.fill_(float("inf"))
        theirs.step(optimizer)
        theirs.update()
        expected.append(theirs.get_scale())
    found = [scale for scale, _ in scaled(np.where(bad, np.inf, 1.0), ours)]
    assert found == expected
    assert len(set(found)) > 3


def test_a_loss_that_is_not_finite_is_still_an_error():
    model, (x, y) = npnet.mixed_precision(model_of("dense")), batch_of()
    model.parameters()[0].value[:] = np.nan
    with pytest.raises(TrainingDiverged):
        accumulated_step(model, LOSS, npnet.SGD(0.1), plain(model), [(x, y)], 64, scaler=GradScaler())


def test_a_scaler_serves_two_optimizers_and_refuses_to_unscale_twice():
    scaler, parameters = npnet.GradScaler(4.0), [npnet.Parameter(np.zeros(2)), npnet.Parameter(np.zeros(2))]
    for parameter in parameters:
        parameter.gradient = np.full(2, 4.0)
    for parameter in parameters:
        assert scaler.step(npnet.SGD(1.0), [parameter])
    assert [parameter.value.tolist() for parameter in parameters] == [[-1.0, -1.0]] * 2
    scaler.unscale(parameters)
    with pytest.raises(RuntimeError, match="unscaled already"):
        scaler.unscale(parameters)


def test_a_product_with_the_hessian_goes_through_stored_activations():
    model, (x, y) = npnet.mlp([4, 3, 2], "tanh", rng=0), (np.ones((3, 4), np.float32), np.ones((3, 2), np.float32))
    _, vector = npnet.value_and_grad(model, npnet.Quadratic(), x, y)
    exact = npnet.hessian_vector_product(model, npnet.Quadratic(), x, y, vector).product
    stored = npnet.hessian_vector_product(npnet.mixed_precision(model), npnet.Quadratic(), x, y, vector).product
    for name, product in exact.items():
        np.testing.assert_allclose(stored[name], product, rtol=0, atol=5e-3 * abs(product).max())


# A loop of one's own.


def by_hand(overflow, recipe, steps=5):
    """Steps of the recipe that everybody writes, with an overflow at some; weights, scales, and what was remembered."""
    model, (x, y), optimizer = model_of("dense", depth=3), batch_of(), npnet.Adam(0.01)
    scaler, parameters, found = GradScaler(2.0**12), model.parameters(), []
    for number in range(steps):
        npnet.add_gradients(model, LOSS, x, y, weight=scaler.get_scale())
        if number in overflow:
            parameters[1].gradient[0] = overflow[number]
        recipe(scaler, optimizer, parameters, number in overflow)
        scaler.update()
        assert all(parameter.gradient is None for parameter in parameters)
        found.append((scaler.get_scale(), weights(model)))
    return found, optimizer.state_dict(model.named_parameters())


def clipped(scaler, optimizer, parameters, overflows):
    finite = scaler.unscale(parameters)
    before = [parameter.gradient.copy() for parameter in parameters]
    norm = npnet.clip_grad_norm(parameters, 0.1)
    assert finite == np.isfinite(norm) == (not overflows)
    if overflows:  # nothing is scaled
        assert all(map(partial(np.array_equal, equal_nan=True), before, [each.gradient for each in parameters]))
    assert scaler.step(optimizer, parameters) == finite


def unclipped(scaler, optimizer, parameters, overflows):
    assert scaler.step(optimizer, parameters) != overflows


def layer_by_layer(scaler, optimizer, parameters, overflows):
    """Unscaled in parts, the overflow in the first; stepped in the other order."""
    halves = parameters[:2], parameters[2:]
    for half in halves:
        scaler.unscale(half)
    for half in reversed(halves):
        assert scaler.step(optimizer, half) != overflows


def all_then_parts(scaler, optimizer, parameters, overflows):
    """Unscaled together; stepped in parts, which must not be unscaled again."""
    scaler.unscale(parameters)
    for half in (parameters[2:], parameters[:2]):
        assert scaler.step(optimizer, half) != overflows


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("recipe", [clipped, unclipped, layer_by_layer, all_then_parts])
def test_an_overflow_in_a_loop_of_ones_own_is_skipped_and_training_goes_on(recipe, value):
    found, remembered = by_hand({1: value, 3: value}, recipe)
    good, expected = by_hand({}, recipe, steps=3)
    assert [scale for scale, _ in found] == [2.0**12, 2.0**11, 2.0**11, 2.0**10, 2.0**10]
    for number, like in enumerate([0, 0, 1, 1, 2]):  # the steps that were not skipped are those without an overflow
        assert all(map(partial(np.allclose, rtol=1e-5, atol=1e-7), found[number][1], good[like][1]))
    assert same(found[1][1], found[0][1])
    assert same(found[3][1], found[2][1])
    assert {name: array for name, array in remembered.items() if name.startswith("steps")} == {
        name: array for name, array in expected.items() if name.startswith("steps")
    }
    assert not same(found[4][1], found[3][1])


@pytest.mark.parametrize("recipe", [layer_by_layer, all_then_parts])
def test_gradients_are_unscaled_once_however_they_are_grouped(recipe):
    expected, found = by_hand({}, unclipped), by_hand({}, recipe)
    assert all(same(a, b) for (_, a), (_, b) in zip(expected[0], found[0], strict=True))


def test_clipping_that_ended_training_would_be_seen(monkeypatch):
    plain = npnet.clip_grad_norm
    monkeypatch.setattr(npnet, "clip_grad_norm", partial(plain, error_if_nonfinite=True))
    with pytest.raises(TrainingDiverged, match="the norm of the gradient is inf"):
        by_hand({1: np.inf}, clipped)


def test_fit_with_a_clipping_norm_still_says_that_a_gradient_is_not_finite():
    model, (x, y) = model_of("dense", depth=3), batch_of()

    class Bad(npnet.SoftmaxCrossEntropy):
        def value_and_gradient(self, output, target):
            value, gradient = super().value_and_gradient(output, target)
            gradient[0] = np.nan
            return value, gradient

    before = weights(model)
    options = {"optimizer": npnet.Adam(), "epochs": 1, "batch_size": 64, "log": False}
    with pytest.raises(TrainingDiverged, match="the norm of the gradient is nan"):
        npnet.fit(model, (x, y), loss=Bad(), clip_norm=1.0, **options)
    assert same(weights(model), before)
    scaler = GradScaler(2.0**12)  # which takes it for an overflow, and skips
    npnet.fit(model, (x, y), loss=Bad(), clip_norm=1.0, scaler=scaler, **options)
    assert same(weights(model), before)
    assert scaler.skipped_steps == 1
