"""Models of every kind to save and load, and how two of them are compared."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

import npnet
from npnet import GELU, Dense, Dropout, LayerNorm, Linear, Network, Residual, Sequential, schedules
from npnet.activations import ACTIVATIONS
from npnet.checkpoint import Checkpoint, backpropagate, checkpoint
from npnet.layer import Layer, needs_saved
from npnet.network_with_checkpointing import NetworkWithCheckpointing
from npnet.precision import HalfProducts

WIDTH = 4
DTYPES = ("float16", "float32", "float64")


def layers(dtype: str) -> st.SearchStrategy[Layer]:
    """Layers that take rows of `WIDTH` and give as many; Sequential, Residual and Checkpoint hold others."""
    seeds = st.integers(0, 2**32)
    simple = st.one_of(
        st.builds(lambda a, rng: Dense(WIDTH, WIDTH, a, dtype=dtype, rng=rng), st.sampled_from([*ACTIVATIONS]), seeds),
        st.builds(lambda rng: Linear(WIDTH, WIDTH, dtype=dtype, rng=rng), seeds),
        st.builds(lambda eps: LayerNorm(WIDTH, eps, dtype=dtype), st.sampled_from([1e-5, 0.1])),
        st.builds(Dropout, st.sampled_from([0.0, 0.25, 0.5]), rng=seeds),
        st.builds(GELU, st.just("tanh")),
        st.sampled_from([*ACTIVATIONS.values()]).map(lambda kind: kind()),
    )
    return st.recursive(
        simple,
        lambda inner: st.one_of(
            st.builds(Residual, inner),
            st.builds(checkpoint, inner, st.booleans(), st.booleans()),
            st.lists(inner, min_size=1, max_size=3).map(lambda several: Sequential(*several)),
        ),
        max_leaves=6,
    )


@st.composite
def sequentials(draw: Any) -> Sequential:
    """Models, of which those in single precision may store their activations in half."""
    dtype = draw(st.sampled_from(DTYPES))
    model = Sequential(*draw(st.lists(layers(dtype), min_size=1, max_size=4)))
    for parameter in model.parameters():  # biases, too, and weights in either layout
        values = np.random.default_rng(draw(st.integers(0, 99))).standard_normal(parameter.value.shape)
        parameter.value = values.astype(dtype, order=draw(st.sampled_from("CF")))
    if dtype != "float16" and draw(st.booleans()):
        model = npnet.mixed_precision(
            model, draw(st.sampled_from(["float16", "bfloat16"])), half_products=draw(st.booleans())
        )
    return model


@st.composite
def networks(draw: Any) -> Network:
    """The lab's networks, plain and with each way to say what to keep."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=6))
    common = {"dtype": draw(st.sampled_from(DTYPES)), "rng": draw(st.integers(0, 99))}
    depth = len(sizes) - 1
    ways = [
        {"checkpoint_every_nth_layer": draw(st.integers(0, 7))},
        {"schedule": "sqrt"},
        {"schedule": schedules.revolve(depth)},
        {"schedule": list(schedules.selective(depth, [1]))},
        {"memory_budget": draw(st.sampled_from([10**6, "20 MB"]))},
        None,
    ]
    way = draw(st.sampled_from(ways))
    return Network(sizes, **common) if way is None else NetworkWithCheckpointing(sizes, **common, **way)


def numbers(model: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """The output for some rows, and the gradients of all parameters in one training step."""
    if isinstance(model, Network):
        rng, batch = np.random.default_rng(1), 3
        x, y = (rng.random((batch, size)).astype(model.dtype) for size in (model.sizes[0], model.sizes[-1]))
        biases, weights = model.backprop(x.T, y.T)
        return model.feedforward(x), [*biases, *weights]
    dtype = next((parameter.value.dtype for parameter in model.parameters()), np.dtype(np.float32))
    x = np.random.default_rng(1).standard_normal((3, WIDTH)).astype(dtype)
    for layer in every(model):
        if isinstance(layer, Checkpoint):
            layer.determinism_check = False  # which rightly refuses dropout without preserve_rng_state
    npnet.set_seed(0)  # the number of the step, and so the masks of Dropout
    outputs: list[np.ndarray] = []

    def output_gradient(output: np.ndarray) -> np.ndarray:
        outputs.append(output.copy())
        return output.copy()

    backpropagate(model.layers, schedules.none(len(model.layers), needs_saved(model.layers)), x, output_gradient)
    gradients = [parameter.gradient for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.gradient = None
    return outputs[0], [gradient for gradient in gradients if gradient is not None]


def every(layer: Layer) -> list[Layer]:
    """The layer and all layers inside."""
    return [layer, *(each for child in layer.children().values() for each in every(child))]


def is_same(a: Any, b: Any, layout: bool = True) -> bool:
    """The same class, arguments, numbers and (with ``layout``) order of the numbers in memory."""
    ours, theirs = a.named_parameters(), b.named_parameters()
    return (
        type(a) is type(b)
        and repr(a) == repr(b)
        and a.description() == b.description()
        and list(ours) == list(theirs)
        and all(
            each.value.dtype == theirs[name].value.dtype
            and np.array_equal(each.value, theirs[name].value)
            and (not layout or _layout(each.value) == _layout(theirs[name].value))
            for name, each in ours.items()
        )
    )


def _layout(array: np.ndarray) -> tuple[bool, bool]:
    return array.flags.c_contiguous, array.flags.f_contiguous


def one_of_each() -> Sequential:
    """A model with every kind of layer; its blocks keep it small."""
    rng = np.random.default_rng(3)
    inner = Sequential(LayerNorm(WIDTH), Linear(WIDTH, WIDTH, rng=rng), GELU("tanh"), Dropout(0.25, rng=rng))
    chain = [Dense(6, WIDTH, "tanh", rng=rng), Residual(inner), checkpoint(Dense(WIDTH, WIDTH, rng=rng))]
    return Sequential(*chain, *(kind() for kind in ACTIVATIONS.values()), Linear(WIDTH, 3, rng=rng))


def half_of_each() -> Sequential:
    """The same, with activations in half precision."""
    model = npnet.mixed_precision(one_of_each(), half_products=True)
    assert any(isinstance(layer, HalfProducts) for layer in every(model))
    return model
