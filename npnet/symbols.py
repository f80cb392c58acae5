"""Formulas written down instead of computed: each call on a stand-in becomes a line of C.

The formulas of npnet are plain calls on an array module. On a `Symbol`, which has no numbers, a call writes a line, in
which ``out=`` is a new value for a variable: see `npnet.kernels`, where the lines become a kernel.
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from npnet.backend import Array, Backend, register_array_type

EXPRESSIONS = {
    "add": "{} + {}",
    "subtract": "{} - {}",
    "multiply": "{} * {}",
    "divide": "{} / {}",
    "negative": "-{}",
    "reciprocal": "1 / {}",
    "abs": "fabs({})",
    "greater": "{} > {}",
    "greater_equal": "{} >= {}",
    "maximum": "{0} != {0} || {0} > {1} ? {0} : {1}",  # NaN, which is not itself, stays
    "minimum": "{0} != {0} || {0} < {1} ? {0} : {1}",
    "exp": "exp({})",
    "log": "log({})",
    "log1p": "log1p({})",
    "tanh": "tanh({})",
    "sqrt": "sqrt({})",
    "bitwise_and": "{} & {}",
    "bitwise_or": "{} | {}",
    "bitwise_xor": "{} ^ {}",
    "right_shift": "{} >> {}",
}
"""What a call of a function says in C."""

TYPES = {"f": "float", "d": "double", "?": "bool", np.dtype(np.uint64).char: "unsigned long long"}


class CannotFuse(NotImplementedError, AttributeError, TypeError):
    """The method does something that cannot be written down as a kernel."""


class Line(NamedTuple):
    """A variable, and how it is computed."""

    text: str
    ready: int  # the first pass over a row in which it can be computed
    per_row: bool  # computed once a row, before that pass; else for each element, in that pass and those after it


class Reduction(NamedTuple):
    """A variable that is gathered along a row: a sum, or a maximum."""

    name: str
    kind: str  # in C
    function: str  # of `EXPRESSIONS`
    of: str  # the variable that is summed, say
    ready: int  # the pass over the row in which that is done


class Trace:
    """What is written down."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.reductions: list[Reduction] = []
        self.totals: list[Symbol] = []  # one number a row, to be summed over all rows
        self.factors: list[Symbol] = []

    def name(self) -> str:
        """The name of the next variable."""
        return f"v{len(self.lines) + len(self.reductions)}"


class Symbol:
    """Stands for an array: ``name`` is the variable that holds its element by now.

    Args:
        ready: the first pass over a row in which it is known.
        per_row: it is one number for a row.
    """

    __array_ufunc__ = None  # a NumPy number on the left of an operator leaves it to the symbol

    def __init__(self, trace: Trace, name: str, dtype: np.dtype[Any], ready: int = 0, per_row: bool = False) -> None:
        self.trace, self.name, self.dtype, self.ready, self.per_row = trace, name, dtype, ready, per_row

    def __getattr__(self, name: str) -> Any:
        raise CannotFuse(f"a method {name} is called")

    def become(self, other: "Symbol") -> None:
        """From now on its elements are those of ``other``."""
        if other.per_row != self.per_row or other.dtype != self.dtype:
            raise CannotFuse(f"{other.name} is written where {self.name} was")
        self.name, self.ready = other.name, other.ready

    def ravel(self) -> "Symbol":
        """Its elements as they are by now."""
        return copy.copy(self)

    def max(self, axis: int, keepdims: bool) -> "Symbol":
        """The maximum of each row."""
        return self._reduced("maximum", axis, keepdims)

    def sum(self, axis: int | None = None, keepdims: bool = False) -> Any:
        """The sum of each row, or of everything: a `Total`."""
        if axis is not None:
            return self._reduced("add", axis, keepdims)
        self.trace.totals.append(self if self.per_row else self._reduced("add", 1, True))
        number = len(self.trace.totals) - 1
        return Total(self.trace, lambda sums, factors: sums[number])

    def _reduced(self, function: str, axis: int, keepdims: bool) -> "Symbol":
        if axis != 1 or not keepdims or self.per_row:
            raise CannotFuse("reduced in another way than along rows")
        name = self.trace.name()
        self.trace.reductions.append(Reduction(name, TYPES[self.dtype.char], function, self.name, self.ready))
        return Symbol(self.trace, name, self.dtype, self.ready + 1, per_row=True)


class Word(Symbol):
    """Stands for an array of 64 bits, whose formulas are written with operators."""

    def __and__(self, other: Any) -> Any:
        return _call("bitwise_and", self, other)

    def __or__(self, other: Any) -> Any:
        return _call("bitwise_or", self, other)

    def __xor__(self, other: Any) -> Any:
        return _call("bitwise_xor", self, other)

    def __rshift__(self, other: Any) -> Any:
        return _call("right_shift", self, other)

    def __add__(self, other: Any) -> Any:
        return _call("add", self, other)

    def __mul__(self, other: Any) -> Any:
        return _call("multiply", self, other)

    def __ge__(self, other: Any) -> Any:
        return _call("greater_equal", self, other)


class Total:
    """A sum over all rows: its arithmetic is done when the kernel has run."""

    def __init__(self, trace: Trace, value: Callable[[Array, Sequence[float]], Any]) -> None:
        self.trace, self.value = trace, value

    def _later(self, other: Any, combine: Callable[[Any, Any], Any]) -> "Total":
        if isinstance(other, Total):
            value = other.value
        elif isinstance(other, Symbol):
            number = next((i for i, each in enumerate(self.trace.factors) if each is other), None)
            if number is None:
                raise CannotFuse("a sum over all rows, with an array")
            value = lambda sums, factors: factors[number]  # noqa: E731 - one of three
        else:
            value = lambda sums, factors: other  # noqa: E731
        return Total(self.trace, lambda *given: combine(self.value(*given), value(*given)))

    def __add__(self, other: Any) -> "Total":
        return self._later(other, lambda a, b: a + b)

    def __sub__(self, other: Any) -> "Total":
        return self._later(other, lambda a, b: a - b)

    def __mul__(self, other: Any) -> "Total":
        return self._later(other, lambda a, b: a * b)


def _call(function: str, *operands: Any, out: Symbol | None = None) -> Any:
    """Write down ``function(*operands, out=out)``."""
    if function == "dot" and len(operands) == 2 and out is None:  # of what was ravelled
        return _call("multiply", *operands).sum()
    symbols = [each for each in operands if isinstance(each, Symbol)]
    numbers = [each.dtype for each in operands if isinstance(each, (Symbol, np.uint64)) and each.dtype.char != "?"]
    plain = all(isinstance(each, Symbol) or math.isfinite(each) for each in operands)
    if function not in EXPRESSIONS or not plain or len(set(numbers)) != 1:
        raise CannotFuse(f"{function} of {', '.join(map(str, numbers))}")
    trace, dtype = symbols[0].trace, numbers[0]
    texts = [each.name if isinstance(each, Symbol) else _literal(each, dtype) for each in operands]
    dtype = np.dtype(bool) if function.startswith("greater") else dtype
    ready, per_row = max(each.ready for each in symbols), all(each.per_row for each in symbols)
    result = type(symbols[0])(trace, trace.name(), dtype, ready, per_row)
    text = f"{TYPES[dtype.char]} {result.name} = {EXPRESSIONS[function].format(*texts)};"
    trace.lines.append(Line(text, ready, per_row))
    if out is None:
        return result
    out.become(result)
    return out


def _literal(number: Any, dtype: np.dtype[Any]) -> str:
    return f"{int(number)}ULL" if dtype.kind == "u" else f"({TYPES[dtype.char]}){float(number)!r}"


class _Module:
    """The functions that can be written down."""

    def __getattr__(self, name: str) -> Any:
        if name not in EXPRESSIONS and name != "dot":
            raise CannotFuse(name)
        return functools.partial(_call, name)


def _no_host(x: Any) -> Any:
    raise CannotFuse("its numbers are asked for")


for _symbol in (Symbol, Word):
    register_array_type(Backend("fused", _Module(), _symbol, _no_host))
