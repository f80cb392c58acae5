"""Layers of one's own that break a rule: refused by name in the first step, and nothing of the user's is changed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import (
    Adam,
    Dense,
    Dropout,
    Layer,
    LayerRuleError,
    Linear,
    Parameter,
    Residual,
    Sequential,
    SoftmaxCrossEntropy,
)
from npnet.checkpoint import NondeterministicLayer, backpropagate, checkpoint
from npnet.layer_rules import has_foreign_layers, watched
from npnet.model_tree import all_layers
from npnet.step import accumulated_step, lazy_gradient

X, Y = np.random.default_rng(0).random((64, 8)).astype("f4"), np.eye(3, dtype="f4")[np.arange(64) % 3]
LOSS = SoftmaxCrossEntropy()


class Scaled(Layer):
    """y = 1.5 x, as it should be written."""

    def forward(self, x: Any) -> Any:
        return x * np.float32(1.5), None

    def backward(self, dy: Any, saved: Any) -> Any:
        return dy * np.float32(1.5)


class ScalesItsInput(Scaled):
    def forward(self, x: Any) -> Any:
        x *= 1.5
        return x, None


class ScalesAView(Scaled):
    def forward(self, x: Any) -> Any:
        np.multiply(x[:, :2], 2, out=x[:, :2])
        return x * 1, None


class SortsItsInput(Scaled):
    def forward(self, x: Any) -> Any:
        x.sort(axis=0)
        return x * 1, None


class ChangesSaved(Scaled):
    def forward(self, x: Any) -> Any:
        return x * np.float32(1.5), {"input": [x]}

    def backward(self, dy: Any, saved: Any) -> Any:
        saved["input"][0][:] = 0
        return dy * np.float32(1.5)


class OwnNumbers(Scaled):
    """Draws a mask from a generator that it keeps."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def forward(self, x: Any) -> Any:
        mask = (self.generator.random(x.shape) > 0.5).astype(x.dtype)
        return x * mask, mask

    def backward(self, dy: Any, saved: Any) -> Any:
        return dy * saved


class GlobalNumbers(OwnNumbers):
    def forward(self, x: Any) -> Any:
        mask = (np.random.random(x.shape) > 0.5).astype(x.dtype)
        return x * mask, mask


class CountsCalls(Scaled):
    """Scales by how often it was called."""

    def __init__(self) -> None:
        self.strength = 1.0

    def forward(self, x: Any) -> Any:
        self.strength *= 0.9
        return x * np.float32(1.5), None


class RunningMeanInPlace(Scaled):
    def __init__(self) -> None:
        self.stats = {"mean": np.zeros(8, np.float32)}

    def forward(self, x: Any) -> Any:
        self.stats["mean"] += x.mean(axis=0)
        return x * np.float32(1.5), None


class ReturnsItsWorkspace(Scaled):
    def __init__(self) -> None:
        self.workspace = np.zeros((64, 8), np.float32)

    def forward(self, x: Any) -> Any:
        return np.multiply(x, 1.5, out=self.workspace[: len(x)]), None


class LendsDy(Scaled):
    """Its gradient is a view of dy, which the layers below overwrite."""

    def __init__(self) -> None:
        self.weight = Parameter(np.zeros((1, 8), np.float32))

    def forward(self, x: Any) -> Any:
        return x + self.weight.value, None

    def backward(self, dy: Any, saved: Any) -> Any:
        self.weight.accumulate(dy[:1])
        return dy


class ReturnsSaved(Scaled):
    def forward(self, x: Any) -> Any:
        return x * np.float32(1.5), x

    def backward(self, dy: Any, saved: Any) -> Any:
        return saved


class OutputAlone(Scaled):
    def forward(self, x: Any) -> Any:
        return x * np.float32(1.5)


BROKEN: dict[str, tuple[type[Layer], type[Exception], str]] = {
    "input": (
        ScalesItsInput,
        LayerRuleError,
        r"forward changes its input \(test_layer_rules\.py, line \d+: x \*= 1\.5\)",
    ),
    "view": (ScalesAView, LayerRuleError, r"forward changes its input \(.*np\.multiply"),
    "sort": (SortsItsInput, LayerRuleError, r"forward changes its input \(.*x\.sort"),
    "saved": (ChangesSaved, LayerRuleError, r"backward_? changes what forward saved \(.*\[:\] = 0\)"),
    "own numbers": (OwnNumbers, NondeterministicLayer, r"gave other numbers; .* npnet\.random\.draws"),
    "global numbers": (GlobalNumbers, NondeterministicLayer, r"gave other numbers; .* npnet\.random\.draws"),
    "calls": (CountsCalls, LayerRuleError, r"forward changes self\.strength each time .*npnet\.Buffer"),
    "mean in place": (RunningMeanInPlace, LayerRuleError, r"forward changes self\.stats\['mean'\] each time"),
    "workspace": (ReturnsItsWorkspace, LayerRuleError, r"returns an array that the layer keeps \(self\.workspace\)"),
    "dy": (LendsDy, LayerRuleError, r"adds to weight shares its memory with dy.*self\.weight\.accumulate"),
    "returns saved": (ReturnsSaved, LayerRuleError, r"returns an array that shares its memory with what forward saved"),
    "output alone": (OutputAlone, TypeError, r"forward must return a pair \(y, saved\)"),
}

PLACES: dict[str, Callable[[Layer], tuple[Sequential, str]]] = {
    "first": lambda layer: (Sequential(layer, Dense(8, 8, rng=0), Dense(8, 8, rng=1), Linear(8, 3, rng=2)), "0"),
    "third": lambda layer: (Sequential(Dense(8, 8, rng=0), Dense(8, 8, rng=1), layer, Linear(8, 3, rng=2)), "2"),
    "in a block": lambda layer: (
        Sequential(Dense(8, 8, rng=0), Residual(Sequential(Dense(8, 8, rng=1), layer)), Scaled(), Linear(8, 3, rng=2)),
        r"1\.inner\.1",
    ),
    "in a part": lambda layer: (Sequential(Dense(8, 8, rng=0), checkpoint(layer), Linear(8, 3, rng=1)), r"1\.inner"),
    "in a list": lambda layer: (Sequential(Dense(8, 8, rng=0), Both(layer), Linear(8, 3, rng=1)), r"1\.parts\.1"),
    "stored in half": lambda layer: (
        npnet.mixed_precision(Sequential(Dense(8, 8, rng=0), layer, Linear(8, 3, rng=1))), r"1(\.inner)?",
    ),
}  # fmt: skip


class Both(Layer):
    """Two layers of a list, one after the other."""

    def __init__(self, layer: Layer) -> None:
        self.parts = [Dense(8, 8, rng=3), layer]

    def forward(self, x: Any) -> Any:
        h, first = self.parts[0].forward(x)
        result = self.parts[1].forward(h)
        return (result, first) if not isinstance(result, tuple) else (result[0], (first, result[1]))

    def backward(self, dy: Any, saved: Any) -> Any:
        return self.parts[0].backward(self.parts[1].backward(dy, saved[1]), saved[0])


STEPS: dict[str, Callable[..., Any]] = {
    "fit": lambda model, x, schedule: npnet.fit(
        model, (x, Y), loss=LOSS, optimizer=Adam(0.01), epochs=2, batch_size=64, shuffle=False, log=False,
        schedule=schedule,
    ),
    "fit, clipped": lambda model, x, schedule: npnet.fit(
        model, (x, Y), loss=LOSS, optimizer=Adam(0.01), epochs=2, batch_size=64, log=False,
        schedule=schedule, clip_norm=1,
    ),
    "train_step": lambda model, x, schedule: npnet.train_step(model, LOSS, Adam(0.01), schedule, x, Y),
    "accumulated_step": lambda model, x, schedule: accumulated_step(
        model, LOSS, Adam(0.01), schedule, [(x[:32], Y[:32]), (x[32:], Y[32:])], 64, streaming=False
    ),
    "add_gradients, two rows": lambda model, x, schedule: npnet.add_gradients(
        model, LOSS, x[:2], Y[:2], schedule=schedule
    ),
    "value_and_grad": lambda model, x, schedule: npnet.value_and_grad(model, LOSS, x, Y, schedule=schedule),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_rule_is_refused_by_the_layers_path_and_the_data_stay(broken: str, place: str) -> None:
    kind, error, message = BROKEN[broken]
    if broken in ("dy", "returns saved") and place == "stored in half":
        pytest.skip("what is stored in half is copied on the way")
    model, path = PLACES[place](kind())
    x = X.copy()
    if (broken, place) == ("output alone", "in a list"):  # only the list's layer knows where it stands
        path = "1"
    with pytest.raises(error, match=rf"layer {path}, .*{message}"):
        npnet.fit(
            model, (x, Y), loss=LOSS, optimizer=Adam(0.01), epochs=2, batch_size=64, shuffle=False,
            schedule=lambda depth: npnet.schedules.every_nth(depth, depth - 1), log=False,
        )  # fmt: skip
    assert np.array_equal(x, X)
    assert all(each.gradient is None for each in model.parameters())
    assert not any(name in vars(layer) for _, layer in all_layers(model) for name in ("forward", "backward_"))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("broken", BROKEN)
def test_every_kind_of_step_refuses_it(broken: str, step: str) -> None:
    kind, error, message = BROKEN[broken]
    model = Sequential(Dense(8, 8, rng=0), kind(), Dense(8, 8, rng=1), Linear(8, 3, rng=2))
    x = X.copy()
    schedule = npnet.schedules.every_nth(4, 3)
    with pytest.raises(error, match=rf"layer 1, {kind.__name__}\(\): .*{message}"):
        STEPS[step](model, x, schedule)
    assert np.array_equal(x, X)


@pytest.mark.parametrize("name", ["input", "view", "sort"])
def test_prediction_does_not_change_the_data_either(name: str) -> None:
    kind, error, message = BROKEN[name]
    model, x = Sequential(kind(), Dense(8, 3, rng=0)), X.copy()
    for call in (model.predict, model):
        with pytest.raises(error, match=rf"layer 0, .*{message}"):
            call(x)
    assert np.array_equal(x, X)


def test_two_halves_are_watched_too() -> None:
    good = [Dense(8, 8, rng=0), Dense(8, 3, "identity", rng=1)]
    with pytest.raises(LayerRuleError, match="forward changes its input"):
        lazy_gradient(Sequential(good[0], ScalesItsInput()), Sequential(good[1]), LOSS, X, Y)
    with pytest.raises(LayerRuleError, match="forward changes its input"):
        lazy_gradient(Sequential(good[0]), Sequential(ScalesItsInput(), good[1]), LOSS, X, Y)


@pytest.mark.parametrize("broken", ["input", "saved", "mean in place", "workspace"])
def test_a_captured_step_refuses_what_it_would_record(broken: str) -> None:
    kind, _, _ = BROKEN[broken]
    model, x = Sequential(kind(), Dense(8, 3, "identity", rng=0)), X.copy()
    with pytest.raises((LayerRuleError, npnet.CannotCapture)):
        npnet.CapturedStep(model, LOSS, npnet.SGD(0.1))(x, Y)
    assert np.array_equal(x, X)


@pytest.mark.parametrize("schedule", ["none", "sqrt", "revolve"])
@pytest.mark.parametrize("place", PLACES)
def test_layers_that_keep_the_rules_train_as_without_a_watch(place: str, schedule: str) -> None:
    models = [PLACES[place](Scaled())[0] for _ in range(2)]
    losses = [[], []]  # type: ignore[var-annotated]
    for number, model in enumerate(models):
        optimizer = Adam(0.01)
        for _ in range(3):
            if number:
                schedule_ = npnet.schedules.as_schedule(
                    schedule, len(model.layers), npnet.layer.needs_saved(model.layers)
                )
                npnet.failures.examined(model, model.layers).schedules = {schedule_}  # seen before
            losses[number].append(npnet.train_step(model, LOSS, optimizer, schedule, X, Y))
    assert losses[0] == losses[1]


def test_without_recomputation_own_random_numbers_are_right_and_taken() -> None:
    model = Sequential(Dense(8, 8, rng=0), OwnNumbers(), Linear(8, 3, rng=1))
    for step in ("fit", "train_step", "value_and_grad"):
        STEPS[step](model, X, "none")


def test_a_count_of_runs_is_warned_of_and_may_go_on() -> None:
    class Counts(Scaled):
        runs, log = 0, ()

        def forward(self, x: Any) -> Any:
            self.runs += 1
            return super().forward(x)

    model = Sequential(Counts(), Linear(8, 3, rng=0))
    with pytest.warns(UserWarning, match=r"layer 0, Counts\(\): forward changes self\.runs each time.*outside"):
        npnet.train_step(model, LOSS, Adam(), X, Y)
    npnet.train_step(model, LOSS, Adam(), X, Y)  # said once


def test_what_a_layer_remembers_of_its_last_run_does_no_harm() -> None:
    class Remembers(Scaled):
        def forward(self, x: Any) -> Any:
            self.last, self.shape = x, x.shape
            return super().forward(x)

    npnet.train_step(Sequential(Remembers(), Linear(8, 3, rng=0)), LOSS, Adam(), X, Y, schedule="none")


def test_a_layer_is_run_as_often_as_the_schedule_says_when_it_is_watched() -> None:
    runs = []

    class Noted(Scaled):
        def forward(self, x: Any) -> Any:
            runs.append(1)
            return super().forward(x)

    model = Sequential(*(Dense(8, 8, rng=0), Noted(), Dense(8, 8, rng=1), Linear(8, 3, rng=2)))
    schedule = npnet.schedules.every_nth(4, 3, [2])
    for _ in range(2):
        runs.clear()
        npnet.value_and_grad(model, LOSS, X, Y, schedule=schedule)
        assert len(runs) == schedule.forwards[2] == 2


def test_a_watched_method_of_ones_own_on_a_layer_of_npnets_is_called_and_stays() -> None:
    layer, calls = Dense(8, 8, rng=0), []
    layer.forward = lambda x: calls.append(1) or Dense.forward(layer, x)  # type: ignore[method-assign, func-returns-value]
    mine = layer.forward
    npnet.train_step(Sequential(layer, Linear(8, 3, rng=1)), LOSS, Adam(), X, Y)
    assert calls == [1]
    assert layer.forward is mine


def test_npnets_own_layers_are_not_watched() -> None:
    layers = [Dense(8, 8), Residual(Sequential(Dropout(0.1), npnet.LayerNorm(8))), checkpoint(npnet.GELU())]
    assert not has_foreign_layers(layers)
    assert has_foreign_layers([*layers, Residual(Scaled())])
    with watched(layers):
        assert "forward" not in vars(layers[0])


@pytest.mark.parametrize("broken", ["saved", "own numbers", "calls", "dy"])
def test_the_engine_by_itself_watches_nothing_and_the_gradient_is_wrong(broken: str) -> None:
    """Negative control: what the watch is for."""
    kind, _, _ = BROKEN[broken]
    gradients = []
    for number, make in enumerate((kind, Scaled if broken != "own numbers" else kind)):
        layers = [Dense(8, 8, "sigmoid", rng=0), make(), Dense(8, 8, rng=1), Linear(8, 3, rng=2)]
        if broken == "calls":
            before = layers[1].strength if make is kind else None  # type: ignore[attr-defined]
            backpropagate(layers, npnet.schedules.every_nth(4, 3, [2]), X, np.ones_like)
            assert make is not kind or (layers[1].strength, before) == (0.9 * 0.9, 1.0)  # type: ignore[attr-defined]
            continue
        schedule = npnet.schedules.none(4, [2]) if number else npnet.schedules.every_nth(4, 3, [2])
        backpropagate(layers, schedule, X, lambda y: np.cos(y))
        gradients.append([each.gradient for each in layers[0].parameters()])
    if broken in ("saved", "own numbers"):
        assert not np.array_equal(gradients[0][0], gradients[1][0])


# Layers that nobody found.


class Parts(Layer):
    """Layers and parameters in lists, tuples and dictionaries."""

    def __init__(self) -> None:
        self.parts = [Dense(8, 8, "tanh", rng=0), [Dense(8, 8, "tanh", rng=1)]]
        self.named = {"out": Dense(8, 3, "identity", rng=2), "drop": (Dropout(0.5, rng=3), None)}
        self.scales = (Parameter(np.ones(8, np.float32)), [Parameter(np.ones(8, np.float32))])
        self.state = {"count": npnet.Buffer(0)}

    def forward(self, x: Any) -> Any:
        self.state["count"].update(lambda count: count + 1)
        drop = self.named["drop"][0]
        h, saved = x * self.scales[0].value, [x]
        for layer in (self.parts[0], self.parts[1][0], drop, self.named["out"]):
            h, kept = layer.forward(h)
            saved.append(kept)
        return h, saved

    def backward(self, dy: Any, saved: Any) -> Any:
        drop = self.named["drop"][0]
        for layer, kept in zip((self.named["out"], drop, self.parts[1][0], self.parts[0]), saved[:0:-1], strict=True):
            dy = layer.backward(dy, kept)
        self.scales[0].accumulate((dy * saved[0]).sum(axis=0))
        return dy * self.scales[0].value


PATHS = [
    *("0.scales.0", "0.scales.1.0", "0.parts.0.weight", "0.parts.0.bias", "0.parts.1.0.weight", "0.parts.1.0.bias"),
    *("0.named.out.weight", "0.named.out.bias"),
]


def test_layers_in_lists_tuples_and_dictionaries_are_found_trained_and_saved(tmp_path: Any) -> None:
    model = Sequential(Parts())
    assert list(model.named_parameters()) == PATHS
    assert list(model.named_buffers()) == ["0.state.count"]
    assert set(model.state_dict()) == {*PATHS, "0.state.count"}
    model.eval()
    assert not model.layers[0].named["drop"][0].training  # type: ignore[attr-defined]
    model.train()
    before = {name: each.value.copy() for name, each in model.named_parameters().items()}
    STEPS["fit"](model, X, "none")
    assert {
        name for name, each in model.named_parameters().items() if not np.array_equal(each.value, before[name])
    } == {
        name
        for name in PATHS
        if name != "0.scales.1.0"  # which is not used
    }
    model.save(tmp_path / "m.npz")
    loaded = npnet.load(tmp_path / "m.npz", classes=[Parts])
    assert np.array_equal(loaded.predict(X), model.predict(X))


def test_what_only_attributes_hold_would_miss_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the parameters that a look at plain attributes finds."""
    monkeypatch.setattr(npnet.layer, "_parts_of", lambda value, path: ())
    assert list(Sequential(Parts()).named_parameters()) == []


@pytest.mark.parametrize("schedule", ["none", "sqrt"])
def test_gradients_of_found_parts_are_central_differences(schedule: str) -> None:
    model = Sequential(Parts()).eval()
    for each in model.parameters():
        each.value = each.value.astype(np.float64)
    x, y, rng = X.astype(float), Y.astype(float), np.random.default_rng(0)
    _, gradients = npnet.value_and_grad(model, LOSS, x, y, schedule=schedule)
    for path in PATHS:
        if path == "0.scales.1.0":
            continue
        parameter = model.named_parameters()[path]
        direction, value, ends = rng.standard_normal(parameter.value.shape), parameter.value, []
        for sign in (1, -1):
            parameter.value = value + sign * 1e-6 * direction
            ends.append(npnet.value_and_grad(model, LOSS, x, y)[0])
        parameter.value = value
        expected = (ends[0] - ends[1]) / 2e-6
        assert float((gradients[path] * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-9)


# Attributes, and methods that are not there.


@pytest.mark.parametrize(
    ("set_it", "message"),
    [
        (lambda layer: setattr(layer, "trainable", False), "cannot freeze"),
        (lambda layer: setattr(layer, "requires_grad", False), "cannot freeze"),
        (lambda layer: setattr(layer, "gradient", None), r"layer\.weight\.gradient"),
        (lambda layer: setattr(layer, "grad", None), r"layer\.weight\.gradient"),
        (lambda layer: setattr(layer, "weights", 3), r"weight, a Parameter: layer\.weight\.value"),
        (lambda layer: setattr(layer, "learning_rate", 3), "the optimizer"),
        (lambda layer: setattr(layer.weight, "requires_grad", False), "a Parameter has no requires_grad.*freeze"),
        (lambda layer: setattr(layer.weight, "grad", None), "a Parameter has no grad: it is called gradient"),
        (lambda layer: layer.weight.grad, "a Parameter has no grad: it is called gradient"),
        (lambda layer: setattr(layer.weight, "data", 3), "a Parameter has no data: it is called value"),
        (lambda layer: setattr(layer.weight, "values", 3), "values"),
    ],
)
def test_what_looks_like_a_setting_and_is_none_is_refused(set_it: Callable[[Any], Any], message: str) -> None:
    for layer in (Dense(8, 3, rng=0), Named(8, 3, rng=0)):
        with pytest.raises(AttributeError, match=message):
            set_it(layer)


class Named(Dense):
    """A subclass that says nothing of these names."""


def test_attributes_of_ones_own_are_ones_own() -> None:
    class Own(Layer):
        def __init__(self) -> None:
            self.trainable, self.rate = True, 3.0

        def forward(self, x: Any) -> Any:
            return (x * self.rate if self.kernel else x * 1), None

    layer = Own()
    layer.trainable, layer.kernel, layer.rate = False, 3, 4.0
    layer.name = "first"
    model = Sequential(Dense(3, 2))
    model.history, model.name = [], "baseline"  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"train is a method: call layer\.train\(\)"):
        layer.train = True  # type: ignore[method-assign, assignment]


class Unfinished(Layer):
    """Has no backward."""

    def forward(self, x: Any) -> Any:
        return x * 1, None


@pytest.mark.parametrize("step", STEPS)
def test_a_missing_backward_is_named_with_what_to_write(step: str) -> None:
    model = Sequential(Dense(8, 8, rng=0), Residual(Sequential(Unfinished())), Linear(8, 3, rng=1))
    with pytest.raises(
        NotImplementedError, match=r"^layer 1\.inner\.0, Unfinished has no backward; write backward\(self"
    ):
        STEPS[step](model, X, "none")
    with pytest.raises(NotImplementedError, match=r"^layer 0, Layer has no forward; write forward\(self, x\)"):
        STEPS[step](Sequential(Layer(), Linear(8, 3)), X, "none")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(1, np.float32), r"bias\.value should be .*of shape \(8,\); it has \(1,\)"),
        (np.zeros((8, 1), np.float32), r"bias\.value should be .*it has \(8, 1\)"),
        (np.zeros((64, 8), np.float32), r"bias\.value should be .*it has \(64, 8\)"),
        (np.zeros(8), r"weight\.value is float32, bias\.value float64; make them alike"),
        (np.zeros(8, int), r"bias\.value should be .*it is of dtype int64"),
        ([0.0] * 8, r"bias\.value should be an array .*it is \[0\.0"),
        (None, r"bias\.value should be an array .*it is None"),
        (0.0, r"bias\.value should be an array .*it is 0\.0"),
    ],
)
@pytest.mark.parametrize("step", ["train_step", "value_and_grad", "predict"])
def test_a_bias_of_another_shape_dtype_or_kind_is_named_by_its_path(value: Any, message: str, step: str) -> None:
    model = Sequential(Dense(8, 8, rng=0), Residual(Sequential(Dense(8, 8, rng=1))), Linear(8, 3, rng=2))
    model.layers[1].inner.layers[0].bias.value = value  # type: ignore[attr-defined]
    run = model.predict if step == "predict" else partial(STEPS[step], model, schedule="none")
    with pytest.raises((TypeError, ValueError), match=rf"^layer 1\.inner\.0, Dense\(8, 8, relu\): {message}"):
        run(X)


def test_train_step_takes_its_batch_with_and_without_a_schedule() -> None:
    def losses(*args: Any, **options: Any) -> list[float]:
        model, optimizer = Sequential(Dense(8, 8, rng=0), Linear(8, 3, rng=1)), Adam(0.01)
        return [npnet.train_step(model, LOSS, optimizer, *args, **options) for _ in range(3)]

    expected = losses("none", X, Y)
    for args, options in (
        ((X, Y), {}),
        ((X, Y), {"schedule": "sqrt"}),
        ((), {"x": X, "y": Y}),
        (("sqrt",), {"x": X, "y": Y}),
        ((X,), {"y": Y}),
        (("sqrt", X), {"y": Y}),
    ):
        assert losses(*args, **options) == expected
    for args, message in (((X,), "x is missing|y is missing"), ((), "x is missing"), (("none", X, Y, 1), "got 7")):
        with pytest.raises(TypeError, match=message):
            losses(*args)


# Modes.


def test_predict_evaluates_whatever_the_mode_and_leaves_it() -> None:
    model = Sequential(Dense(8, 64, rng=0), Dropout(0.5, rng=1), Residual(Dropout(0.5, rng=2)), Linear(64, 3, rng=3))
    model.layers[1].eval()
    modes = [layer.training for _, layer in all_layers(model)]
    evaluated = model.predict(X)
    assert np.array_equal(evaluated, model.predict(X))
    assert [layer.training for _, layer in all_layers(model)] == modes
    model.train()
    assert not np.array_equal(model(X), evaluated)
    model.eval()
    assert np.array_equal(model(X), evaluated)


def test_predict_after_fit_and_load_draws_no_masks(tmp_path: Any) -> None:
    model = Sequential(Dense(8, 64, rng=0), Dropout(0.5, rng=1), Linear(64, 3, rng=3))
    npnet.fit(model, (X, Y), loss=LOSS, optimizer=Adam(), epochs=1, batch_size=64, log=False)
    model.save(tmp_path / "m.npz")
    loaded = npnet.load(tmp_path / "m.npz")
    assert np.array_equal(model.predict(X), model.predict(X))
    assert np.array_equal(loaded.predict(X), model.predict(X))


def test_two_halves_draw_masks_though_the_first_only_passes() -> None:
    before, after = Sequential(Dense(8, 8, rng=0), Dropout(0.5, rng=1)), Sequential(Linear(8, 3, rng=2))
    whole = Sequential(*before.layers, *after.layers)
    with npnet.random.one_step(5):
        expected = npnet.value_and_grad(whole, LOSS, X, Y)[0]
    with npnet.random.one_step(5):
        assert lazy_gradient(before, after, LOSS, X, Y) == expected
    assert expected != npnet.value_and_grad(whole.eval(), LOSS, X, Y)[0]


# A run with dropout whose key nobody chose.


def dropout_run(path: Any, epochs: int, key: int | None = None, rng: Any = None) -> tuple[list[Any], int]:
    drop = Dropout(0.2, key=key, rng=rng)
    block = Residual(Sequential(Dense(64, 64, rng=2), Dropout(0.3)))
    model = Sequential(Dense(8, 64, rng=0), drop, block, Linear(64, 3, rng=1))
    npnet.random.set_next_step(0)
    npnet.fit(
        model, (X, Y), loss=LOSS, optimizer=Adam(0.01), epochs=epochs, batch_size=16, rng=0, log=False,
        saver=npnet.Saver(path, resume=True),
    )  # fmt: skip
    return [each.value for each in model.parameters()], drop.key


def test_an_unseeded_dropouts_key_is_taken_from_the_save(tmp_path: Any) -> None:
    path = tmp_path / "rd.npz"
    _, key = dropout_run(path, 1)
    resumed, again = dropout_run(path, 3)
    assert again == key
    whole, _ = dropout_run(path, 3, rng=5)  # done already: what the save has
    assert all(map(np.array_equal, resumed, whole))
    with pytest.raises(ValueError, match=r"another training: .*config\.key is \d+ there, 7 here"):
        dropout_run(path, 3, key=7)


def test_resuming_with_the_saves_keys_is_the_run_that_was_not_broken_off(tmp_path: Any) -> None:
    def run(path: str, epochs: int, keys: tuple[int, int] | None) -> list[Any]:
        first, second = (
            (Dropout(0.2), Dropout(0.3)) if keys is None else (Dropout(0.2, key=keys[0]), Dropout(0.3, key=keys[1]))
        )
        model = Sequential(Dense(8, 16, rng=0), first, Residual(second), Linear(16, 3, rng=1))
        npnet.random.set_next_step(0)
        npnet.fit(
            model, (X, Y), loss=LOSS, optimizer=Adam(0.01), epochs=epochs, batch_size=16, rng=0, log=False,
            saver=npnet.Saver(tmp_path / path, resume=True),
        )  # fmt: skip
        return [each.value for each in model.parameters()]

    run("a.npz", 1, (11, 12))
    resumed, whole = run("a.npz", 3, (11, 12)), run("b.npz", 3, (11, 12))
    assert all(map(np.array_equal, resumed, whole))
    run("c.npz", 1, (11, 12))
    assert all(map(np.array_equal, run("c.npz", 3, None), whole))


def test_another_training_leaves_the_keys_as_they_were(tmp_path: Any) -> None:
    path = tmp_path / "rd.npz"
    dropout_run(path, 1)
    drop = Dropout(0.25)
    model, key = Sequential(Dense(8, 64, rng=0), drop, Linear(64, 3, rng=1)), drop.key
    with pytest.raises(ValueError, match="another training"):
        npnet.fit(
            model, (X, Y), loss=LOSS, optimizer=Adam(0.01), epochs=1, batch_size=16, rng=0, log=False,
            saver=npnet.Saver(path, resume=True),
        )  # fmt: skip
    assert drop.key == key


# What a first reader tried.


class ForgotReturn(Scaled):
    def backward(self, dy: Any, saved: Any) -> Any:
        dy * 1.5


class WrongShape(Scaled):
    def backward(self, dy: Any, saved: Any) -> Any:
        return dy.sum(axis=1, keepdims=True)


class NotSummed(LendsDy):
    def backward(self, dy: Any, saved: Any) -> Any:
        self.weight.accumulate(dy * 1)
        return dy * 1


class AssignsABuffer(Scaled):
    def __init__(self) -> None:
        self.mean = npnet.Buffer(np.zeros(8, np.float32))

    def forward(self, x: Any) -> Any:
        self.mean.value = self.mean.value * np.float32(0.9) + x.mean(axis=0) * np.float32(0.1)
        return super().forward(x)


class NumbersOnlySaved(OwnNumbers):
    def forward(self, x: Any) -> Any:
        return x * 1, (self.generator.random(x.shape) > 0.5).astype(x.dtype)


class Statistics:
    """An object that a layer keeps."""

    total: Any = 0.0


class KeepsAnObject(Scaled):
    def __init__(self) -> None:
        self.statistics = Statistics()

    def forward(self, x: Any) -> Any:
        self.statistics.total = self.statistics.total + x.sum(axis=0)
        return super().forward(x)


class KeepsItsMask(Scaled):
    def __init__(self) -> None:
        self.mask = np.zeros(1, np.float32)

    def forward(self, x: Any) -> Any:
        self.mask = np.cos(x)
        return np.sin(x), None

    def backward(self, dy: Any, saved: Any) -> Any:
        return dy * self.mask


class KeepsItsOutput(Scaled):
    """For a picture, say: a new array each time."""

    def forward(self, x: Any) -> Any:
        self.last = x * np.float32(1.5)
        return self.last, None


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            ForgotReturn,
            LayerRuleError,
            r"backward must return the gradient at the input, .*\(64, 8\); it returned None",
        ),
        (
            WrongShape,
            LayerRuleError,
            r"backward must return .* an array of shape \(64, 8\); it returned an array of shape \(64, 1\)",
        ),
        (NotSummed, LayerRuleError, r"the gradient of weight must have its shape \(1, 8\), summed over .*\(64, 8\)"),
        (AssignsABuffer, LayerRuleError, r"forward changes self\.mean\.value each time .*update\(\)"),
        (NumbersOnlySaved, NondeterministicLayer, "gave other numbers"),
        (KeepsAnObject, LayerRuleError, r"forward changes self\.statistics\.total each time"),
    ],
)
@pytest.mark.parametrize("schedule", ["none", "sqrt"])
def test_more_that_would_be_wrong_is_refused(kind: Any, error: Any, message: str, schedule: str) -> None:
    if kind is NumbersOnlySaved and schedule == "none":
        pytest.skip("nothing is run again, and the gradient is right")
    model = Sequential(Dense(8, 8, rng=0), Dense(8, 8, rng=1), kind(), Dense(8, 8, rng=2), Linear(8, 3, rng=3))
    depth = {"none": "none", "sqrt": npnet.schedules.every_nth(5, 4)}[schedule]
    for step in ("train_step", "fit"):
        with pytest.raises(
            error, match=rf"^layer 2, {kind.__name__}\(\): {'.*' if error is not LayerRuleError else ''}{message}"
        ):
            STEPS[step](model, X, depth)


def test_the_engine_does_not_begin_anew_where_a_backward_returns_none() -> None:
    layers = [Dense(8, 3, rng=0), ForgotReturn(), Dense(3, 3, rng=1)]
    with pytest.raises(TypeError, match=r"^layer 1, ForgotReturn\(\): backward must return .* it returned None"):
        backpropagate(layers, npnet.schedules.none(3, [2]), X, lambda y: y * 1)


@pytest.mark.parametrize("schedule", ["none", "sqrt"])
def test_what_a_layer_keeps_for_backward_does_not_serve_two_places(schedule: str) -> None:
    twice = KeepsItsMask()
    model = Sequential(Dense(8, 8, rng=0), twice, Dense(8, 8, rng=1), twice, Linear(8, 3, rng=2))
    with pytest.raises(LayerRuleError, match=r"layer 1, .*forward keeps self\.mask, and the layer stands in several"):
        npnet.train_step(model, LOSS, Adam(), schedule, X, Y)


@pytest.mark.parametrize("schedule", ["none", "sqrt", "revolve"])
def test_a_layer_that_keeps_its_last_output_is_taken_under_every_schedule(schedule: str) -> None:
    model = Sequential(Dense(8, 8, rng=0), KeepsItsOutput(), Dense(8, 8, rng=1), Linear(8, 3, rng=2))
    npnet.train_step(model, LOSS, Adam(), schedule, X, Y)
    STEPS["fit"](model, X, schedule)


def test_a_layer_may_keep_modules_and_functions_and_a_clock_is_but_warned_of() -> None:
    class Timed(Scaled):
        def __init__(self) -> None:
            self.xp, self.function, self.clock = np, np.tanh, Statistics()

        def forward(self, x: Any) -> Any:
            self.clock.total = self.clock.total + 0.5
            return super().forward(x)

    model = Sequential(Timed(), Linear(8, 3, rng=0))
    with pytest.warns(UserWarning, match=r"layer 0, Timed\(\): forward changes self\.clock\.total each time"):
        npnet.train_step(model, LOSS, Adam(), X, Y)


def test_a_transform_that_changes_the_users_data_is_refused() -> None:
    def halved(rows: Any) -> Any:
        rows *= 0.5
        return rows

    x = X.copy()
    with pytest.raises(ValueError, match=r"^transform: it changes the rows that it is given, which are your data"):
        npnet.fit(
            Sequential(Linear(8, 3, rng=0)), (x, Y), loss=LOSS, optimizer=Adam(), epochs=1, batch_size=32,
            transform=halved, shuffle=False, log=False,
        )  # fmt: skip
    assert np.array_equal(x, X)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a tie": lambda model: setattr(model.layers[1], "weight", model.layers[0].weight),
    "a parameter": lambda model: setattr(model.layers[1], "weight", Parameter(model.layers[0].weight.value.copy())),
    "a layer": lambda model: model.layers.__setitem__(1, Dense(8, 8, "tanh", rng=7)),
    "a layer twice": lambda model: model.layers.insert(1, model.layers[0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_captured_step_follows_parameters_and_layers_that_are_replaced(change: str) -> None:
    losses = []
    for capture in (False, True):
        model = Sequential(Dense(8, 8, "tanh", rng=0), Dense(8, 8, "tanh", rng=1), Linear(8, 3, rng=2))
        optimizer = npnet.SGD(0.1)
        step = (
            npnet.CapturedStep(model, LOSS, optimizer) if capture else partial(npnet.train_step, model, LOSS, optimizer)
        )
        first = step(X, Y)
        CHANGES[change](model)
        if change == "a layer twice" and capture:
            with pytest.raises(ValueError, match="a schedule for 3 layers cannot run a chain of 4"):
                step(X, Y)
            return
        losses.append([first, *(step(X, Y) for _ in range(3))])
    assert losses[0] == losses[1]


def test_a_norm_whose_squares_overflow_is_still_clipped() -> None:
    parameter = Parameter(np.zeros(4, np.float32))
    parameter.gradient = np.array([3e30, 0, 4e30, 0], np.float32)
    assert npnet.clip_grad_norm([parameter], 1.0) == pytest.approx(5e30, rel=1e-6)
    assert np.allclose(parameter.gradient, [0.6, 0, 0.8, 0])


def test_a_mode_is_true_or_false() -> None:
    with pytest.raises(TypeError, match="training: expected True or False, got 'no'"):
        Dense(3, 2).training = "no"  # type: ignore[assignment]
