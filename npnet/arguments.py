"""What the command line takes: texts turned into sizes, schedules, files and numbers, or refused with a reason."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from npnet import schedules
from npnet.checks import check_number, check_sizes, check_whole

EXAMPLES = {
    "train": """\
examples:
  npnet train                               a deep network on MNIST, with checkpointing
  npnet train --out runs/mnist              and metrics.json, metrics.csv, training.png, model.npz:
                                            npnet.load("runs/mnist/model.npz") gives the model
  npnet train --checkpoint-every 0          the same training without checkpointing
  npnet train --checkpoint-every 4          a checkpoint every 4 layers
  npnet train --memory-budget "8 MB"        the cheapest schedule that keeps to 8 MB
  npnet train --save-every 100 --resume --out runs/mnist    lose at most 100 steps, whatever happens
  mpiexec -n 4 npnet train                  in four processes, which share each batch (pip install 'npnet[mpi]')
  npnet train --classic                     the lab exercise: sigmoid, quadratic cost, in order, eta 3
  npnet train --arch 784,256x4,10 --activation tanh --optimizer sgd --learning-rate 0.1
""",
    "plan": """\
examples:
  npnet plan                                what a step of npnet train takes under the usual strategies
  npnet plan --memory-budget 8MB            and the cheapest schedule for 8 MB, in words
  npnet plan --arch 784,30x50,10 --batch-size 4096 --every 7 --plot plan.png
  npnet plan --memory-budget 8MB --measure --json plan.json
""",
    "compare": """\
examples:
  npnet compare --quick                     a tenth of the data, and fewer rounds
  npnet compare --out runs/report           and report.txt, report.json, a .csv and a .png for each table
""",
    "device": """\
examples:
  npnet device                              what a GPU lacks here, and two 5000 x 5000 matrices multiplied
  npnet device --size 1000 --repeats 20
""",
    "data": """\
examples:
  npnet data                                where MNIST is looked for, and where it is
  npnet data verify                         check every byte of it
  npnet data fetch                          download it into the cache
""",
}
"""What each command's --help ends with."""


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


LESS_MEMORY = {
    "train": "try a smaller --arch or --batch-size",
    "plan": "try a smaller --arch or --batch-size",
    "compare": "try --quick",
    "device": "try a smaller --size",
    "data": "end other programs",
}
"""What each command needs to take less memory."""


def parse_checkpoints(text: str) -> int | str:
    """What --checkpoint-every takes: a number of layers, or the name of a schedule."""
    if text in schedules.MAKERS:
        return text
    try:
        n = int(text)
    except ValueError:
        names = ", ".join(schedules.MAKERS)
        raise ValueError(f"expected a whole number of layers (0: off), or one of {names}, got {text!r}") from None
    return check_whole(n, "the number of layers")


def parse_out(text: str) -> Path:
    """A folder that exists from now on and can be written: found out before the training, not after it."""
    if not text:
        raise ValueError("expected the name of a folder, got an empty text; . is the current one")
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise ValueError(f"cannot write to the folder {text}: it is a file; name another") from None
    except OSError as error:
        raise ValueError(f"cannot write to the folder {text}: {error.strerror or error}") from None
    return folder


def parse_file(text: str) -> Path:
    """A file that can be written: its folder exists from now on."""
    path = Path(text)
    if not text:
        raise ValueError("expected a file to write, got an empty text")
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
