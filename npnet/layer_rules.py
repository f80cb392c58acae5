"""The rules that a layer must keep, or gradients are wrong without a word. A model's first step looks at them.

1. `forward` does not change its input, and `backward` not what was saved: others hold these arrays, too.
2. Run again in the same step with the same input, `forward` gives the same numbers.
3. `forward` remembers nothing that depends on how often it was run: it is run again, and rehearsed. What changes from
   step to step is an `npnet.Buffer`.
4. What `forward` and `backward` return, and the gradients that `backward` adds, are new arrays: others overwrite them.

npnet's own layers keep the rules, which tests show. So only models with a layer of somebody else's are watched, and
only in their first step: every other step costs nothing more. While a model is watched, its layers' methods are
wrapped, wherever they stand; afterwards they are as before.
"""

import re
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np

from npnet.backend import Array
from npnet.checks import shown
from npnet.determinism import OTHER_NUMBERS, LayerRuleError, NondeterministicLayer, digest
from npnet.layer import Layer, Saved, both
from npnet.model_tree import all_layers
from npnet.parameter import Buffer, Parameter

METHODS = ("forward", "backward", "backward_")


def has_foreign_layers(layers: Sequence[Layer]) -> bool:
    """Whether a layer in the chain, or inside one, is not npnet's own, or has a method of somebody else's."""
    return any(_is_foreign(each) for layer in layers for _, each in all_layers(layer))


def _is_foreign(layer: Layer) -> bool:
    kind = type(layer)
    return not kind.__module__.startswith("npnet.") or any(name in vars(layer) for name in METHODS)


@contextmanager
def watched(layers: Sequence[Layer]) -> Iterator[None]:
    """Inside it, the layers that are not npnet's, and those that contain one, are refused if they break a rule.

    Raises:
        LayerRuleError: one does; the message names it, and says what to do.
    """
    places = [place for number, layer in enumerate(layers) for place in all_layers(layer, str(number))]
    counts = Counter(id(layer) for _, layer in places)
    watches = {
        id(layer): _Watch(layer, path, counts[id(layer)] > 1)
        for path, layer in reversed(places)
        if has_foreign_layers([layer])
    }
    try:
        for watch in watches.values():
            watch.begin()
        yield
    finally:
        for watch in watches.values():
            watch.end()


class _Watch:
    """Looks at one layer's calls."""

    repeating = False
    """True on the class while a layer is run once more just to see whether it changes: nothing is compared then."""

    def __init__(self, layer: Layer, path: str, in_several_places: bool) -> None:
        self.layer, self.path, self.in_several_places = layer, path, in_several_places
        self.shapes = set[tuple[int, ...]]()  # of inputs
        self.own = {name: vars(layer)[name] for name in METHODS if name in vars(layer)}
        self.calls: dict[str, Callable[..., Any]] = {name: getattr(layer, name) for name in METHODS}
        self.seen: dict[bytes, bytes] = {}  # of an input -> of the output

    def begin(self) -> None:
        """Wrap the methods."""
        vars(self.layer).update(forward=self._forward, backward=self._backward, backward_=self._backward_)

    def end(self) -> None:
        """The methods as they were."""
        for name in METHODS:
            vars(self.layer).pop(name, None)
        vars(self.layer).update(self.own)

    def _forward(self, x: Array) -> tuple[Array, Saved]:
        before = _remembered(self.layer)
        result = self._unchanged("forward", "its input", [x], x)
        y, saved = both(self.layer, result)
        if _Watch.repeating:
            return result
        self.shapes.add(x.shape)
        found = _hash(y, saved)
        self._check_memory(x, before, found)
        if self.seen.setdefault(digest(x), found) != found:
            raise NondeterministicLayer(f"{self}: {OTHER_NUMBERS}")
        kept = [name for name, array in self._attributes() if _overlap(y, array)]
        if kept and _overlap(y, self._again(x)[0]):
            raise LayerRuleError(
                f"{self}: forward returns an array that the layer keeps ({kept[0]}), and overwrites in its next run; "
                "return a new array"
            )
        return result

    def _again(self, x: Array) -> tuple[Array, Saved]:
        """What one more run returns, which nobody compares."""
        _Watch.repeating = True
        try:
            return both(self.layer, self.calls["forward"](x))
        finally:
            _Watch.repeating = False

    def _backward(self, dy: Array, saved: Saved) -> Array:
        return self._checked_backward("backward", dy, saved)

    def _backward_(self, dy: Array, saved: Saved, needs_dx: bool = True) -> Array | None:
        return self._checked_backward("backward_", dy, saved, needs_dx)

    def _checked_backward(self, name: str, dy: Array, saved: Saved, *needs_dx: bool) -> Any:
        given = list(_arrays(saved))
        dx = self._unchanged(name, "what forward saved", given, dy, saved, *needs_dx)
        self._check_shapes(dx, wanted=not needs_dx or needs_dx[0])
        parameters = {f"{path}.value": each for path, each in self.layer.named_parameters().items()}
        kept = [(path, each.value) for path, each in parameters.items()]
        for path, array in [("what forward saved", each) for each in given] + kept:
            if dx is not None and _overlap(dx, array):
                raise LayerRuleError(
                    f"{self}: backward returns an array that shares its memory with {path}, and that the layers below "
                    "overwrite; return a new array, or a copy"
                )
            self._check_gradients(array, path)
        self._check_gradients(dy, "dy")
        return dx

    def _check_shapes(self, dx: Any, wanted: bool) -> None:
        shape = getattr(dx, "shape", None)
        if (wanted or dx is not None) and shape not in self.shapes:
            got = type(dx).__name__ if shape is None else f"an array of shape {shape}"
            expected = " or ".join(map(str, sorted(self.shapes)))
            raise LayerRuleError(
                f"{self}: backward must return the gradient at the input, an array of shape {expected}; it returned "
                f"{got}"
            )
        for path, each in self.layer.named_parameters().items():
            added = getattr(each.gradient, "shape", None)
            if each.gradient is not None and added != each.value.shape:
                raise LayerRuleError(
                    f"{self}: the gradient of {path} must have its shape {each.value.shape}, summed over the batch; "
                    f"backward added {shown(each.gradient) if added is None else f'one of shape {added}'}"
                )

    def _check_gradients(self, array: Array, what: str) -> None:
        for path, each in self.layer.named_parameters().items():
            if each.gradient is not None and _overlap(each.gradient, array):
                raise LayerRuleError(
                    f"{self}: the gradient that backward adds to {path} shares its memory with {what}, which others "
                    f"overwrite; add a copy: self.{path}.accumulate(gradient.copy())"
                )

    def _unchanged(self, name: str, what: str, arrays: list[Array], *arguments: Any) -> Any:
        """Call the method with arrays that cannot be written to (of another backend: compared afterwards)."""
        locked = [each for each in arrays if isinstance(each, np.ndarray) and each.flags.writeable]
        others = [(each, digest(each)) for each in arrays if not isinstance(each, np.ndarray)]
        for each in locked:
            each.flags.writeable = False
        try:
            result = self.calls[name](*arguments)
        except ValueError as error:
            if "read-only" in str(error) and arrays:
                raise LayerRuleError(_changed(str(self), name, what, error)) from error
            raise
        finally:
            for each in locked:
                each.flags.writeable = True
        if any(digest(each) != before for each, before in others):
            raise LayerRuleError(_changed(str(self), name, what, None))
        return result

    def _check_memory(self, x: Array, before: dict[str, Any], found: bytes) -> None:
        """Refuse a forward that counts its runs: whose attributes change in a second run, too.

        Args:
            before: what the layer remembered before the run.
            found: a hash of what the run gave.
        """
        after = _remembered(self.layer)
        if after == before:
            return
        for name, value in after.items():
            if self.in_several_places and isinstance(value, bytes) and before.get(name) != value:
                raise LayerRuleError(
                    f"{self}: forward keeps self.{name}, and the layer stands in several places of the model: the next "
                    "run overwrites it. Return what backward needs: return y, saved"
                )
        other_numbers = _hash(*self._again(x)) != found
        again, named = _remembered(self.layer), set[str]()
        for name in sorted(again.keys() | after.keys()):
            first, second, attribute = after.get(name), again.get(name), re.split(r"[.\[]", name)[0]
            if first == second or attribute in named:
                continue
            named.add(attribute)
            text = (
                f"{self}: forward changes self.{name} each time it is run, and a layer is run more than once in a step "
                "(under a schedule, in a rehearsal). Keep it in an npnet.Buffer and change that by its update(), which "
                "counts once a step"
            )
            if other_numbers or (isinstance(first, bytes) and isinstance(second, bytes)):
                raise LayerRuleError(text)
            warnings.warn(f"{text}; if it is to count every run, count outside of the layer", stacklevel=2)

    def _attributes(self) -> Iterator[tuple[str, Array]]:
        """The arrays that the layer keeps in attributes of its own, parameters' included."""
        for name, value in vars(self.layer).items():
            for array in _arrays(value):
                yield f"self.{name}", array
        for path, each in self.layer.places():
            yield f"self.{path}.value", each.value

    def __str__(self) -> str:
        return f"layer {self.path}, {self.layer}"


def read_only(x: Array) -> Array:
    """``x``; of an array of NumPy's a view that cannot be written to, so that no layer changes the caller's data."""
    if type(x) is np.ndarray:
        x = x[...]
        x.setflags(write=False)
    return x


def refuse_changed_input(error: ValueError, layer: str) -> None:
    """Say which layer changes its input, if ``error`` is NumPy's refusal to write to a `read_only` array.

    Raises:
        LayerRuleError: it is.
    """
    if "read-only" in str(error):
        raise LayerRuleError(_changed(layer, "forward", "its input", error)) from error


def _changed(layer: str, method: str, what: str, error: BaseException | None) -> str:
    """The message for a layer that changes what it was given."""
    line = "" if error is None else _line_of(error)
    return (
        f"{layer}: {method} changes {what}{line}; others hold that array, too, so their gradients would be wrong. "
        "Compute into a new array: y = x * 2 in place of x *= 2, or x.copy() first"
    )


def _line_of(error: BaseException) -> str:
    """The last line of the traceback that is not npnet's or NumPy's, in brackets."""
    here = Path(__file__).parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if here not in Path(frame.filename).parents and "numpy" not in Path(frame.filename).parts
    ]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


def _hash(y: Array, saved: Saved) -> bytes:
    """A hash of all that a forward pass gave."""
    return b"".join(digest(each) for each in (y, *_arrays(saved)))


def _arrays(value: Any) -> Iterator[Array]:
    """The arrays in ``value``: itself, or those in tuples, lists and dictionaries."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _arrays(each)
    elif _is_array(value):
        yield value


def _is_array(value: Any) -> bool:
    """Whether it is an array of numbers, of any backend's."""
    if isinstance(value, np.generic) or not hasattr(type(value), "shape"):
        return False
    return getattr(getattr(value, "dtype", None), "kind", "O") in "fiubcV"


def _overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share memory, as far as their bounds tell."""
    return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.size > 0 and np.may_share_memory(a, b)


def _remembered(layer: Layer) -> dict[str, Any]:
    """What the layer's plain attributes hold: bytes for numbers that can be computed with, else text."""
    found: dict[str, Any] = {}
    for name, value in vars(layer).items():
        _note(found, name, value)
    return found


def _note(found: dict[str, Any], name: str, value: Any, depth: int = 0) -> None:
    if isinstance(value, dict):
        found[name] = str(len(value))
        for key, each in value.items():
            _note(found, f"{name}[{key!r}]", each, depth)
    elif isinstance(value, (Parameter, Buffer)):
        _note(found, f"{name}.value", value.value)
    elif isinstance(value, (tuple, list, deque)):
        found[name] = str(len(value))
        for number, each in enumerate(value):
            _note(found, f"{name}[{number}]", each, depth)
    elif isinstance(value, (bool, int, str, np.integer)):
        found[name] = str(value)
    elif isinstance(value, (float, np.floating)):
        found[name] = repr(float(value)) if depth else repr(float(value)).encode()  # in an object: a clock, say
    elif _is_array(value):
        found[name] = digest(value)
    elif isinstance(getattr(value, "__dict__", None), dict) and depth < 3:
        if isinstance(value, (Layer, type, ModuleType, FunctionType)):
            return
        for key, each in vars(value).items():
            _note(found, f"{name}.{key}", each, depth + 1)
