"""What is run again must give the same numbers: a hash of what a layer computed, compared when it is computed again."""

import hashlib
import threading
from collections.abc import Sequence

import numpy as np

from npnet.backend import Array, to_host
from npnet.layer import Layer

OTHER_NUMBERS = (
    "run again with the same input, it gave other numbers; what draws random numbers must draw the same ones within a "
    "step: see npnet.random.draws"
)


class LayerRuleError(RuntimeError):
    """A layer does what makes gradients wrong without a word: see `npnet.layer_rules`."""


class NondeterministicLayer(LayerRuleError):
    """A layer that was run again in the same step gave other numbers: the gradient would be another function's."""


class Checking(threading.local):
    """Whether checkpointed parts compare, even if they were not asked to."""

    always = False


class DeterminismCheck:
    """Remembers a hash of each activation, and compares when it is computed again."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.seen: dict[int, bytes] = {}

    def __call__(self, number: int, activation: Array) -> None:
        found = digest(activation)
        if self.seen.setdefault(number, found) != found:
            raise NondeterministicLayer(f"layer {number - 1}, {self.layers[number - 1]}: {OTHER_NUMBERS}")


def digest(array: Array) -> bytes:
    """A hash of the array's numbers."""
    numbers = np.ascontiguousarray(to_host(array)).reshape(-1)
    return hashlib.blake2b(numbers.view(np.uint8).data).digest()
