"""A layer's own state: it changes once a step, whatever is run again, rehearsed, nested, captured or evaluated."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npnet
from npnet import Adam, Buffer, Dense, Dropout, Residual, Sequential, SoftmaxCrossEntropy, schedules
from npnet.checkpoint import backpropagate, checkpoint, checkpoint_sequential
from npnet.failures import rehearse
from npnet.layer import needs_saved
from npnet.step import accumulated_step, lazy_gradient

WIDTH = 5
X = np.random.default_rng(0).standard_normal((12, WIDTH))
Y = np.eye(WIDTH)[np.arange(12) % WIDTH]
LOSS = SoftmaxCrossEntropy()


class Centered(npnet.Layer):
    """y = x - (the running mean of x); counts its steps."""

    def __init__(self, features: int = WIDTH, dtype: Any = "float64") -> None:
        self.features, self.dtype = features, dtype
        self.mean = Buffer(np.zeros(features, dtype))
        self.steps = Buffer(0)

    def forward(self, x: Any) -> Any:
        if self.training:
            self.mean.update(lambda mean: 0.9 * mean + 0.1 * x.mean(axis=0))
            self.steps.update(lambda steps: steps + 1)
        return x - self.mean.value, None

    def backward(self, dy: Any, saved: Any) -> Any:
        return dy * 1


def dense(seed: int, dtype: Any = np.float64) -> Dense:
    return Dense(WIDTH, WIDTH, "tanh", dtype=dtype, rng=seed)


def model_of(dtype: Any = np.float64, wrap: Any = checkpoint) -> Sequential:
    """A layer with state at the bottom, in a block, in a checkpointed part, and twice."""
    twice = Centered(dtype=dtype)
    block = Residual(Sequential(dense(1, dtype), Centered(dtype=dtype), Dropout(0.2, rng=7)))
    part = wrap(Sequential(dense(2, dtype), wrap(Centered(dtype=dtype)), twice))
    return Sequential(Centered(dtype=dtype), dense(0, dtype), block, part, twice, dense(3, dtype))


def state(model: npnet.Layer) -> list[Any]:
    return [each.value.copy() for each in model.named_arrays().values()]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def trained(schedule: Any = "none", epochs: int = 2, batch_size: int = 4, dtype: Any = np.float64, **kw: Any) -> Any:
    wrap = kw.pop("wrap", checkpoint)
    npnet.set_seed(0)
    model = model_of(dtype, wrap)
    if kw.pop("half", False):
        model = npnet.mixed_precision(model)
    npnet.fit(
        model, (X.astype(dtype), Y.astype(dtype)), loss=LOSS, optimizer=Adam(0.01), epochs=epochs,
        batch_size=batch_size, rng=0, schedule=schedule, log=False, **kw,
    )  # fmt: skip
    return model


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not streaming": {"streaming": False},
    "clipped": {"clip_norm": 1e9},
    "accumulated": {"accumulation_steps": 2},
    "evaluated": {"test_data": (X, Y)},
    "checked": {"determinism_check": True},
    "half": {"half": True, "dtype": np.float32, "scaler": npnet.GradScaler()},
    "nothing checkpointed inside": {"wrap": lambda layer: layer},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_state_is_the_same_under_every_schedule_and_counts_batches(options: dict[str, Any]) -> None:
    models = [
        trained(name, **options) for name in ("none", "sqrt", "revolve", lambda depth: schedules.every_nth(depth, 2))
    ]
    assert all(same(state(model), state(models[0])) for model in models)
    counts = [int(each.value) for name, each in models[0].named_buffers().items() if name.endswith("steps")]
    assert sorted(counts) == [6, 6, 6, 12]  # 2 epochs of 3 batches; the layer that stands twice counts both places


def test_the_running_mean_is_that_of_the_formula_batch_by_batch() -> None:
    layer = Centered()
    model = Sequential(layer, dense(0))
    npnet.fit(model, (X, Y), loss=LOSS, optimizer=Adam(0.01), epochs=1, batch_size=4, shuffle=False, log=False)
    expected = np.zeros(WIDTH)
    for rows in (X[:4], X[4:8], X[8:]):
        expected = 0.9 * expected + 0.1 * rows.mean(axis=0)
    assert np.array_equal(layer.mean.value, expected)


def test_a_layer_that_stands_twice_changes_twice_in_the_order_of_the_forward_pass() -> None:
    layer, found = Centered(), []
    for schedule in ("none", "sqrt", "revolve"):
        layer.mean.value = np.zeros(WIDTH)
        model = Sequential(layer, dense(0), dense(1), layer, dense(2))
        npnet.add_gradients(model, LOSS, X, Y, schedule=schedule)
        found.append(layer.mean.value)
        expected = 0.1 * X.mean(axis=0)
        h = model.layers[2](model.layers[1](X))  # all passes of the step see the mean of before it: zeros
        assert np.array_equal(layer.mean.value, 0.9 * expected + 0.1 * h.mean(axis=0))
    assert same(found, [found[0]] * 3)


@pytest.mark.parametrize("schedule", ["none", "sqrt", "revolve"])
def test_a_captured_step_changes_the_state_as_an_eager_one(schedule: str) -> None:
    models = []
    for capture in (False, True):
        npnet.set_seed(0)
        model = Sequential(
            Centered(dtype="float32"), dense(0, "f4"), Residual(Centered(dtype="float32")), dense(1, "f4")
        )
        data = X.astype("f4"), Y.astype("f4")
        npnet.fit(
            model, data, loss=LOSS, optimizer=Adam(0.01), epochs=3, batch_size=5, rng=0, schedule=schedule,
            capture=capture, log=False,
        )  # fmt: skip
        models.append(model)
    assert same(*map(state, models))
    assert int(models[1].layers[0].steps.value) == 9


def test_a_captured_step_follows_state_that_was_replaced() -> None:
    layer = Centered(dtype="float32")
    model, x, y = Sequential(layer, dense(0, "f4")), X.astype("f4"), Y.astype("f4")
    step = npnet.CapturedStep(model, LOSS, npnet.SGD(0.1))
    step(x, y)
    layer.steps.value = np.array(100)
    step(x, y)
    assert int(layer.steps.value) == 101


def test_what_measures_differentiates_or_evaluates_changes_nothing() -> None:
    model = model_of()
    before = state(model)
    model.predict(X)
    rehearse(model.layers, schedules.sqrt(6, needs_saved(model.layers)), X)
    vector = {name: np.ones_like(each.value) for name, each in model.named_parameters().items()}
    npnet.hessian_vector_product(model, LOSS, X, Y, vector)
    npnet.largest_eigenvalue(model, LOSS, X, Y, iterations=2)
    npnet.step_costs(model, LOSS, Adam(0.01), [schedules.none(6, needs_saved(model.layers))], X, Y, rounds=1)
    npnet.failures.first_not_finite(model.layers, X)
    model.eval()
    npnet.add_gradients(model, LOSS, X, Y)
    model.forward(X)
    assert same(state(model), before)


@pytest.mark.parametrize(
    "step",
    [
        lambda model: npnet.add_gradients(model, LOSS, X, Y, schedule="sqrt"),
        lambda model: npnet.value_and_grad(model, LOSS, X, Y, schedule="revolve"),
        lambda model: npnet.train_step(model, LOSS, npnet.SGD(0.0), X, Y, schedule="sqrt"),
        lambda model: npnet.gradient_norm_gradient(model, LOSS, X, Y),
        lambda model: npnet.second_order_step(model, LOSS, X, Y, 0.0, 0.0),
        lambda model: lazy_gradient(Sequential(*model.layers[:2]), Sequential(*model.layers[2:]), LOSS, X, Y),
        lambda model: model.forward(X),
    ],
    ids=["add_gradients", "value_and_grad", "train_step", "gradient_norm", "second_order", "lazy", "forward alone"],
)
def test_each_way_to_take_a_step_counts_it_once(step: Any) -> None:
    model = Sequential(Centered(), dense(0), checkpoint(Residual(Centered())), dense(1))
    step(model)
    assert [int(each.value) for name, each in model.named_buffers().items() if name.endswith("steps")] == [1, 1]


def test_segments_that_are_run_again_by_their_tape_count_once() -> None:
    layers = [Centered(), dense(0), Centered(), dense(1), Centered()]
    y, tape = checkpoint_sequential(layers, 3, X)
    tape.backward(np.ones_like(y))
    assert [int(layer.steps.value) for layer in layers[::2]] == [1, 1, 1]  # type: ignore[union-attr]


class Failing(npnet.Layer):
    """Fails in its backward pass when ``broken``."""

    broken = False

    def forward(self, x: Any) -> Any:
        return x * 1, None

    def backward(self, dy: Any, saved: Any) -> Any:
        if self.broken:
            raise RuntimeError("on purpose")
        return dy * 1


@pytest.mark.parametrize("accumulated", [False, True])
def test_a_step_that_fails_leaves_the_state_as_it_was(accumulated: bool) -> None:
    failing = Failing()
    model = Sequential(failing, Centered(), dense(0))
    npnet.train_step(model, LOSS, npnet.SGD(0.1), X, Y)
    before = [each.value for each in model.buffers()]

    def batches() -> Any:
        if accumulated:
            yield X[:6], Y[:6]
        failing.broken = True
        yield X[6:], Y[6:]

    with pytest.raises(RuntimeError, match="on purpose"):
        accumulated_step(model, LOSS, npnet.SGD(0.1), "none", batches(), 12 if accumulated else 6)
    assert all(each.value is old for each, old in zip(model.buffers(), before, strict=True))


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_state_is_saved_loaded_copied_and_listed(ending: str, tmp_path: Any) -> None:
    model = trained(wrap=lambda layer: layer)
    names = [f"{place}.{name}" for place in ("0", "2.inner.1", "3.1", "3.2") for name in ("mean", "steps")]
    assert list(model.named_buffers()) == names
    assert not model.named_parameters().keys() & model.named_buffers().keys()
    model.save(tmp_path / f"m.{ending}")
    loaded = npnet.load(tmp_path / f"m.{ending}", classes=[Centered])
    fresh = model_of(wrap=lambda layer: layer)
    fresh.load_state_dict(model.state_dict())
    for other in (loaded, fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(state(other), state(model))
    assert set(names) <= model.state_dict().keys()
    with pytest.raises(ValueError, match=r"lacks 0\.mean$"):
        fresh.load_state_dict({name: each for name, each in model.state_dict().items() if name != "0.mean"})
    with pytest.raises(TypeError, match=r"0\.steps: expected real numbers, got dtype float64"):
        fresh.load_state_dict(model.state_dict() | {"0.steps": np.array(2.5)})


def test_a_run_broken_off_and_resumed_ends_with_the_same_state(tmp_path: Any) -> None:
    def run(epochs: int, path: str) -> Any:
        return trained("sqrt", epochs, saver=npnet.Saver(tmp_path / path, every=1, resume=True))

    run(1, "a.npz")
    assert same(state(run(3, "a.npz")), state(run(3, "b.npz")))


def test_a_model_is_evaluated_with_the_state_that_training_left() -> None:
    model = trained()
    before = model.predict(X)
    model.layers[0].mean.value = model.layers[0].mean.value + 1  # type: ignore[attr-defined]
    assert not np.array_equal(model.predict(X), before)


def test_a_plan_counts_the_state() -> None:
    class Wide(Centered):
        def cost(self, shape: Any, dtype: Any, needs_dx: bool = True) -> npnet.LayerCost:
            size = shape[0] * shape[1] * dtype.itemsize
            return npnet.LayerCost(shape, size, backward_bytes=size, keeps_input=False, keeps_output=False)

    width = 50_000
    model = Sequential(Wide(width, "float32"), Wide(width, "float32"))
    x, y = np.ones((2, width), np.float32), np.zeros((2, width), np.float32)
    plan = npnet.plan(model, 2, loss=npnet.MeanSquaredError(), features=width)
    args = model, npnet.MeanSquaredError(), npnet.SGD(0.1), x, y
    npnet.train_step(*args)
    measured = npnet.measure_peak(lambda: npnet.train_step(*args)).increase_bytes
    held = sum(each.value.nbytes for each in model.buffers())
    assert measured + held == pytest.approx(plan.peak_bytes, rel=0.15)  # mean()'s own workspace is on top
    assert plan.chain.parameters == 2 * held


def test_state_that_forward_changes_by_itself_is_refused_by_name() -> None:
    class Careless(Centered):
        def forward(self, x: Any) -> Any:
            self.average = 0.9 * getattr(self, "average", 0) + 0.1 * x.mean(0)
            return super().forward(x)

    for schedule in ("none", "sqrt"):
        model = Sequential(dense(0), Residual(Careless()), dense(1))
        with pytest.raises(npnet.LayerRuleError, match=r"^layer 1\.inner, Careless\(\): forward changes self\.average"):
            npnet.fit(model, (X, Y), loss=LOSS, optimizer=Adam(), epochs=1, batch_size=4, schedule=schedule, log=False)


def test_a_layer_that_counted_by_itself_would_be_seen() -> None:
    """Negative control: without `update`, recomputation counts too."""

    class Counting(Centered):
        def forward(self, x: Any) -> Any:
            self.steps.value = self.steps.value + 1
            return x * 1, None

    counts = []
    for schedule in (schedules.none(4, [2]), schedules.every_nth(4, 3, [2])):
        layers = [dense(0), Counting(), dense(1), dense(2)]
        backpropagate(layers, schedule, X, lambda y: y * 1)
        counts.append(int(layers[1].steps.value))  # type: ignore[union-attr]
    assert counts == [1, 2]


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (lambda mean: mean[:2], ValueError, r"expected an array of shape \(5,\), got \(2,\)"),
        (lambda mean: None, ValueError, r"got NoneType"),
        (lambda mean: mean + 1j, TypeError, "holds float64, the function returned complex128"),
    ],
)
def test_a_new_value_that_does_not_fit_is_refused(function: Any, error: Any, words: str) -> None:
    buffer = Buffer(np.zeros(5))
    with pytest.raises(error, match=words):
        buffer.update(function)
    assert np.array_equal(buffer.value, np.zeros(5))


def test_what_is_no_array_of_numbers_is_no_buffer() -> None:
    for value, words in ((np.array(["a"]), "dtype <U1"), ([1.0], "list"), (None, "NoneType")):
        with pytest.raises(TypeError, match=words):
            Buffer(value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="holds int64, the function returned float64"):
        Buffer(1).update(lambda count: count + 0.5)
    layer = Centered()
    with pytest.raises(TypeError, match=r"Centered\(\): mean is a Buffer; its numbers are mean\.value"):
        layer.mean = np.zeros(5)  # type: ignore[assignment]


def test_a_new_value_is_a_copy_of_what_the_function_returns() -> None:
    buffer, x = Buffer(np.zeros(5)), np.ones(5)
    buffer.update(lambda _: x)
    x *= 2
    assert np.array_equal(buffer.value, np.ones(5))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from("dsr"), min_size=1, max_size=6), st.data())
def test_under_any_schedule_the_state_is_that_of_plain_backpropagation(kinds: list[str], data: st.DataObject) -> None:
    def made() -> Sequential:
        make = {"d": dense, "s": lambda _: Centered(), "r": lambda seed: checkpoint(Residual(Centered()))}
        return Sequential(*(make[kind](seed) for seed, kind in enumerate(kinds)))

    models, depth = [made(), made()], len(kinds)
    chosen = data.draw(st.sets(st.integers(1, depth)))
    saving = needs_saved(models[0].layers)
    for model, schedule in zip(
        models, (schedules.none(depth, saving), schedules.selective(depth, chosen)), strict=True
    ):
        for _ in range(3):
            npnet.train_step(model, LOSS, npnet.SGD(0.1), schedule, X, Y)
    assert same(*map(state, models))
