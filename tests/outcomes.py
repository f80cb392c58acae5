"""What may come of a call with a hostile argument: an answer, or an error that npnet raised, and nothing changed."""

import dis
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import npnet
from npnet import random
from npnet.layer import Layer, Parameter

PACKAGE = Path(npnet.__file__).parent
DOCUMENTED = (TypeError, ValueError, npnet.TrainingDiverged, npnet.BackendUnavailable)


def fingerprint(value: Any) -> Any:
    """What must not change of an argument: an array's memory, with that of the array whose view it is."""
    if isinstance(value, np.ndarray):
        root = value
        while isinstance(root.base, np.ndarray):
            root = root.base
        return tuple((a.shape, a.strides, str(a.dtype), _memory(a)) for a in (value, root)), value.flags.writeable
    if isinstance(value, Mapping):
        return {key: fingerprint(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [fingerprint(each) for each in value]
    return None


def _memory(array: Any) -> Any:
    plain = np.asarray(array)
    mask = np.ma.getmaskarray(array).tobytes() if isinstance(array, np.ma.MaskedArray) else b""
    return [id(each) for each in plain.flat] if plain.dtype.hasobject else (plain.tobytes(), mask)


def state(args: Mapping[str, Any]) -> Any:
    """What an error must leave as it was: the parameters of models."""
    models = [value for value in args.values() if isinstance(value, (Layer, npnet.Network))]
    layers = [layer for model in models for layer in getattr(model, "layers", [model])]
    return [parameter.value.tobytes() for layer in layers for parameter in layer.parameters()]


def on_purpose(error: BaseException) -> bool:
    """Whether a ``raise`` statement of npnet raised the error, rather than NumPy or the interpreter below it."""
    trace: TracebackType | None = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return PACKAGE in Path(code.co_filename).parents and code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def attempt(call: Callable[..., Any], args: Mapping[str, Any], also: tuple[type[Exception], ...] = ()) -> Any:
    """What ``call(**args)`` gives, or the error that it documents; anything else fails the test."""
    before, models = fingerprint(args), state(args)
    random._state.generator = np.random.default_rng(0)  # whatever draws, draws the same in a second attempt
    np.random.seed(0)
    try:
        with random.one_step(0):
            answer = call(**args)
    except DOCUMENTED + also as error:
        answer = error
    finally:
        random._state.generator = None
    if isinstance(answer, Exception):
        assert on_purpose(answer), f"not npnet's own words: {type(answer).__name__}: {answer}"
        assert len(str(answer)) < 2000, "nobody reads that much"
        assert state(args) == models, f"the error left the model changed: {answer}"
    assert fingerprint(args) == before, "the call changed its argument"
    return answer


def numbers(answer: Any) -> list[Any]:
    """The numbers in an answer, in order."""
    if isinstance(answer, Parameter):
        answer = answer.value
    if isinstance(answer, Mapping):
        answer = list(answer.values())
    if isinstance(answer, (list, tuple)):
        return [number for each in answer for number in numbers(each)]
    if isinstance(answer, (np.ndarray, np.generic, float, int)) and not isinstance(answer, np.ma.MaskedArray):
        array = np.asarray(answer)
        return [array.astype(np.float64)] if array.dtype.kind in "fiub" else []
    return []


def agree(one: Any, other: Any) -> bool:
    """Whether two outcomes are the same error or the same numbers, up to rounding."""
    if isinstance(one, Exception) or isinstance(other, Exception):
        return type(one) is type(other)
    pairs = zip(numbers(one), numbers(other), strict=True)
    with np.errstate(all="ignore"):
        return all(a.shape == b.shape and np.allclose(a, b, 1e-3, 1e-4, equal_nan=True) for a, b in pairs)


def plain(value: Any) -> Any:
    """Arrays, and those in a tuple or list, as fresh C-ordered copies with the same dtype."""
    if isinstance(value, np.ndarray):
        return np.array(value, order="C", subok=False)
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    return value


def faithful(value: Any) -> bool:
    """Whether `plain` says the same: not for masks, nor for matrices, whose product is another."""
    if isinstance(value, (list, tuple)):
        return all(map(faithful, value))
    return not isinstance(value, (np.ma.MaskedArray, np.matrix))
