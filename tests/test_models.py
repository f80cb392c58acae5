"""Models of layers in layers: paths, states, modes, and errors that say where in the model they happened."""

import numpy as np
import pytest

import npnet
from npnet import GELU, Dense, Dropout, LayerNorm, Linear, Residual, Sequential, Tanh, schedules
from npnet.checkpoint import backpropagate, checkpoint
from npnet.layer import KindError, Layer, ShapeError, needs_saved

OWNERS = ["0", "1.inner.0", "1.inner.1", "1.inner.3.inner.inner", "2.1"]
PATHS = [f"{owner}.{name}" for owner in OWNERS for name in ("weight", "bias")]


def model(seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return Sequential(
        Dense(5, 6, "tanh", dtype=dtype, rng=rng),
        Residual(
            Sequential(
                LayerNorm(6, dtype=dtype),
                Linear(6, 6, dtype=dtype, rng=rng),
                GELU("tanh"),
                checkpoint(Residual(Dense(6, 6, dtype=dtype, rng=rng))),
                Dropout(0.5, rng=rng),
            )
        ),
        Sequential(Tanh(), Linear(6, 3, dtype=dtype, rng=rng)),
    )


X = np.random.default_rng(0).standard_normal((7, 5))


def every(layer):
    yield layer
    for child in layer.children().values():
        yield from every(child)


def test_parameters_are_named_by_their_path_in_a_fixed_order():
    each = model()
    named = each.named_parameters()
    assert list(named) == PATHS
    assert each.parameters() == list(named.values())
    assert named["1.inner.3.inner.inner.weight"] is each.layers[1].inner.layers[3].inner.inner.weight
    assert list(each.named_parameters("model.")) == [f"model.{path}" for path in PATHS]
    assert list(each.layers[1].named_parameters()) == [path[2:] for path in PATHS if path.startswith("1.")]


def test_the_layers_and_parameters_of_a_users_layer_are_found():
    class Gated(Layer):
        def __init__(self):
            self.scale = npnet.Parameter(np.ones(3))
            self.left, self.right = Linear(3, 3, rng=0), Dropout(0.5, rng=0)
            self.note = "no layer"

    each = Residual(Gated())
    assert set(each.inner.children()) == {"left", "right"}
    assert list(each.named_parameters()) == ["inner.scale", "inner.left.weight", "inner.left.bias"]
    each.eval()
    assert not each.inner.right.training


def test_train_and_eval_reach_every_layer_and_return_the_model():
    each = model()
    assert len(list(every(each))) == 18
    for call, mode in ((each.eval, False), (each.train, True), (lambda: each.train(False), False)):
        assert call() is each
        assert {layer.training for layer in every(each)} == {mode}
    assert Linear(2, 2).training is True
    assert Linear(2, 2).train(0).training is False


def test_a_call_is_the_output_alone_and_in_eval_always_the_same():
    each = model()
    assert not np.array_equal(each(X), each(X))  # dropout
    each.eval()
    assert np.array_equal(each(X), each.forward(X)[0])
    assert np.array_equal(each(X), each.predict(X))
    assert each(X).shape == (7, 3)
    assert np.array_equal(each.layers[0](X), np.tanh(X @ each.layers[0].weight.value.T))


def test_the_state_is_copies_by_path_and_loading_it_makes_the_model_the_same():
    each, other = model(0).eval(), model(1).eval()
    state = each.state_dict()
    assert list(state) == PATHS
    for name, parameter in each.named_parameters().items():
        assert np.array_equal(state[name], parameter.value)
        assert not np.shares_memory(state[name], parameter.value)
    assert not np.array_equal(other(X), each(X))
    expected = each(X)
    assert other.load_state_dict(dict(reversed(state.items()))) is None
    assert np.array_equal(other(X), expected)
    for array in state.values():
        array += 1  # the state is the caller's
    other.layers[0].weight.value += 2
    assert np.array_equal(each(X), expected)
    assert not np.array_equal(other.state_dict()["0.weight"], state["0.weight"])


def test_a_state_of_another_precision_takes_the_models():
    single, double = model(0, np.float32), model(1)
    double.load_state_dict(single.state_dict())
    assert {parameter.value.dtype for parameter in double.parameters()} == {np.dtype(np.float64)}
    assert all(map(np.array_equal, double.state_dict().values(), single.state_dict().values()))
    single.load_state_dict({name: np.ones(array.shape, int) for name, array in double.state_dict().items()})
    assert {parameter.value.dtype for parameter in single.parameters()} == {np.dtype(np.float32)}
    assert single.layers[0].weight.value.flags.f_contiguous  # as products like it


def test_what_was_lent_is_not_changed_by_training_after_loading():
    each = Linear(2, 2, rng=0)
    each.weight.lent, handed_out = True, each.weight.value
    each.load_state_dict(each.state_dict())
    assert each.weight.value is not handed_out
    assert not each.weight.lent


BAD_STATES = {
    "missing": (lambda s: s.pop("0.bias") is None, ValueError, "the state lacks 0.bias$"),
    "several missing": (
        lambda s: [s.pop("2.1.bias"), s.pop("0.bias")],
        ValueError,
        "the state lacks 0.bias, 2.1.bias$",
    ),
    "unknown": (lambda s: s.update({"3.bias": np.ones(3)}), ValueError, "the state has unknown 3.bias$"),
    "a number as a name": (lambda s: s.update({3: np.ones(3)}), ValueError, "the state has unknown 3$"),
    "shape": (
        lambda s: s.update({"2.1.weight": np.ones((6, 3))}),
        ValueError,
        r"2\.1\.weight: expected shape \(3, 6\), got \(6, 3\)$",
    ),
    "broadcast": (
        lambda s: s.update({"2.1.bias": np.ones(1)}),
        ValueError,
        r"2\.1\.bias: expected shape \(3,\), got \(1,\)",
    ),
    "complex": (
        lambda s: s.update({"2.1.bias": np.ones(3, complex)}),
        TypeError,
        r"2\.1\.bias: expected real numbers, got dtype complex128",
    ),
    "bool": (lambda s: s.update({"2.1.bias": np.ones(3, bool)}), TypeError, r"2\.1\.bias: expected real .* bool"),
    "text": (lambda s: s.update({"2.1.bias": np.array(["a"] * 3)}), TypeError, r"2\.1\.bias: expected real numbers"),
    "none": (lambda s: s.update({"2.1.bias": None}), TypeError, r"2\.1\.bias: expected real numbers"),
}


@pytest.mark.parametrize(("spoil", "error", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(spoil, error, message):
    each, state = model(0), model(1).state_dict()
    before, values = each.state_dict(), [parameter.value for parameter in each.parameters()]
    spoil(state)
    with pytest.raises(error, match=f"^load_state_dict: .*{message}"):
        each.load_state_dict(state)
    assert all(map(np.array_equal, each.state_dict().values(), before.values()))
    assert all(parameter.value is value for parameter, value in zip(each.parameters(), values, strict=True))


@pytest.mark.parametrize("state", [None, [("0.bias", np.ones(3))], "state", 3, model()], ids=lambda s: type(s).__name__)
def test_a_state_that_is_no_mapping_is_refused(state):
    with pytest.raises(TypeError, match=r"load_state_dict: expected what state_dict\(\) returns, got"):
        model().load_state_dict(state)


# Errors that say where.


def wrapped(layer):
    """The layer at a path through every kind of model, 2.1.inner.inner.0, for rows of 4 features."""
    nested = Residual(checkpoint(Sequential(layer, Tanh())))
    return Sequential(Linear(4, 4, rng=0), Tanh(), Sequential(GELU("tanh"), nested))


def backpropagated(each, x):
    saving = needs_saved(each.layers)
    backpropagate(each.layers, schedules.none(len(each.layers), saving), x, lambda y: y)


WAYS = {
    "forward": lambda each, x: each.forward(x),
    "call": lambda each, x: each(x),
    "predict": lambda each, x: each.predict(x),
    "eval": lambda each, x: each.eval().forward(x),
    "engine": backpropagated,
    "value_and_grad": lambda each, x: npnet.value_and_grad(each, npnet.Quadratic(), x, x),
    "fit": lambda each, x: npnet.fit(
        each, (x, x), loss=npnet.Quadratic(), optimizer=npnet.SGD(0.1), epochs=1, batch_size=2, log=False
    ),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
WIDER = {
    "Linear": (Linear(5, 4, rng=0), r"Linear\(5, 4\): expected rows of shape \(batch, 5\), got \(\d, 4\)"),
    "Dense": (Dense(3, 4, rng=0), r"Dense\(3, 4, relu\): expected rows of shape \(batch, 3\), got \(\d, 4\)"),
    "LayerNorm": (LayerNorm(5), r"LayerNorm\(5\): expected rows of shape \(batch, 5\), got \(\d, 4\)"),
    "Residual": (
        Residual(Linear(4, 3, rng=0)),
        r"Residual\(Linear\(4, 3\)\): the inner layer must keep the shape, but makes \(\d, 3\) of \(\d, 4\)",
    ),
}
PATH = r"^(training data: )?layer 2\.1\.inner\.inner\.0, "


@every_way
@pytest.mark.parametrize(("layer", "message"), WIDER.values(), ids=WIDER)
def test_a_shape_that_does_not_fit_names_the_layer_by_its_path(layer, message, way):
    with pytest.raises(ShapeError, match=PATH + message) as caught:
        way(wrapped(layer), np.ones((2, 4), np.float32))
    assert isinstance(caught.value, ValueError)


@every_way
def test_a_dtype_that_does_not_fit_names_the_layer_by_its_path(way):
    message = r"Linear\(4, 4\): the input has dtype float32, the weights float64; convert with x\.astype"
    with pytest.raises(KindError, match=PATH + message) as caught:
        way(wrapped(Linear(4, 4, dtype=np.float64, rng=0)), np.ones((2, 4), np.float32))
    assert isinstance(caught.value, TypeError)


def test_a_layer_alone_has_no_path_and_one_in_a_chain_its_number():
    for layer, start in (
        (Linear(5, 4, rng=0), "^Linear"),
        (Sequential(Tanh(), Linear(5, 4, rng=0)), "^layer 1, Linear"),
    ):
        with pytest.raises(ShapeError, match=start):
            layer(np.ones((2, 4), np.float32))


@pytest.mark.parametrize(("layer", "message"), WIDER.values(), ids=WIDER)
@pytest.mark.parametrize("nested", [False, True])
def test_the_planner_names_the_layer_by_its_path(layer, message, nested):
    each, path = (wrapped(layer), PATH) if nested else (Sequential(Tanh(), Sequential(Tanh(), layer)), r"^layer 1\.1, ")
    with pytest.raises(ShapeError, match=path + message.partition(":")[0]):
        npnet.plan(each, 2, features=4)
