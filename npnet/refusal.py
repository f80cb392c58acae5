"""What cannot be recorded, and which line of a layer did it (see `npnet.tracing`)."""

import linecache
import os
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, NoReturn

_LIBRARY = os.path.dirname(os.__file__)  # noqa: PTH120 - the folder of Python's own files
_HOW = "npnet.tracing", "npnet.stand_in", "npnet.into", "npnet.refusal"  # the recording itself


class CannotCapture(NotImplementedError, AttributeError):
    """The function does something that cannot be recorded and done again; the message ends with the line, if it is one
    of a layer, a loss or an optimizer.
    """

    def __init__(self, *said: Any) -> None:
        code_and_line = _line(sys._getframe(1))
        if code_and_line is not None and said:
            code, line = code_and_line
            source = linecache.getline(code.co_filename, line).strip()
            place = f"{code.co_qualname}, {os.path.basename(code.co_filename)}:{line}"  # noqa: PTH119
            said = (f"{said[0]} ({place}{': ' if source else ''}{source})", *said[1:])
        super().__init__(*said)


def _line(frame: FrameType | None) -> tuple[CodeType, int] | None:
    """The innermost line that is not a library's, of those that run while a step is recorded; else npnet's own."""
    inside = list(_recorded(frame))
    own = [each for each in inside if not _in_library(each)]
    return next(((each.f_code, each.f_lineno) for each in own or inside), None)


def _recorded(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames from ``frame`` outwards to the recorder, without it; none, if there is none."""
    frames = list[FrameType]()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name == "npnet.capture":
            yield from frames
            return
        if name not in _HOW:
            frames.append(frame)
        frame = frame.f_back


def _in_library(frame: FrameType) -> bool:
    """Whether its code is npnet's, Python's, or that of a package."""
    file = frame.f_code.co_filename
    ours = frame.f_globals.get("__name__", "").partition(".")[0] == "npnet"
    return ours or file.startswith((_LIBRARY, "<frozen")) or "-packages" in file


class Unrecorded:
    """What an array can do and its stand-in cannot: each is refused by name."""

    __slots__ = ()

    def __getattr__(self, name: str) -> NoReturn:
        raise CannotCapture(f"an array's {name} cannot be recorded")

    def _no_operator(self, *_: Any) -> NoReturn:
        raise CannotCapture("an operator other than + - * / @ cannot be recorded; npnet.array_module's functions can")

    __pow__ = __rpow__ = __ipow__ = __mod__ = __floordiv__ = __invert__ = __and__ = __or__ = _no_operator
    __xor__ = __rmod__ = __rfloordiv__ = __rand__ = __ror__ = __imatmul__ = __imod__ = __ifloordiv__ = _no_operator

    def _looked_at(self, *_: Any, **__: Any) -> NoReturn:
        raise CannotCapture("what decides by the numbers of an array, or takes them away, cannot be recorded")

    __array__ = __bool__ = __float__ = __int__ = __iter__ = __setitem__ = _looked_at
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _looked_at
    __hash__ = object.__hash__
