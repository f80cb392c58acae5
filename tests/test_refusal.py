"""What cannot be captured is named with its line; what people write in layers of their own, and can be, is."""

import inspect
import math
import pickle
import re
import statistics

import numpy as np
import pytest

import npnet
from npnet import CapturedStep, Dense, Dropout, Linear, Sequential
from npnet.checkpoint import checkpoint
from npnet.tracing import CannotCapture
from tests.test_capture import FEATURES, OUTPUTS, Kept, assert_same, batch, train

# Which line cannot be recorded.


class Scaled(npnet.Layer):
    """y = f(x), dx = g(dy, x), by whatever is put in."""

    def __init__(self, forward, backward):
        self.forward_of, self.backward_of = forward, backward

    def forward(self, x):
        return self.forward_of(x), x

    def backward(self, dy, saved):
        return self.backward_of(dy, saved)


NOISE, TABLE = np.random.default_rng(0), np.ones(9, np.float32)


def in_parts(x):
    y = x.copy()
    y[:, 0] = 0  # an assignment
    return y


def by_a_library(x):
    return x * statistics.fmean(x[0])  # whose own line would say nothing


def masked(x):
    y = x * 1
    y[x > 0] *= 2  # a mask
    return y


def into_an_array(x):
    result = np.empty_like(TABLE)
    np.exp(x, out=result)  # of somebody else
    return result


def squeezed(x):
    xp = npnet.array_module(x)
    return xp.multiply(x, 2, where=True)  # an option


REFUSED = {
    "a choice by numbers": (lambda x: x * 2 if x.sum() > 0 else x, "decides by the numbers"),
    "numpy.where": (lambda x: np.where(x, x, 0), r"numpy\.where cannot be recorded"),
    "numpy.clip": (lambda x: np.clip(x, 0, 1), r"numpy\.clip cannot be recorded"),
    "numpy.linalg.norm": (lambda x: x / np.linalg.norm(x), r"numpy\.norm cannot be recorded"),
    "an option": (lambda x: np.sum(x, axis=0, dtype="f8") + x, "cannot be recorded"),
    "an option of dot": (lambda x: np.dot(x, x, out=x), r"numpy\.dot cannot be recorded so"),
    "a method": (lambda x: x - x.std(), "an array's std cannot be recorded"),
    "a method with arguments": (lambda x: x.clip(0, 1), "an array's clip"),
    "an attribute": (lambda x: x * x.flat[0], "an array's flat"),
    "a power": (lambda x: x**2, "an operator other than"),
    "a remainder": (lambda x: x % 2, "an operator other than"),
    "several axes": (lambda x: x / x.sum(axis=(0, 1)), r"over axis=\(0, 1\)"),
    "random numbers": (lambda x: x + NOISE.random(x.shape), "makes an array of its own"),
    "a comparison": (lambda x: x * (x > 0), "decides by the numbers"),
    "an inequality": (lambda x: x * (x != 0), "decides by the numbers"),
    "a loop over rows": (lambda x: x + sum(row for row in x), "decides by the numbers"),
    "a number": (lambda x: x * math.exp(x[0, 0]), "decides by the numbers"),
    "numpy.asarray": (lambda x: np.asarray(x) * 2, "decides by the numbers"),
    "an index": (lambda x: x[[1, 0]], "an index like"),
    "an assignment": (in_parts, "decides by the numbers"),
    "a mask": (masked, "decides by the numbers"),
    "a library": (by_a_library, "decides by the numbers"),
    "another array": (into_an_array, "into another array"),
    "a ufunc's option": (squeezed, r"numpy\.multiply with options"),
    "a method of a ufunc": (lambda x: x + np.add.reduce(x), r"numpy\.add with reduce"),
    "a ufunc of matrices": (lambda x: x + np.vecdot(x, x)[:, None], "cannot be recorded"),
    "ones": (lambda x: x + npnet.array_module(x).ones((1, 9), x.dtype), r"numpy\.ones of more than one axis"),
}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_named_with_its_line(name, where):
    call, words = REFUSED[name]
    layer = Scaled(
        call if where == "forward" else lambda x: x * 2, lambda dy, x: call(dy) if where != "forward" else dy
    )
    model = Sequential(Dense(FEATURES, 9, rng=0), layer, Linear(9, OUTPUTS, rng=0))
    step = CapturedStep(model, npnet.Quadratic(), npnet.SGD(0.1))
    with pytest.raises(CannotCapture, match=words) as error:
        step(*batch())
    named = re.search(r"\((\S+), test_refusal\.py:(\d+): (.*)\)$", str(error.value), re.DOTALL)
    assert named is not None
    first, source = call.__code__.co_firstlineno, inspect.getsource(call).splitlines()
    number = int(named[2])
    assert first <= number < first + len(source)
    assert named[3] == source[number - first].strip()
    assert named[1] == call.__qualname__ or "<" in named[1]
    if len(source) > 1 and "#" in "".join(source):
        assert "#" in named[3]  # the very line


def test_the_line_of_an_optimizer_or_a_loss_is_named_too():
    class Signs(npnet.SGD):
        def _update(self, parameter, gradient, *factors):
            parameter.value -= np.where(gradient > 0, 0.1, 0)

    class Absolute(npnet.Quadratic):
        def value_and_gradient(self, output, target):
            return np.median(output), output - target

    model = Sequential(Dense(FEATURES, OUTPUTS, rng=0))
    for loss, optimizer, words in (
        (npnet.Quadratic(), Signs(0.1), r"Signs\._update, test_refusal\.py:\d+: .*np\.where"),
        (Absolute(), npnet.SGD(0.1), r"Absolute\.value_and_gradient, test_refusal\.py:\d+: return np\.median"),
    ):
        with pytest.raises(CannotCapture, match=words):
            CapturedStep(model, loss, optimizer)(*batch())


def test_of_npnets_own_layers_the_line_is_npnets_and_the_recorder_names_none():
    model = Sequential(checkpoint(Dropout(0.5), preserve_rng_state=False), Dense(FEATURES, OUTPUTS, rng=0))
    with pytest.raises(CannotCapture, match=r"other random numbers .*\(\S+, blocks\.py:\d+: .*\)$"):
        CapturedStep(model, npnet.Quadratic(), npnet.SGD(0.1))(*batch())
    with pytest.raises(CannotCapture, match=r"which says what changes from step to step$"):
        CapturedStep(model, npnet.Quadratic(), Kept(0.1))(*batch())
    error = CannotCapture("words (forward, layers.py:12: y = np.where(x))")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_what_is_written_in_place_stays_so():
    """A name for a part of an array, and an operator that writes into it: other names see it."""

    def forward(x):
        y = x * 1
        part = y[:, :3]
        part -= 0.5
        part /= 2
        part += 0.25
        part *= 3
        return abs(y)

    layers = lambda dtype: Sequential(  # noqa: E731
        Dense(FEATURES, 9, rng=0), Scaled(forward, lambda dy, x: dy * 1), Linear(9, OUTPUTS, rng=0)
    )
    results = [
        train(layers("float32"), npnet.Quadratic(), npnet.SGD(0.1), "none", captured, [batch()] * 3)
        for captured in (False, True)
    ]
    assert_same(*results)


class Products(npnet.Layer):
    """A linear map, as people write it; and numbers that come from functions."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.weight = npnet.Parameter(rng.standard_normal((9, 9)).astype(np.float32))
        self.bias = npnet.Parameter(np.zeros(9, np.float32))

    def forward(self, x):
        xp = npnet.array_module(x)
        return x @ self.weight.value.T * xp.sqrt(np.float32(0.5)) + self.bias.value, x

    def backward(self, dy, saved):
        dz = dy * np.sqrt(np.float32(0.5))
        self.weight.accumulate(dz.T @ saved)
        self.bias.accumulate(dy.sum(axis=0))
        return np.matmul(dz, self.weight.value)


@pytest.mark.parametrize("rows", [9, 16])  # a batch of 9 is a square
def test_products_by_an_operator_are_recorded(rows):
    def layers():
        return Sequential(Dense(FEATURES, 9, rng=0), Products(), Linear(9, OUTPUTS, rng=0))

    results = [
        train(layers(), npnet.Quadratic(), npnet.Adam(0.01), "sqrt", captured, [batch(rows)] * 3)
        for captured in (False, True)
    ]
    assert_same(*results)
