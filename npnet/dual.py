"""Dual numbers: arrays that carry a derivative along.

A dual array is a value u and a tangent u', the derivative of u in some direction. Arithmetic on duals follows the rules
of calculus: (u v)' = u' v + u v', exp(u)' = u' exp(u), and so on. `Dual` and `DualModule` stand in for an array and its
module (see `npnet.stand_in`). Running the *backward* pass on duals gives the derivative of the gradient, which is what
`npnet.curvature` is about.

Clifford, "Preliminary sketch of biquaternions", 1873; Griewank & Walther, "Evaluating Derivatives", 2008, chapter 3.
"""

import math
from typing import Any, NamedTuple, TypeAlias

from npnet.backend import Array, Backend, array_module, ones, register_array_type, to_host
from npnet.stand_in import StandIn

Tangent: TypeAlias = Array | None
"""None is zero: nothing is computed with it."""


class Dual(StandIn):
    """An array ``value`` and its ``tangent``, of the same shape."""

    __slots__ = ("tangent",)
    __array_ufunc__ = None  # an operation with a NumPy array is ours

    def __init__(self, value: Any, tangent: Tangent = None) -> None:
        super().__init__(value)
        self.tangent = tangent

    @property
    def T(self) -> "Dual":  # noqa: N802 - NumPy's name
        """The transpose."""
        return self._linear(lambda u: u.T)

    def __float__(self) -> float:
        return float(self.value)

    def _linear(self, f: Any) -> "Dual":
        """f(self) for a linear f, which is its own derivative."""
        return Dual(f(self.value), None if self.tangent is None else f(self.tangent))

    def __getitem__(self, index: Any) -> "Dual":
        return self._linear(lambda u: u[index])

    def ravel(self, order: str = "C") -> "Dual":
        """In one row."""
        return self._linear(lambda u: u.ravel(order))

    def reshape(self, *shape: int) -> "Dual":
        """In another shape."""
        return self._linear(lambda u: u.reshape(*shape))

    def astype(self, dtype: Any, order: str = "K", copy: bool = True) -> "Dual":
        """In another dtype; rounding counts as the identity."""
        return self._linear(lambda u: u.astype(dtype, order=order, copy=copy))

    def copy(self, order: str = "C") -> "Dual":
        """A new array."""
        return self._linear(lambda u: u.copy(order))

    def sum(self, axis: int | None = None, keepdims: bool = False) -> "Dual":
        """(u + v)' = u' + v'."""
        return self._linear(lambda u: u.sum(axis=axis, keepdims=keepdims))

    def mean(self, axis: int | None = None, keepdims: bool = False) -> "Dual":
        """As `sum`."""
        return self._linear(lambda u: u.mean(axis=axis, keepdims=keepdims))

    def max(self, axis: int | None = None, keepdims: bool = False) -> "Dual":
        """The maximum as a constant: right only where it is a shift that cancels, as in softmax."""
        return Dual(self.value.max(axis=axis, keepdims=keepdims))


def _split(x: Any) -> tuple[Any, Tangent]:
    """(value, tangent) of anything: what is no dual is a constant."""
    return (x.value, x.tangent) if isinstance(x, Dual) else (x, None)


def _times(tangent: Tangent, factor: Any) -> Tangent:
    return None if tangent is None else tangent * factor


def _plus(a: Tangent, b: Tangent) -> Tangent:
    return b if a is None else a if b is None else a + b


def _result(value: Any, tangent: Tangent, out: Dual | None) -> Dual:
    """The dual array, in place of ``out`` if that is given."""
    if tangent is not None and tangent.shape != value.shape:  # the tangent of a bias, say, on its way to a batch
        tangent = tangent + value * 0
    if out is None:
        return Dual(value, tangent)
    out.value, out.tangent = value, tangent
    return out


class Ones(NamedTuple):
    """A vector of ones to multiply by; which backend it belongs to, the other factor knows."""

    length: int
    dtype: Any


class DualModule:
    """The functions that layers and losses call on an array module, on dual arrays, with their derivatives."""

    def ones(self, length: int, dtype: Any) -> Ones:
        """A constant."""
        return Ones(length, dtype)

    def add(self, x: Any, y: Any, out: Dual | None = None) -> Dual:
        """(u + v)' = u' + v'."""
        (u, du), (v, dv) = _split(x), _split(y)
        return _result(u + v, _plus(du, dv), out)

    def subtract(self, x: Any, y: Any, out: Dual | None = None) -> Dual:
        """(u - v)' = u' - v'."""
        (u, du), (v, dv) = _split(x), _split(y)
        return _result(u - v, _plus(du, _times(dv, -1)), out)

    def multiply(self, x: Any, y: Any, out: Dual | None = None) -> Dual:
        """(u v)' = u' v + u v'."""
        (u, du), (v, dv) = _split(x), _split(y)
        return _result(u * v, _plus(_times(du, v), _times(dv, u)), out)

    def divide(self, x: Any, y: Any, out: Dual | None = None) -> Dual:
        """(u / v)' = u' / v - (u / v) v' / v."""
        (u, du), (v, dv) = _split(x), _split(y)
        quotient = u / v
        below = _times(dv, -quotient / v)
        if below is not None:  # where v is infinite, the quotient stays 0: the sigmoid far below zero
            xp = array_module(below)
            below = xp.where(xp.isinf(v), xp.zeros_like(below), below)
        return _result(quotient, _plus(_times(du, 1 / v), below), out)

    def reciprocal(self, x: Any, out: Dual | None = None) -> Dual:
        """1 / u."""
        return self.divide(1.0, x, out)

    def negative(self, x: Any, out: Dual | None = None) -> Dual:
        """(-u)' = -u'."""
        u, du = _split(x)
        return _result(-u, _times(du, -1), out)

    def exp(self, x: Any, out: Dual | None = None) -> Dual:
        """(e^u)' = e^u u'."""
        u, du = _split(x)
        value = array_module(u).exp(u)
        return _result(value, _times(du, value), out)

    def log(self, x: Any, out: Dual | None = None) -> Dual:
        """(log u)' = u' / u."""
        u, du = _split(x)
        return _result(array_module(u).log(u), _times(du, 1 / u), out)

    def log1p(self, x: Any, out: Dual | None = None) -> Dual:
        """log(1 + u)' = u' / (1 + u)."""
        u, du = _split(x)
        return _result(array_module(u).log1p(u), _times(du, 1 / (1 + u)), out)

    def sqrt(self, x: Any, out: Dual | None = None) -> Dual:
        """(sqrt u)' = u' / (2 sqrt u)."""
        u, du = _split(x)
        value = array_module(u).sqrt(u)
        return _result(value, _times(du, 0.5 / value), out)

    def tanh(self, x: Any, out: Dual | None = None) -> Dual:
        """(tanh u)' = (1 - tanh^2 u) u'."""
        u, du = _split(x)
        value = array_module(u).tanh(u)
        return _result(value, _times(du, 1 - value * value), out)

    def erf(self, x: Any) -> Dual:
        """(erf u)' = 2 / sqrt(pi) e^(-u^2) u'."""
        from npnet.blocks import erf

        u, du = _split(x)
        return _result(erf(u), _times(du, 2 / math.sqrt(math.pi) * array_module(u).exp(-u * u)), None)

    def abs(self, x: Any, out: Dual | None = None) -> Dual:
        """|u|' = sign(u) u'."""
        u, du = _split(x)
        return _result(abs(u), _times(du, array_module(u).sign(u)), out)

    def greater(self, x: Any, y: Any) -> Array:
        """Of the values."""
        (u, _), (v, _) = _split(x), _split(y)
        return array_module(u).greater(u, v)

    def isfinite(self, x: Dual) -> Array:
        """Of the values."""
        return array_module(x.value).isfinite(x.value)

    def maximum(self, x: Any, y: Any, out: Dual | None = None) -> Dual:
        """The derivative of the larger one."""
        (u, du), (v, dv) = _split(x), _split(y)
        return _result(array_module(u).maximum(u, v), _plus(_times(du, u > v), _times(dv, u <= v)), out)

    def minimum(self, x: Any, y: Any, out: Dual | None = None) -> Dual:
        """The derivative of the smaller one; of equal ones the mean."""
        (u, du), (v, dv) = _split(x), _split(y)
        share = ((u < v) + 0.5 * (u == v)).astype(u.dtype)
        return _result(array_module(u).minimum(u, v), _plus(_times(du, share), _times(dv, 1 - share)), out)

    def dot(self, x: Any, y: Any) -> Dual:
        """(U V)' = U' V + U V'."""
        (u, du), (v, dv) = _split(x), _split(y)
        if isinstance(u, Ones):
            u = ones(array_module(v), *u)
        return Dual(u.dot(v), _plus(None if du is None else du.dot(v), None if dv is None else u.dot(dv)))

    def einsum(self, subscripts: str, x: Any, y: Any) -> Dual:
        """The product rule, for any product of two."""
        (u, du), (v, dv) = _split(x), _split(y)
        einsum = array_module(u).einsum
        tangent = _plus(
            None if du is None else einsum(subscripts, du, v), None if dv is None else einsum(subscripts, u, dv)
        )
        return Dual(einsum(subscripts, u, v), tangent)


MODULE = Dual.xp = DualModule()
register_array_type(Backend("dual", MODULE, Dual, lambda x: to_host(x.value)))
