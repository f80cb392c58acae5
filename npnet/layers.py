"""Dense layers, and layers in a row."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from npnet.activations import INITIALIZERS, Activation, as_activation
from npnet.backend import Array, array_module, backend_of, get_backend, ones, to_backend
from npnet.checks import check_array, check_float, check_room, check_sizes, check_whole, shown
from npnet.initializers import Initializer, as_initializer, xavier_normal
from npnet.layer import InPlaceLayer, KindError, Layer, LayerCost, LayerError, Saved, ShapeError, both, costs_of
from npnet.layer_rules import read_only, refuse_changed_input
from npnet.model_tree import mode
from npnet.parameter import Parameter
from npnet.random import RNG, as_generator


class Dense(InPlaceLayer):
    """y = f(x W^T + b): a linear map and an activation in one buffer.

    Args:
        in_features, out_features: sizes of a row of x and of y.
        activation: "sigmoid", "tanh", "relu", "identity", "softmax", or an `Activation`.
        initializer: of the weight, by name or a function; by default the one that suits the activation. Biases start at
            zero.
        dtype: of parameters and activations.
        rng: seed or generator.
        backend: where the parameters live; the current backend by default.

    Backward, with dz = dy * f'(z):  dW = dz^T x,  db = sum of dz over the batch,  dx = dz W.
    So it needs x, and y for f'(z), and nothing else: `output_suffices`.
    """

    output_suffices = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str | Activation = "relu",
        *,
        initializer: str | Initializer | None = None,
        dtype: npt.DTypeLike = np.float32,
        rng: RNG = None,
        backend: str | None = None,
    ) -> None:
        self.activation = as_activation(activation)
        self.in_features = in_features = check_whole(in_features, "in_features", least=1)
        self.out_features = out_features = check_whole(out_features, "out_features", least=1)
        dtype = check_float(dtype)
        if initializer is None:
            initializer = INITIALIZERS.get(type(self.activation), xavier_normal)
        check_room(in_features * out_features, f"a weight of {out_features} x {in_features} numbers")
        drawn = as_initializer(initializer)((out_features, in_features), as_generator(rng))
        weight = check_array(drawn, get_backend("numpy"), dtype, "initializer")
        if weight.shape != (out_features, in_features):
            raise ValueError(f"initializer: expected shape {out_features, in_features}, got {weight.shape}")
        # Fortran order makes W.T contiguous: x @ W.T is then up to twice as fast on thin layers.
        self.weight = Parameter(to_backend(np.asfortranarray(weight, dtype), backend))  # (out, in)
        self.bias = Parameter(to_backend(np.zeros(out_features, dtype), backend))  # (out,)

    def __repr__(self) -> str:
        return f"Dense({self.in_features}, {self.out_features}, {self.activation})"

    def parameters(self) -> list[Parameter]:
        return [self.weight, self.bias]

    def forward(self, x: Array) -> tuple[Array, Saved]:
        xp, weight, bias = array_module(x), self.weight.value, self.bias.value
        try:
            usual = x.dtype is weight.dtype is bias.dtype and x.ndim == 2 and len(bias) == self.out_features
            if not (usual and bias.ndim == 1) and (error := self._input_error(x)) is not None:
                raise error
            y = xp.dot(x, weight.T)  # (batch, out)
            self.activation.forward_(y, bias)
        except LayerError:
            raise
        except (AttributeError, TypeError, ValueError) as refused:
            raise (self._input_error(x) or refused) from None
        return y, (x, y)

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array | None:
        x, _ = saved
        xp, weight = array_module(dy), self.weight.value
        dz = self.activation.backward_(dy, saved)  # (batch, out), in the buffer of dy
        self.weight.accumulate(xp.dot(x.T, dz).T)  # (out, in), in Fortran order as the weight
        self.bias.accumulate(xp.dot(ones(xp, len(dz), dz.dtype), dz))  # (out,)
        return xp.dot(dz, weight) if needs_dx else None  # (batch, in)

    def cost(self, shape: tuple[int, int], dtype: np.dtype[Any], needs_dx: bool = True) -> LayerCost:
        batch, features = shape
        if features != self.in_features:
            raise ShapeError(f"{self}: expected rows of {self.in_features} features, got {features}")
        activation = self.activation.cost((batch, self.out_features), dtype)
        product = 2 * batch * self.in_features * self.out_features  # flops
        gradients = sum(parameter.value.nbytes for parameter in self.parameters())
        dx = batch * self.in_features * dtype.itemsize if needs_dx else 0
        return LayerCost(
            activation.output_shape,
            activation.output_bytes,
            gradient_bytes=gradients,
            backward_bytes=max(activation.backward_bytes, gradients + dx),  # the slope is gone before they come
            forward_flops=product + batch * self.out_features + activation.forward_flops,
            backward_flops=product * (1 + needs_dx) + 2 * batch * self.out_features + activation.backward_flops,
        )

    def _added_cost(self, cost: LayerCost, alive: Collection[Parameter]) -> LayerCost:
        added = [parameter.value.nbytes for parameter in self.parameters() if parameter in alive]
        if not added:
            return cost
        gradients, dtype = cost.gradient_bytes, self.weight.value.dtype
        slope = self.activation.cost(cost.output_shape, dtype).backward_bytes
        dx = max(cost.backward_bytes - gradients, 0)  # or what the slope takes more
        kept = gradients - sum(added)
        return cost._replace(gradient_bytes=kept, backward_bytes=max(slope, kept + max([*added, dx])))

    def _input_error(self, x: Array) -> Exception | None:
        """What was wrong with a parameter, or with an ``x`` that the product refused."""
        weight = self.weight.value
        for name, value, shape in (
            ("weight", weight, (self.out_features, self.in_features)),
            ("bias", self.bias.value, (self.out_features,)),
        ):
            expected = f"{self}: {name}.value should be an array of floating-point numbers, of shape {shape}"
            kind = getattr(getattr(value, "dtype", None), "kind", "none")
            if kind not in "fV":
                return KindError(f"{expected}; it is {shown(value) if kind == 'none' else f'of dtype {value.dtype}'}")
            if value.shape != shape:
                return ShapeError(f"{expected}; it has {value.shape}")
            if value.dtype != weight.dtype or backend_of(value) is not backend_of(weight):
                return KindError(f"{self}: weight.value is {weight.dtype}, {name}.value {value.dtype}; make them alike")
        if backend_of(x) is not backend_of(weight):
            return KindError(
                f"{self}: the input is on backend {backend_of(x).name!r}, the weights on {backend_of(weight).name!r}; "
                "move the input with npnet.to_backend"
            )
        if x.ndim != 2 or x.shape[1] != self.in_features:
            return ShapeError(f"{self}: expected rows of shape (batch, {self.in_features}), got {x.shape}")
        if x.dtype == weight.dtype:
            return None
        kinds = f"the input has dtype {x.dtype}, the weights {weight.dtype}"
        return KindError(f"{self}: {kinds}; convert with x.astype({weight.dtype.name!r})")


class Linear(Dense):
    """y = x W^T + b: a `Dense` layer with the identity as its activation, by PyTorch's name.

    Args: as for `Dense`; the initializer is by default Xavier's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        initializer: str | Initializer | None = None,
        dtype: npt.DTypeLike = np.float32,
        rng: RNG = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            in_features, out_features, "identity", initializer=initializer, dtype=dtype, rng=rng, backend=backend
        )

    def __repr__(self) -> str:
        return f"Linear({self.in_features}, {self.out_features})"


class Sequential(Layer):
    """Layers in a row; the chain that a schedule runs over. A layer, or a parameter, may stand in several places.

    >>> model = Sequential(Dense(4, 3, rng=0), Dense(3, 2, "identity", rng=1))
    >>> model.predict(np.ones((5, 4), np.float32)).shape
    (5, 2)
    """

    def __init__(self, *layers: Layer) -> None:
        if not layers:
            raise ValueError("Sequential: expected at least one layer")
        for layer in layers:
            if not isinstance(layer, Layer):
                raise TypeError(f"Sequential: expected layers, got {shown(layer)}")
        self.layers = list(layers)

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.layers))})"

    def children(self) -> dict[str, Layer]:
        return {str(number): layer for number, layer in enumerate(self.layers)}

    def forward(self, x: Array) -> tuple[Array, Saved]:
        saved = []
        for number, layer in enumerate(self.layers):
            try:
                x, kept = both(layer, layer.forward(x))
            except LayerError as error:
                raise error.within(str(number)) from None
            saved.append(kept)
        return x, saved

    def backward(self, dy: Array, saved: Saved) -> Array:
        for number, kept in reversed(list(enumerate(saved))):
            try:
                dy = self.layers[number].backward(dy, kept)
            except LayerError as error:
                raise error.within(str(number)) from None
        return dy

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array | None:
        gradient: Array | None = dy
        for number in reversed(range(len(self.layers))):
            assert gradient is not None, "a layer below needs dx"
            try:
                gradient = self.layers[number].backward_(gradient, saved[number], needs_dx or number > 0)
            except LayerError as error:
                raise error.within(str(number)) from None
        return gradient

    def cost(self, shape: tuple[int, int], dtype: np.dtype[Any], needs_dx: bool = True) -> LayerCost:
        costs = costs_of(self.layers, shape, dtype, needs_dx)
        saved = passing = forward_bytes = backward_bytes = gradients = dx = 0
        for cost, above in zip(costs, [*costs[1:], None], strict=True):
            if above is None:
                forward_bytes = max(forward_bytes, saved + passing + cost.forward_bytes)
                saved += cost.saved_bytes
            else:  # this layer's output is there, the last one's is not yet
                needed = saved + passing + cost.forward_bytes + cost.output_bytes
                forward_bytes = max(forward_bytes, needed - costs[-1].output_bytes)
                held = cost.keeps_output or above.keeps_input
                saved += cost.saved_bytes + (cost.output_bytes if held else 0)
                passing = 0 if held else cost.output_bytes
        for number in reversed(range(len(costs))):
            backward_bytes = max(backward_bytes, gradients + dx + costs[number].backward_bytes)
            gradients += costs[number].gradient_bytes
            if number and not costs[number].in_place:
                dx = costs[number - 1].dy_bytes  # the gradient between the two
        return LayerCost(
            costs[-1].output_shape,
            costs[-1].output_bytes,
            saved_bytes=saved,
            forward_bytes=max(forward_bytes, saved),
            gradient_bytes=gradients,
            backward_bytes=backward_bytes,
            forward_flops=sum(cost.forward_flops for cost in costs),
            backward_flops=sum(cost.backward_flops for cost in costs),
            keeps_input=costs[0].keeps_input,
            keeps_output=costs[-1].keeps_output,
            in_place=all(cost.in_place for cost in costs),
            output_gradient_bytes=costs[-1].output_gradient_bytes,
        )

    def __call__(self, x: Array) -> Array:
        """The output alone, in the mode the model is in: nothing is saved, two activations are alive at a time."""
        x = read_only(x)
        for number, layer in enumerate(self.layers):
            try:
                x = layer(x)
            except LayerError as error:
                raise error.within(str(number)) from None
            except ValueError as error:
                refuse_changed_input(error, f"layer {number}, {layer}")
                raise
        return x

    @np.errstate(over="ignore", invalid="ignore")
    def predict(self, x: Array) -> Array:
        """The output alone, as `__call__`, but always in evaluation: dropout drops nothing."""
        with mode(self, training=False):
            return self(x)


def mlp(
    sizes: Sequence[int],
    activation: str | Activation = "relu",
    output: str | Activation = "identity",
    *,
    initializer: str | Initializer | None = None,
    dtype: npt.DTypeLike = np.float32,
    rng: RNG = None,
    backend: str | None = None,
) -> Sequential:
    """A multi-layer perceptron: dense layers of ``sizes``, the last with the activation ``output``.

    >>> mlp([784, 30, 10])
    Sequential(Dense(784, 30, relu), Dense(30, 10, identity))
    """
    sizes = check_sizes(sizes)
    generator, activation = as_generator(rng), as_activation(activation)
    activations = [activation] * (len(sizes) - 2) + [output]
    return Sequential(
        *(
            Dense(n, m, each, initializer=initializer, dtype=dtype, rng=generator, backend=backend)
            for n, m, each in zip(sizes[:-1], sizes[1:], activations, strict=True)
        )
    )
