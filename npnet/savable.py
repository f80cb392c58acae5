"""What can be saved: a model that can say with which arguments it was made, and name its arrays."""

import inspect
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from npnet.archive import write_archive

NOT_SAVED = ("rng", "backend", "initializer")
"""Arguments that say how a model begins, or where: not what it is."""

FLOATS = ("float16", "float32", "float64", "bfloat16")
"""The dtypes that every machine has."""


class Savable:
    """A model that `npnet.load` can make again, from a description that is JSON and from its arrays."""

    def named_parameters(self) -> Mapping[str, Any]:
        """All parameters (`npnet.layer.Parameter`) by name."""
        raise NotImplementedError(f"{type(self).__name__}.named_parameters")

    def named_buffers(self) -> Mapping[str, Any]:
        """All buffers (`npnet.Buffer`) by name."""
        return {}

    def named_arrays(self) -> dict[str, Any]:
        """All parameters and buffers by name: the arrays that a save holds."""
        return {**self.named_parameters(), **self.named_buffers()}

    def shared_places(self) -> dict[str, str]:
        """The paths at which a parameter or buffer stands once more, and the path of its first place."""
        return {}

    def config(self) -> dict[str, Any]:
        """The arguments that make a model like this one, without its numbers.

        By default the attributes that are called like the constructor's arguments (scikit-learn's convention). A class
        of your own keeps to that, or writes this method. (``rng``, ``backend``, ``initializer`` and ``dtype`` need not
        be kept: the arrays say what became of them.)

        Raises:
            TypeError: an argument is not kept in an attribute of its name.
        """
        config: dict[str, Any] = {}
        if type(self).__init__ is object.__init__:
            return config  # of which inspect would make a signature from a text, and 16 kB of garbage
        for name in inspect.signature(type(self)).parameters:
            if name in NOT_SAVED:
                continue
            if hasattr(self, name):
                config[name] = getattr(self, name)
            elif name != "dtype":
                raise TypeError(
                    f"{type(self).__name__} cannot be saved: keep its argument {name!r} in an attribute of that name, "
                    "or give it a method config() that returns the arguments to make it with"
                )
        return config

    def description(self) -> dict[str, Any]:
        """The class's name and `config`, as JSON.

        Raises:
            TypeError: an argument is nothing that JSON can hold.
        """
        kind = kind_of(type(self))
        return {"kind": kind, "config": {name: as_json(each, f"{kind}.{name}") for name, each in self.config().items()}}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to ``path``: its architecture, dtype and arrays, and for a network its schedule.

        Args:
            path: a name that ends in .npz, or in .safetensors (extra ``safetensors``), which PyTorch reads, too: the
                arrays are called as in `named_parameters`, "0.weight" and so on.

        Raises:
            OSError: it could not be written; what was there before is untouched, as after all of these.
            TypeError: a layer of your own does not keep its arguments; see `config`.
            ValueError: the name ends otherwise, or a parameter is infinite or NaN.
            ImportError: .safetensors needs the package safetensors.
        """
        arrays = {name: each.value for name, each in self.named_arrays().items()}
        write_archive(path, {"model": self.description(), **shared_entry(self)}, arrays)


def kind_of(kind: type[Savable]) -> str:
    """What a file calls the class; a notebook's ``Network`` is not mistaken for npnet's."""
    return kind.__name__ if kind.__module__.startswith("npnet.") else f"own.{kind.__name__}"


def shared_entry(model: Savable) -> dict[str, Any]:
    """What a file says of shared parameters: nothing, if there are none."""
    shared = model.shared_places()
    return {"shared": shared} if shared else {}


def as_json(value: Any, name: str) -> Any:
    """``value`` in what JSON has; `npnet.storage` turns it back.

    Raises:
        TypeError: it cannot be.
    """
    if isinstance(value, Savable):
        return value.description()
    if isinstance(value, type) and issubclass(value, np.floating):
        value = np.dtype(value)
    if isinstance(value, np.dtype) and value.name in FLOATS and value.isnative:
        return {"dtype": value.name}
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: as_json(each, f"{name}[{key!r}]") for key, each in value.items()}
    if isinstance(value, (Sequence, np.ndarray)):
        return [as_json(each, f"{name}[{index}]") for index, each in enumerate(value)]
    raise TypeError(f"{name}: {value!r} cannot be saved; expected numbers, texts, lists or layers")


def difference(saved: Any, given: Any, name: str = "", places: tuple[str, str] = ("there", "here")) -> str:
    """The first difference between two descriptions, in words; empty if there is none.

    >>> difference({"epochs": 3, "sizes": [4, 2]}, {"epochs": 3, "sizes": [4, 3]})
    'sizes[1] is 2 there, 3 here'
    """
    if isinstance(saved, dict) and isinstance(given, dict) and saved.keys() == given.keys():
        parts = [(saved[key], given[key], f"{name}.{key}" if name else str(key)) for key in given]
    elif isinstance(saved, list) and isinstance(given, list) and len(saved) == len(given):
        parts = [(a, b, f"{name}[{i}]") for i, (a, b) in enumerate(zip(saved, given, strict=True))]
    else:
        return "" if saved == given else f"{name} is {saved!r} {places[0]}, {given!r} {places[1]}"
    return next(filter(None, (difference(*part, places) for part in parts)), "")
