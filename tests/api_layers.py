"""Layers, losses and optimizers, called with arguments that are right."""

from collections.abc import Callable
from typing import Any

import numpy as np

import npnet
from npnet.checkpoint import Tape, checkpoint, checkpoint_sequential
from tests.api_calls import DX, DY, MODEL, SGD, X, Y, call, gradients, values, with_gradients

# Layers.


def layer_calls(name: str, make: Callable[[], Any], x: Any, dy: Any) -> None:
    """Forward, backward, and calling it."""

    def forward(x: Any) -> Any:
        with np.errstate(all="ignore"):  # an infinity in gives one out, and NumPy's warning is for the caller
            return make().forward(x)[0]

    def called(x: Any) -> Any:
        with np.errstate(all="ignore"):
            return make()(x)

    def backward(dy: Any) -> Any:
        layer = make()
        _, saved = layer.forward(x)
        with np.errstate(all="ignore"):
            return [layer.backward(dy, saved), *gradients(layer)]

    call(f"{name}.forward", forward, x=x)
    call(f"{name}.__call__", called, x=x)
    call(f"{name}.backward", backward, dy=dy)


for kind in (npnet.Identity, npnet.Sigmoid, npnet.Tanh, npnet.ReLU, npnet.Softmax, npnet.GELU):
    layer_calls(kind.__name__, kind, X, DX)
    call(kind.__name__, kind) if kind is not npnet.GELU else call("GELU", kind, approximate="tanh")
layer_calls("GELU [tanh]", lambda: npnet.GELU("tanh"), X, DX)
layer_calls("Dense", lambda: npnet.Dense(3, 2, "relu", rng=0), X, DY)
layer_calls("Linear", lambda: npnet.Linear(3, 2, rng=0), X, DY)
layer_calls("LayerNorm", lambda: npnet.LayerNorm(3), X, DX)
layer_calls("Dropout", lambda: npnet.Dropout(0.5, rng=0), X, DX)
layer_calls("Dropout [eval]", lambda: npnet.Dropout(0.5, rng=0).eval(), X, DX)
layer_calls("Residual", lambda: npnet.Residual(npnet.Dense(3, 3, "tanh", rng=0)), X, DX)
layer_calls("Residual [Dropout]", lambda: npnet.Residual(npnet.Dropout(rng=0)), X, DX)
layer_calls("Sequential", lambda: npnet.mlp([3, 4, 2], rng=0), X, DY)
layer_calls("Sequential [Dropout]", lambda: npnet.Sequential(npnet.Dropout(rng=0), npnet.GELU()), X, DX)
layer_calls("checkpoint", lambda: checkpoint(npnet.mlp([3, 4, 2], rng=0)), X, DY)
layer_calls("checkpoint [eval]", lambda: checkpoint(npnet.mlp([3, 4, 2], rng=0)).eval(), X, DY)
layer_calls("mixed_precision", lambda: npnet.mixed_precision(npnet.mlp([3, 4, 2], rng=0)), X, DY)
layer_calls("mixed_precision [products]", lambda: npnet.mixed_precision(MODEL, half_products=True), X, DY)
call("Sequential.predict", lambda x: npnet.mlp([3, 4, 2], rng=0).predict(x), x=X)

OPTIONS = {"initializer": "normal", "dtype": np.float32, "rng": 0, "backend": "numpy"}
call("Dense", lambda **o: values(npnet.Dense(**o)), in_features=3, out_features=2, activation="relu", **OPTIONS)
call("Linear", lambda **o: values(npnet.Linear(**o)), in_features=3, out_features=2, **OPTIONS)
call("LayerNorm", lambda **o: values(npnet.LayerNorm(**o)), features=3, eps=1e-5, dtype=np.float32, backend="numpy")
call("Dropout", lambda **o: npnet.Dropout(**o).key, p=0.5, rng=0)
call("Residual", npnet.Residual, inner=npnet.Tanh())
call("Sequential", lambda first, second: npnet.Sequential(first, second), first=npnet.Tanh(), second=npnet.ReLU())
call("mlp", lambda **o: values(npnet.mlp(**o)), sizes=[3, 4, 2], activation="relu", output="identity", **OPTIONS)
call("checkpoint", checkpoint, part=npnet.Tanh(), preserve_rng_state=True, determinism_check=False)
call("mixed_precision", npnet.mixed_precision, ImportError, model=MODEL, dtype="float16", half_products=False)
call(
    "checkpoint_sequential",
    lambda **o: checkpoint_sequential(**o)[0],
    functions=MODEL,
    segments=2,
    x=X,
    preserve_rng_state=True,
)
call("checkpoint_sequential [list]", lambda **o: checkpoint_sequential(**o)[0], functions=MODEL.layers, segments=2, x=X)
call("Tape.backward", np.errstate(all="ignore")(lambda dy: _tape().backward(dy)), dy=DY)


def _tape() -> Tape:
    return checkpoint_sequential(npnet.mlp([3, 4, 2], rng=0), 2, X)[1]


# The base classes are there to be inherited from.
call("Layer", npnet.Layer)
call("Layer.forward", lambda x: npnet.Layer().forward(x), NotImplementedError, x=X)
call("Layer.backward", lambda dy: npnet.Layer().backward(dy, None), NotImplementedError, dy=X)
call("Layer.check_gradient", lambda dy, y: npnet.Tanh().check_gradient(dy, y), dy=DX, y=X)
call("Layer.check_input", lambda x: npnet.Tanh().check_input(x), x=X)
call("Softmax.check_input", lambda x: npnet.Softmax().check_input(x), x=X)
call("Layer.train", lambda mode: npnet.Tanh().train(mode), mode=True)
call("Layer.load_state_dict", lambda self_, state: self_.load_state_dict(state), self_=MODEL, state=MODEL.state_dict())
call("Activation", npnet.Activation)
call("Activation.forward", lambda x: npnet.Activation().forward(x), NotImplementedError, x=X)
call("Loss", npnet.Loss)
call("Loss.value_and_gradient", lambda x: npnet.Loss().value_and_gradient(x, x), NotImplementedError, x=X)
call("Optimizer", npnet.Optimizer)
call("Parameter", npnet.Parameter, value=X)
call("Buffer", lambda value: npnet.Buffer(value).value, value=X)


def updated(function: Any) -> Any:
    """A buffer's value after a step with this function."""
    buffer = npnet.Buffer(np.zeros(3))
    buffer.update(function)
    return buffer.value


call("Buffer.update", updated, function=lambda value: value + 1)


# Losses.


def loss_calls(kind: type[npnet.Loss]) -> None:
    """Value, gradient, and what targets it takes."""

    def quiet(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(**options: Any) -> Any:
            with np.errstate(all="ignore"):
                return function(**options)

        return wrapped

    call(kind.__name__, kind)
    call(f"{kind.__name__}.value_and_gradient", quiet(kind().value_and_gradient), output=DY, target=Y)
    call(f"{kind.__name__}.__call__", quiet(kind()), output=DY, target=Y)
    call(f"{kind.__name__}.check_targets", quiet(kind().check_targets), targets=Y, features=2)
    call(f"{kind.__name__}.check_model", quiet(kind().check_model), model=npnet.mlp([2, 3, 2], rng=0))


for kind in (npnet.Quadratic, npnet.MeanSquaredError, npnet.SoftmaxCrossEntropy, npnet.BCEWithLogits):
    loss_calls(kind)


# Optimizers.


def stepped(optimizer: npnet.Optimizer, parameters: Any) -> Any:
    """The values after a step."""
    optimizer.step(parameters)
    return [parameter.value for parameter in parameters]


call("SGD", npnet.SGD, learning_rate=0.1, momentum=0.9, weight_decay=0.1)
call("SGD.step", lambda parameters: stepped(npnet.SGD(0.1, 0.9, 0.1), parameters), parameters=with_gradients())
call("Adam", npnet.Adam, learning_rate=0.1, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.0)
call("Adam.step", lambda parameters: stepped(npnet.Adam(), parameters), parameters=with_gradients())
call("Optimizer.step", lambda parameters: npnet.Optimizer().step(parameters), NotImplementedError, parameters=[])
call("Optimizer.held", lambda parameters: npnet.Adam().held(parameters), parameters=with_gradients())
call("Optimizer.zero_grad", lambda parameters: npnet.SGD(1.0).zero_grad(parameters), parameters=with_gradients())
call("clip_grad_norm", npnet.clip_grad_norm, parameters=with_gradients(), max_norm=1.0, error_if_nonfinite=True)
call(
    "GradScaler",
    lambda **o: npnet.GradScaler(**o).get_scale(),
    init_scale=2.0,
    growth_factor=2.0,
    backoff_factor=0.5,
    growth_interval=3,
)
call("GradScaler.unscale", lambda parameters: npnet.GradScaler().unscale(parameters), parameters=with_gradients())
call("GradScaler.step", lambda **o: npnet.GradScaler().step(**o), optimizer=SGD, parameters=with_gradients())
call(
    "GradScaler.load_state_dict",
    lambda state: npnet.GradScaler().load_state_dict(state),
    state=npnet.GradScaler().state_dict(),
)
call("GradScaler.load_state_dict [scale]", lambda v: npnet.GradScaler().load_state_dict(_scaler(scale=v)), v=1.0)
call("GradScaler.load_state_dict [steps]", lambda v: npnet.GradScaler().load_state_dict(_scaler(good_steps=v)), v=1)


def _scaler(**entry: Any) -> Any:
    return {**npnet.GradScaler().state_dict(), **entry}
