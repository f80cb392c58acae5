"""What stands in for an array: layers, losses and optimizers run on it as they are.

They ask for the module of what they are given (`npnet.array_module`), and get one that does something else than
arithmetic: derivatives (`npnet.dual`), or a record of what is called (`npnet.tracing`).
"""

from operator import attrgetter
from typing import Any, ClassVar


class StandIn:
    """``value`` looks like the array; the operators are functions of the module ``xp``."""

    __slots__ = ("value",)
    xp: ClassVar[Any]

    def __init__(self, value: Any) -> None:
        self.value = value

    shape = property(attrgetter("value.shape"))
    ndim = property(attrgetter("value.ndim"))
    size = property(attrgetter("value.size"))
    dtype = property(attrgetter("value.dtype"))

    def __len__(self) -> int:
        return len(self.value)

    def __add__(self, other: Any) -> Any:
        return self.xp.add(self, other)

    def __sub__(self, other: Any) -> Any:
        return self.xp.subtract(self, other)

    def __rsub__(self, other: Any) -> Any:
        return self.xp.subtract(other, self)

    def __mul__(self, other: Any) -> Any:
        return self.xp.multiply(self, other)

    def __truediv__(self, other: Any) -> Any:
        return self.xp.divide(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self.xp.divide(other, self)

    def __iadd__(self, other: Any) -> Any:
        return self.xp.add(self, other, out=self)

    def __isub__(self, other: Any) -> Any:
        return self.xp.subtract(self, other, out=self)

    def __itruediv__(self, other: Any) -> Any:
        return self.xp.divide(self, other, out=self)

    def __imul__(self, other: Any) -> Any:
        return self.xp.multiply(self, other, out=self)

    def __neg__(self) -> Any:
        return self.xp.negative(self)

    def __abs__(self) -> Any:
        return self.xp.abs(self)

    __radd__, __rmul__ = __add__, __mul__
