"""Loading what was saved: models are made again from a description, without running anything that a file says."""

import inspect
import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, cast

import numpy as np

from npnet.activations import ACTIVATIONS
from npnet.archive import SaveError, read_archive
from npnet.backend import Array, backend_of, get_backend, to_backend
from npnet.blocks import GELU, Dropout, LayerNorm, Residual
from npnet.checkpoint import Checkpoint
from npnet.checks import check_room, shown
from npnet.layer import Layer, put_values
from npnet.layers import Dense, Linear, Sequential
from npnet.model_tree import share
from npnet.network import Network
from npnet.network_with_checkpointing import NetworkWithCheckpointing
from npnet.parameter import Buffer, Parameter
from npnet.precision import HalfProducts, Stored, storage_dtype
from npnet.random import kept_streams
from npnet.savable import NOT_SAVED, Savable, kind_of
from npnet.schedule import Schedule

KINDS: dict[str, type[Savable]] = {
    kind.__name__: kind
    for kind in (
        *ACTIVATIONS.values(),
        *(Dense, Linear, Sequential, Dropout, LayerNorm, GELU, Residual, Checkpoint, Stored, HalfProducts),
        *(Network, NetworkWithCheckpointing),
    )
}
"""What a file may name: it is looked up here, never imported."""


def load(path: str | os.PathLike[str], *, classes: Iterable[type[Savable]] = (), backend: str | None = None) -> Any:
    """The model that was saved to ``path``, by its `save` or in training (`npnet.Saver`).

    Args:
        classes: layers and networks of your own that are in it.
        backend: where its arrays shall live; the current backend by default.

    Raises:
        TypeError, ValueError: the path is no name of an .npz or .safetensors file, or ``classes`` are no classes.
        FileNotFoundError, OSError: there is no such file, or it cannot be read.
        SaveError: it is truncated, damaged, from a newer version, not npnet's, or names a class that is neither
            npnet's nor in ``classes``.
        ImportError: .safetensors needs the package safetensors, bfloat16 the package ml_dtypes.
        ValueError, BackendUnavailable: see `npnet.get_backend`.
    """
    try:
        classes = tuple(classes)
        if not all(isinstance(each, type) and issubclass(each, Savable) for each in classes):
            raise TypeError
    except TypeError:
        raise TypeError(f"classes: expected a list of layers' or networks' classes, got {shown(classes)}") from None
    description, arrays = read_archive(path)
    return model_of(path, description, arrays, classes, backend)


def model_of(
    path: str | os.PathLike[str],
    description: Mapping[str, Any],
    arrays: Mapping[str, Array],
    classes: Iterable[type[Savable]] = (),
    backend: str | None = None,
) -> Savable:
    """The model in a file that `npnet.archive.read_archive` has read.

    Raises:
        SaveError: as for `load`.
    """
    own, backend = {kind_of(each): each for each in classes}, get_backend(backend).name
    known = KINDS | own
    arrays = {name: array for name, array in arrays.items() if "/" not in name}  # the others are the optimizer's
    try:
        said = description["model"]
        shared = _shared(description, arrays)
        numbers = sum(array.size for array in arrays.values()) + sum(arrays[first].size for first in shared.values())
        if _numbers_in(said, known) > numbers:
            raise ValueError("it describes more parameters than it holds")
        check_room(numbers, "the model")
        dtype = next((array.dtype for array in arrays.values() if array.dtype.kind == "f"), np.dtype(np.float32))
        with kept_streams() if own else nullcontext():  # classes of one's own draw first weights from anywhere
            model = _build(said, known, {"dtype": dtype, "backend": backend, "rng": 0, "initializer": "zeros"})
        if not isinstance(model, Savable):
            raise ValueError("it describes no model")
        if isinstance(model, Layer):
            share(model, shared)
        put(model.named_arrays(), arrays)
        if isinstance(model, Network) and any(array.dtype != model._npnet.dtype for array in arrays.values()):
            raise ValueError(f"it says {model._npnet.dtype}, but holds other numbers")
    except SaveError as error:
        raise SaveError(f"{path}: {error}") from None
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # whatever a constructor says of arguments that make no sense
        raise SaveError(f"{path}: it does not describe a model ({type(error).__name__}: {error})") from error
    return model


def _shared(description: Mapping[str, Any], arrays: Mapping[str, Array]) -> dict[str, str]:
    """Which paths share a parameter with which, as `npnet.savable.shared_entry` wrote it.

    Raises:
        ValueError: it makes no sense.
    """
    shared = description.get("shared", {})
    if not isinstance(shared, dict) or not all(isinstance(first, str) and first in arrays for first in shared.values()):
        raise ValueError("it shares parameters that it does not hold")
    return shared


def put(own: Mapping[str, Parameter | Buffer], arrays: Mapping[str, Array]) -> None:
    """Make ``arrays`` the values of parameters and buffers, as they are: their layout decides how products round.

    Raises:
        ValueError: names or shapes differ, or an array does not hold numbers of the kind; nothing is changed.
    """
    differing = own.keys() ^ arrays.keys()
    if differing:
        raise ValueError(f"parameters {', '.join(sorted(differing))} are in the file or in the model, but not in both")
    for name, each in own.items():
        array, value = arrays[name], each.value
        if array.shape != value.shape or array.dtype.kind != (value.dtype.kind if isinstance(each, Buffer) else "f"):
            raise ValueError(f"{name}: the file has {array.dtype} {array.shape}, the model {value.dtype} {value.shape}")
    put_values({each: to_backend(arrays[name], backend_of(each.value).name) for name, each in own.items()})


def _numbers_in(said: Any, known: Mapping[str, type[Savable]]) -> int:
    """How many parameters a description makes, before any is made."""
    if isinstance(said, list):
        return sum(_numbers_in(each, known) for each in said)
    if not isinstance(said, dict):
        return 0
    count = sum(_numbers_in(each, known) for each in said.values())
    kind, config = said.get("kind"), said.get("config")
    if isinstance(kind, str) and isinstance(config, dict):
        made, sizes = known.get(kind, Savable), list[Any]()
        if issubclass(made, Network):
            sizes = config.get("sizes", [])
        elif issubclass(made, Dense):
            sizes = [config.get("in_features", 0), config.get("out_features", 0)]
        elif issubclass(made, LayerNorm):
            sizes = [1, config.get("features", 0)]
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError("sizes: expected whole numbers")
        count += sum(n * m + m for n, m in pairwise(sizes))
    return count


def _build(said: Any, known: Mapping[str, type[Savable]], defaults: Mapping[str, Any]) -> Any:
    """What `npnet.savable.as_json` wrote, as it was: models, dtypes, schedules, and plain values."""
    if isinstance(said, list):
        return [_build(each, known, defaults) for each in said]
    if not isinstance(said, dict):
        return said
    if said.keys() == {"dtype"}:
        name = said["dtype"]
        return np.dtype(name) if name in ("float32", "float64") else storage_dtype(name)
    if said.keys() - {"offload_to"} == {"actions", "depth", "name", "needs_saved"}:
        return Schedule(**cast(dict[str, Any], said))
    if said.keys() != {"kind", "config"}:
        return {name: _build(each, known, defaults) for name, each in said.items()}
    kind, config = said["kind"], {name: _build(each, known, defaults) for name, each in said["config"].items()}
    if kind not in known:
        name = kind.removeprefix("own.")
        raise SaveError(
            f"it needs a class {name} that is not npnet's; if it is yours: npnet.load(path, classes=[{name}])"
        )
    if not config.keys().isdisjoint(NOT_SAVED):
        raise ValueError(f"{kind} with {', '.join(config)}")
    taken = inspect.signature(known[kind]).parameters
    layers: list[Any] = []
    for name, each in taken.items():
        if each.kind is each.VAR_POSITIONAL:
            layers = config.pop(name, [])
        elif each.kind is each.VAR_KEYWORD:
            config |= config.pop(name, {})
    return known[kind](*layers, **{name: each for name, each in defaults.items() if name in taken} | config)
