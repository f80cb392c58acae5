"""What the command line takes: texts turned into sizes, schedules, files and numbers, or refused with a reason."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from npnet import schedules
from npnet.checks import check_number, check_sizes, check_whole
from npnet.schedules import ScheduleLike


def parse_arch(text: str) -> tuple[int, ...]:
    """Layer sizes from "784,30x4,10".

    >>> parse_arch("784,30x2,10")
    (784, 30, 30, 10)
    """
    sizes: list[int] = []
    for part in text.split(","):
        size, times, count = part.partition("x")
        try:
            repeats = int(count) if times else 1
            sizes += [int(size)] * check_whole(repeats, part, least=1)
        except ValueError:
            raise ValueError(f"{text!r}: expected sizes such as 784,30x4,10, but {part!r} is none") from None
    return tuple(check_sizes(sizes))


def parse_checkpoints(text: str) -> ScheduleLike:
    """What --checkpoint-every takes: a number of layers, or the name of a schedule."""
    if text in schedules.MAKERS:
        return text
    try:
        n = int(text)
    except ValueError:
        names = ", ".join(schedules.MAKERS)
        raise ValueError(f"expected a whole number of layers (0: off), or one of {names}, got {text!r}") from None
    check_whole(n, "the number of layers")
    return lambda depth: schedules.every_nth(depth, n)


def parse_out(text: str) -> Path:
    """A folder that exists from now on and can be written: found out before the training, not after it."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to the folder {text}: {error.strerror or error}") from None
    return folder


def parse_file(text: str) -> Path:
    """A file that can be written: its folder exists from now on."""
    path = Path(text)
    if path.is_dir():
        raise ValueError(f"expected a file to write, {text} is a folder")
    parse_out(str(path.parent))
    return path


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse`` as an argparse type, so that the message people read is its own."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def whole(name: str, least: int) -> Callable[[str], int]:
    """Parses a whole number, at least ``least``."""
    return lambda text: check_whole(_converted(int, text), name, least)


def number(name: str) -> Callable[[str], float]:
    """Parses a finite number, at least 0."""
    return lambda text: check_number(_converted(float, text), name)


def _converted(kind: Callable[[str], Any], text: str) -> Any:
    """The number that ``text`` is, or the text, for the check to refuse."""
    try:
        return kind(text)
    except ValueError:
        return text
