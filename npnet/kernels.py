"""A formula as one kernel, for a GPU, where each call by itself is a launch and a way through all of its arrays.

`Kernel` runs a method once on stand-ins that write down what is called (see `npnet.symbols`), and makes C of that. It
does what the calls do, in one launch, and goes through the arrays once: reads each once, and writes it once.

A sum or maximum along the rows is known when a row has been gone through, so what needs it comes in another pass over
the row. A pass computes again whatever it needs of those before, from the inputs: recomputing is cheaper than keeping
here, too, since arithmetic is fast and memory is not.
"""

import functools
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npnet.backend import Array, array_module
from npnet.symbols import EXPRESSIONS, TYPES, CannotFuse, Symbol, Total, Trace, Word

NEUTRAL = {"add": "0", "maximum": "-1 / ({})0"}
"""What a sum, a maximum begins with."""

MOST_NUMBERS = 2**31
"""Of an array: elements are counted in 32 bits, which a GPU divides several times faster than 64."""

MOST_BLOCKS = 2048
"""Of a launch, for each array: enough for a GPU. Else a bias would get as many as its weight, most of them idle."""

MOST_PARTS = 64
"""Arrays of each kind that one launch goes through, at most: a kernel's arguments are 4 kB."""


class Kernel:
    """The C of ``method(*symbols)``, and which of the arrays it writes.

    Args:
        method: is called with a `Symbol` for each array, then for each factor. It may return a `Total`.
        dtypes: of the arrays.
        vectors: which of them are (features,), broadcast over the rows of the others, (batch, features).
        factors: how many numbers follow, which differ from call to call.
        scratch: which of the arrays nobody reads afterwards: they are not written.
        parts: how often the arrays may come, each time of another size: all in one launch.

    Raises:
        CannotFuse: it cannot be written down.
    """

    def __init__(
        self,
        method: Callable[..., Any],
        dtypes: Sequence[np.dtype[Any]],
        vectors: Sequence[bool],
        factors: int = 0,
        scratch: Sequence[int] = (),
        parts: int = 0,
    ) -> None:
        if any(dtype.char not in TYPES or dtype.kind == "b" for dtype in dtypes):
            raise CannotFuse(f"arrays of {', '.join(map(str, dtypes))}")
        self.trace, self.parts = Trace(), parts
        kinds, symbol = [TYPES[dtype.char] for dtype in dtypes], Word if dtypes[0].kind == "u" else Symbol
        arrays = [symbol(self.trace, f"x{i}", dtype) for i, dtype in enumerate(dtypes)]
        self._factor_kind = np.uint64 if symbol is Word else np.float64
        names = [f"({kinds[0]})f{i}" for i in range(factors)]
        self.trace.factors = [symbol(self.trace, name, dtypes[0], per_row=True) for name in names]
        try:
            self.result = method(*arrays, *self.trace.factors)
        except (TypeError, ValueError) as error:  # of operators, of functions of another module
            raise CannotFuse(str(error)) from None
        self.written = [i for i, each in enumerate(arrays) if each.name != f"x{i}" and i not in scratch]
        if any(vectors[i] for i in self.written) or not self.written:
            raise CannotFuse("a vector is written, or nothing")
        self.row_by_row = bool(self.trace.reductions or self.trace.totals)
        if self.row_by_row and parts:
            raise CannotFuse("rows of several arrays")
        pointers = [f"{'' if i in self.written else 'const '}{kind}* a{i}" for i, kind in enumerate(kinds)]
        writes = [f"a{i}[i] = {arrays[i].name};" for i in self.written]
        texts = [*(line.text for line in self.trace.lines), *(each.of for each in self.trace.reductions), *writes]
        used = set(re.findall(r"\w+", " ".join(texts)))
        reads = [f"{kind} x{i} = a{i}[{self._index(vectors[i])}];" for i, kind in enumerate(kinds) if f"x{i}" in used]
        last = max([each.ready for each in self.trace.reductions] + [arrays[i].ready for i in self.written])
        body = self._row_by_row(reads, writes, last) if self.row_by_row else self._flat(reads, writes)
        numbers = [f"{'double' if symbol is Symbol else kinds[0]} f{i}" for i in range(factors)]
        if self.trace.totals:
            pointers.append(f"{kinds[0]}* partial")
        self.source = self._whole(pointers, numbers, body)

    def _index(self, vector: bool) -> str:
        """Where in its array an element is: in C."""
        return "i" if not vector else "c" if self.row_by_row else "i % columns"

    def _flat(self, reads: list[str], writes: list[str]) -> list[str]:
        """A thread for each element, or for several far apart."""
        inside = [*reads, *(line.text for line in self.trace.lines), *writes]
        each = "unsigned int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x"
        return [f"for ({each}) {{", *(f"    {text}" for text in inside), "}"]

    def _row_by_row(self, reads: list[str], writes: list[str], last: int) -> list[str]:
        """LANES threads, side by side, for each row."""
        trace = self.trace
        body = [
            "unsigned int row = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES, lane = threadIdx.x % LANES;",
            "if (row >= n) return;  // with all that it exchanges numbers with",
            *(line.text for line in trace.lines if line.per_row and not line.ready),
        ]
        for number in range(last + 1):
            here = [each for each in trace.reductions if each.ready == number]
            body += [f"{each.kind} {each.name} = {NEUTRAL[each.function].format(each.kind)};" for each in here]
            body += [
                "for (unsigned int c = lane; c < columns; c += LANES) {",
                "    unsigned int i = row * columns + c;",
            ]
            inside = [*reads, *(line.text for line in trace.lines if line.ready <= number and not line.per_row)]
            inside += [f"{each.name} = {EXPRESSIONS[each.function].format(each.of, each.name)};" for each in here]
            body += [f"    {text}" for text in inside + (writes if number == last else [])]
            body.append("}")
            for each in here:
                combined = EXPRESSIONS[each.function].format("other", each.name)
                body += [
                    "for (int d = LANES / 2; d > 0; d /= 2) {",
                    f"    {each.kind} other = __shfl_xor_sync(~0u, {each.name}, d);",
                    f"    {each.name} = {combined};",
                    "}",
                ]
            body += [line.text for line in trace.lines if line.per_row and line.ready == number + 1]
        return body + [
            f"if (!lane) partial[(size_t){i} * n + row] = {each.name};" for i, each in enumerate(trace.totals)
        ]

    def _whole(self, pointers: list[str], numbers: list[str], body: list[str]) -> str:
        start = ["unsigned int n", "unsigned int columns", *pointers]
        head = "#ifndef LANES  // a test may say less\n#define LANES 32\n#endif\n" if self.row_by_row else ""
        if self.parts:
            names = [each.split()[-1] for each in start]
            body = [f"{each} = parts.part[blockIdx.y].{name};" for each, name in zip(start, names, strict=True)] + body
            head += f"typedef struct {{ {'; '.join(start)}; }} Part;\n"
            head += f"typedef struct {{ Part part[{self.parts}]; }} Parts;\n"
            start = ["const __grid_constant__ Parts parts"]  # no thread makes a copy, to look up its part in
        text = "\n    ".join(body)
        return f'{head}extern "C" __global__ void fused({", ".join(start + numbers)}) {{\n    {text}\n}}\n'

    @functools.cached_property
    def compiled(self) -> Any:
        """By CuPy, without joining products to sums: so that the numbers are those of the single calls."""
        import cupy

        return cupy.RawKernel(self.source, "fused", options=("--fmad=false",))

    def __call__(self, arrays: Sequence[Array], factors: Sequence[Any] = ()) -> Any:
        """Do it; returns the number that the method returned, if it did."""
        first = arrays[0]
        columns = first.shape[-1] if first.ndim else 1
        n, numbers = first.size, tuple(map(self._factor_kind, factors))
        if not self.row_by_row:
            if n:
                self.compiled((_blocks(n),), (256,), (np.uint32(n), np.uint32(columns), *arrays, *numbers))
            return None
        n, totals = len(first), len(self.trace.totals)
        partial: Any = [array_module(first).empty((totals, n), first.dtype)] if totals else []
        self.compiled((-(-n // 8),), (256,), (np.uint32(n), np.uint32(columns), *arrays, *partial, *numbers))
        return self.result.value(partial[0].sum(axis=1), factors) if isinstance(self.result, Total) else None

    def of_parts(self, parts: Sequence[Sequence[Any]], factors: Sequence[float]) -> None:
        """Do it for several lists of arrays."""
        sizes = [arrays[0].size for arrays in parts]
        packed = b"".join(
            struct.pack(f"II{len(arrays)}P", size, 1, *(each.data.ptr for each in arrays))
            for arrays, size in zip(parts, sizes, strict=True)
        )
        packed += bytes(len(packed) // len(parts) * (self.parts - len(parts)))
        by_value = np.frombuffer(packed, f"V{len(packed)}")  # CuPy passes an array of size one by value
        grid = _blocks(max(sizes)), len(parts)
        self.compiled(grid, (256,), (by_value, *map(self._factor_kind, factors)))


def _blocks(n: int) -> int:
    """Of 256 threads, for n elements."""
    return min(-(-n // 256), MOST_BLOCKS)
