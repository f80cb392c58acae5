"""Mixed precision: activations stored in half precision, weights and arithmetic in single; and loss scaling.

A stored activation takes 2 bytes a number instead of 4. On a CPU half precision is for storage only: products of
float16 arrays are two orders of magnitude slower there than of float32. So each layer takes its input up to float32,
computes, and puts its output down to half: the same way in a first run and in a recomputation, so that gradients still
do not depend on the schedule.

Micikevicius et al., "Mixed Precision Training", 2018.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np

from npnet.attributes import Checks, Settings
from npnet.backend import Array, along_rows, array_module, backend_of
from npnet.checkpoint import Checkpoint
from npnet.checks import (
    all_finite,
    check_flag,
    check_float,
    check_kind,
    check_mapping,
    check_number,
    check_whole,
    shown,
)
from npnet.layer import InPlaceLayer, Layer, LayerCost, Saved, both
from npnet.layers import Dense, Sequential
from npnet.optimizers import Optimizer, check_parameters
from npnet.parameter import Buffer, Parameter


def storage_dtype(name: str) -> np.dtype[Any]:
    """The dtype "float16" or "bfloat16".

    Raises:
        ValueError: another name.
        ImportError: bfloat16 needs the package ml_dtypes.
    """
    if not isinstance(name, str) or name not in ("float16", "bfloat16"):
        raise ValueError(f"dtype: expected 'float16' or 'bfloat16', got {shown(name)}")
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError as error:
            raise ImportError("bfloat16 needs the package ml_dtypes: pip install 'npnet[bfloat16]'") from error
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(np.float16)


class Stored(InPlaceLayer):
    """A layer between half-precision activations: up, compute, down.

    Args:
        inner: the layer; its parameters stay as they are.
        dtype: of the output that is stored.
        single: that of the arithmetic.
        down: False for the last layer of a model, whose output goes to the loss as it is.
    """

    def __init__(self, inner: Layer, dtype: np.dtype[Any], single: np.dtype[Any], down: bool = True) -> None:
        if not isinstance(inner, Layer):
            raise TypeError(f"{type(self).__name__}: expected a layer, got {inner!r}")
        if not isinstance(dtype, np.dtype) or not isinstance(single, np.dtype):
            raise TypeError(f"{type(self).__name__}: expected dtypes, got {dtype!r} and {single!r}")
        self.inner, self.dtype, self.single, self.down = inner, storage_dtype(dtype.name), check_float(single), down
        self.output_suffices = inner.output_suffices  # type: ignore[misc]
        features = getattr(inner, "in_features", None)
        if features is not None:
            self.in_features = features

    def __repr__(self) -> str:
        return f"{self.inner} [{self.dtype}]" if self.down else repr(self.inner)

    def places(self, prefix: str = "") -> Iterator[tuple[str, Parameter | Buffer]]:
        return self.inner.places(prefix)  # by the names that the model has without mixed precision

    def _up(self, saved: Any) -> Any:
        """Stored arrays in single precision, within tuples and lists."""
        done: dict[int, Array] = {}  # what is there twice is converted once

        def up(array: Any) -> Any:
            if getattr(array, "dtype", None) != self.dtype:
                return array
            if id(array) not in done:
                done[id(array)] = array.astype(self.single)
            return done[id(array)]

        return _mapped(up, saved)

    def forward(self, x: Array) -> tuple[Array, Saved]:
        single = self._up(x)
        output, kept = both(self.inner, self.inner.forward(single))
        y = output.astype(self.dtype) if self.down else output
        if self.output_suffices:
            return y, (x, y)
        stored = {id(single): x, id(output): y}
        return y, _mapped(lambda array: stored.get(id(array), array), kept)

    def backward(self, dy: Array, saved: Saved) -> Array:
        return self.inner.backward(dy, self._up(saved))

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array | None:
        return self.inner.backward_(dy, self._up(saved), needs_dx)

    def check_gradient(self, dy: Array, y: Array) -> None:
        self.inner.check_gradient(dy, y)

    def cost(self, shape: tuple[int, int], dtype: np.dtype[Any], needs_dx: bool = True) -> LayerCost:
        inner = self.inner.cost(shape, dtype, needs_dx)
        share = self.dtype.itemsize / dtype.itemsize
        up = shape[0] * shape[1] * dtype.itemsize if needs_dx else 0  # the first layer's input is single already
        y = inner.output_bytes if self.down else 0
        kept = y if inner.keeps_output else 0
        return inner._replace(
            output_bytes=round(inner.output_bytes * share) if self.down else inner.output_bytes,
            output_gradient_bytes=inner.dy_bytes,
            forward_bytes=up + y + inner.forward_bytes,
            backward_bytes=(up if inner.keeps_input else 0) + kept + inner.backward_bytes,
        )


class HalfProducts(Stored):
    """A dense layer that also computes in half precision, with half copies of its weights: for GPUs.

    Gradients come in single precision and leave so; between, small ones vanish and large ones overflow: `GradScaler`.
    """

    inner: Dense

    @contextmanager
    def _half_parameters(self) -> Iterator[None]:
        """Inside it, the parameters are half copies of themselves; the gradients they get are added to the old."""
        parameters = self.inner.parameters()
        before = [(parameter.value, parameter.gradient) for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.value, parameter.gradient = _cast(parameter.value, self.dtype), None
            yield
        finally:
            for parameter, (value, gradient) in zip(parameters, before, strict=True):
                fresh, parameter.value, parameter.gradient = parameter.gradient, value, gradient
                if fresh is not None:
                    parameter.accumulate(_cast(fresh, self.single))

    def forward(self, x: Array) -> tuple[Array, Saved]:
        array_module(x)  # refuses what is no array
        if x.dtype not in (self.dtype, self.single):
            return self.inner.forward(x)  # which refuses it
        with self._half_parameters():
            output, _ = self.inner.forward(x.astype(self.dtype, copy=False))
        y = output if self.down else output.astype(self.single)
        return y, (x, y)

    backward = InPlaceLayer.backward

    def backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array | None:
        x, y = (array.astype(self.dtype, copy=False) for array in saved)
        with self._half_parameters():
            dx = self.inner.backward_(dy.astype(self.dtype), (x, y), needs_dx)
        return None if dx is None else dx.astype(self.single)

    def cost(self, shape: tuple[int, int], dtype: np.dtype[Any], needs_dx: bool = True) -> LayerCost:
        """Bytes of backward are an upper bound."""
        single, half = self.inner.cost(shape, dtype, needs_dx), self.inner.cost(shape, self.dtype, needs_dx)
        weights = half.gradient_bytes * self.dtype.itemsize // dtype.itemsize
        x = shape[0] * shape[1] * self.dtype.itemsize
        last = 0 if self.down else half.output_bytes
        dx = 2 * x if needs_dx else -x
        return single._replace(
            output_bytes=half.output_bytes if self.down else single.output_bytes,
            output_gradient_bytes=single.dy_bytes,
            forward_bytes=weights + last + (0 if needs_dx else x),
            backward_bytes=half.output_bytes + last + weights + half.backward_bytes + abs(dx),
        )


def _cast(array: Array, dtype: np.dtype[Any]) -> Array:
    """The array in another dtype, in the layout that it has."""
    return array.T.astype(dtype).T if array.flags.f_contiguous else array.astype(dtype)


def _mapped(function: Callable[[Any], Any], saved: Any) -> Any:
    """What a layer saved, with ``function`` applied to everything within tuples and lists."""
    if isinstance(saved, (tuple, list)):
        parts = [_mapped(function, part) for part in saved]
        return type(saved)(*parts) if hasattr(saved, "_fields") else type(saved)(parts)
    return function(saved)


def mixed_precision(model: Sequential, dtype: str = "float16", half_products: bool | None = None) -> Sequential:
    """The model with its activations stored in half precision, all but the output; it shares the model's layers.

    Models and checkpointed parts inside it are taken layer by layer; what another layer (`Residual`, say) saves besides
    its input and output stays as it is.

    Args:
        model: with float32 (or float64) parameters, the *master weights*.
        dtype: "float16", or "bfloat16" (float32's range with 8 bits of precision; extra ``bfloat16``).
        half_products: dense layers compute in half precision, too; by default on a GPU only, where that is faster.

    Raises:
        TypeError: not a `Sequential`.
        ValueError, ImportError: see `storage_dtype`.
    """
    if not isinstance(model, Sequential):
        raise TypeError(f"mixed_precision: expected a Sequential, got {shown(model)}")
    storage = storage_dtype(dtype)
    if half_products is not None:
        check_flag(half_products, "half_products")
    else:
        half_products = any(backend_of(parameter.value).xp is not np for parameter in model.parameters())
    single = next((parameter.value.dtype for parameter in model.parameters()), np.dtype(np.float32))
    return cast(Sequential, _stored(model, storage, single, False, half_products))


def _stored(layer: Layer, dtype: np.dtype[Any], single: np.dtype[Any], down: bool, half_products: bool) -> Layer:
    """The layer between half-precision activations; models and checkpointed parts layer by layer."""
    if type(layer) is Sequential:
        last = len(layer.layers) - 1
        return Sequential(
            *(_stored(each, dtype, single, down or i < last, half_products) for i, each in enumerate(layer.layers))
        )
    if type(layer) is Checkpoint:
        inner = _stored(layer.inner, dtype, single, down, half_products)
        return Checkpoint(inner, layer.preserve_rng_state, layer.determinism_check)
    return (HalfProducts if half_products and isinstance(layer, Dense) else Stored)(layer, dtype, single, down)


SMALLEST_SCALE = 2.0**-100


class GradScaler(Settings):
    """Dynamic loss scaling: keeps small gradients from vanishing in half precision, and survives those that overflow.

    The loss is multiplied by a factor, the gradients are divided by it again. If one is not finite, the step is skipped
    and the factor made smaller; after ``growth_interval`` good steps in a row it is made larger. As
    ``torch.amp.GradScaler``.

    A loop of one's own, with ``parameters = model.parameters()``; an overflow is skipped, whatever it meets first:

        npnet.add_gradients(model, loss, x, y, weight=scaler.get_scale())
        scaler.unscale(parameters)
        npnet.clip_grad_norm(parameters, 1.0)
        scaler.step(optimizer, parameters)
        scaler.update()
    """

    _checks: ClassVar[Checks] = {
        "growth_factor": partial(check_number, least=1.0),
        "backoff_factor": partial(check_number, least=SMALLEST_SCALE, below=1.0),
        "growth_interval": partial(check_whole, least=1),
    }
    _synonyms: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("scale", "init_scale"), "get_scale() to read it, load_state_dict to set it"),
        "enabled": "scaler=None, for a training without",
    }

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        self._scale = check_number(init_scale, "init_scale", least=SMALLEST_SCALE)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self.good_steps = self.skipped_steps = 0
        self._unscaled: set[Parameter] = set()  # those whose gradients are, for the steps to come
        self._finite: bool | None = None  # all gradients since the last update; None: there were none

    def get_scale(self) -> float:
        """The factor to multiply the loss by: `npnet.add_gradients` takes it as ``weight``."""
        return self._scale

    def unscale(self, parameters: Iterable[Parameter]) -> bool:
        """Divide the gradients by the factor, before `step` (which otherwise does it); returns whether they are finite.

        Raises:
            RuntimeError: it was done already.
        """
        given = check_parameters(parameters)
        if not self._unscaled.isdisjoint(given):
            raise RuntimeError("GradScaler.unscale: the gradients are unscaled already; call step, then update")
        self._unscaled.update(given)
        gradients = [parameter.gradient for parameter in given if parameter.gradient is not None]
        for (gradient,) in map(along_rows, gradients):
            gradient *= 1 / self._scale
        finite = all_finite(gradients)
        self._finite = finite and self._finite is not False
        return finite

    def step(self, optimizer: Optimizer, parameters: Iterable[Parameter]) -> bool:
        """Update, unless a gradient is not finite: then forget them all. Returns whether it was done.

        With several optimizers: a step for each, then one `update`. One overflow skips all steps that follow it.
        """
        check_kind(optimizer, Optimizer, "optimizer", "Adam(1e-3)")
        parameters = check_parameters(parameters)
        self.unscale([each for each in parameters if each not in self._unscaled])
        self._unscaled.difference_update(parameters)
        if self._finite:
            optimizer.step(parameters)
            return True
        optimizer.zero_grad(parameters)
        return False

    def update(self) -> None:
        """After `step`: make the factor smaller if that was skipped, larger if enough of them went well."""
        if self._finite:
            self.good_steps += 1
            if self.good_steps % self.growth_interval == 0 and math.isfinite(self._scale * self.growth_factor):
                self._scale *= self.growth_factor
        elif self._finite is not None:
            self.good_steps, self.skipped_steps = 0, self.skipped_steps + 1
            self._scale = max(self._scale * self.backoff_factor, SMALLEST_SCALE)
        self._unscaled.clear()
        self._finite = None

    def config(self) -> dict[str, float]:
        """How the factor moves."""
        return {name: getattr(self, name) for name in ("growth_factor", "backoff_factor", "growth_interval")}

    def state_dict(self) -> dict[str, float]:
        """What a save has to hold."""
        return {"scale": self._scale, "good_steps": self.good_steps, "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a save.

        Raises:
            TypeError, ValueError: no mapping, an entry is missing, or not a number that can be.
        """
        check_mapping(state, "GradScaler.load_state_dict", "what state_dict() gives")
        missing = {"scale", "good_steps", "skipped_steps"} - set(state)
        if missing:
            raise ValueError(f"GradScaler.load_state_dict: missing {', '.join(sorted(missing))}")
        scale = check_number(state["scale"], "scale", least=SMALLEST_SCALE)
        good, skipped = (check_whole(state[name], name) for name in ("good_steps", "skipped_steps"))
        self._scale, self.good_steps, self.skipped_steps = scale, good, skipped
