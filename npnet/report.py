"""Results as tables: printed, and written as CSV, JSON and pictures."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

from npnet.files import write_text

Row: TypeAlias = dict[str, Any]
"""Column -> value."""


TIMES = "Ratios of times are medians of the rounds' ratios, not quotients of the medians: steadier on a busy machine."
"""Stands under tables with times, since the two may contradict each other."""


@dataclass(frozen=True)
class Table:
    """Rows with the same columns. ``name`` is that of its files; ``draw(rows, path)`` makes its picture, if any."""

    name: str
    title: str
    rows: list[Row]
    draw: Callable[[Sequence[Row], Path], None] | None = None

    def __str__(self) -> str:
        columns = list(self.rows[0])
        cells = [columns, *([_cell(row[column]) for column in columns] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([self.title, "", *lines, *(["", TIMES] if "ms a step" in columns else [])])

    def write(self, folder: Path) -> None:
        """name.csv and, if there is something to draw, name.png in ``folder``."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(self.rows[0]))
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(folder / f"{self.name}.csv", text.getvalue())
        if self.draw is not None:
            self.draw(self.rows, folder / f"{self.name}.png")


def write_json(path: Path, content: Any) -> None:
    """``content`` as indented JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def describe_sizes(sizes: Sequence[int]) -> str:
    """Layer sizes for people, repetitions counted.

    >>> describe_sizes([784, 30, 30, 30, 10])
    '784,30x3,10'
    """
    runs = ((size, len(list(run))) for size, run in groupby(sizes))
    return ",".join(f"{size}x{count}" if count > 1 else str(size) for size, count in runs)
