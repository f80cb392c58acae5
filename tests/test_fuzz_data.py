"""Damaged and hostile data files: see `tests.test_fuzz_files`."""

from pathlib import Path
from typing import Any

import numpy as np

from npnet.datasets import DataError, load_diabetes, load_mnist
from tests import hostile_files as hostile
from tests.judge import Judge, cases, finish
from tests.mutations import mutated
from tests.small_mnist import random_digits, write


def test_damaged_and_hostile_mnist(folder: Path) -> None:
    digits, others = random_digits(2, 1), random_digits(3, 2, seed=1)
    files = [
        write(folder / f"{number}.npz", arrays, compressed).read_bytes()
        for number, (arrays, compressed) in enumerate([(digits, False), (digits, True), (others, False)])
    ]
    originals = [load_mnist(write(folder, arrays)) for arrays in (digits, others)]

    def check(loaded: Any) -> str:
        (x, y), (x_test, y_test) = loaded
        like = x.shape[1:] == x_test.shape[1:] == (784,) and y.shape[1:] == y_test.shape[1:] == (10,)
        return "" if like and x.min(initial=0) >= 0 and x.max(initial=0) <= 1 else "no digits"

    def check_same(loaded: Any) -> str:
        pairs = [list(zip((*a[0], *a[1]), (*loaded[0], *loaded[1]), strict=True)) for a in originals]
        return "" if any(all(np.array_equal(a, b) for a, b in pair) for pair in pairs) else "other digits"

    with Judge(folder / "mnist.npz", load_mnist, (DataError,)).judging() as judge:
        for rng in cases(1000, "mnist bytes"):
            judge(mutated(rng.choice(files), rng.choice(files), rng), check_same)
        for rng in cases(400, "mnist hostile"):
            arrays = hostile.arrays(digits, rng) if rng.random() < 0.4 else digits
            attack = hostile.bomb(2 * 10**8, digits) if rng.random() < 0.005 else hostile.npz(arrays, rng)
            judge(attack, check)
    finish(judge, "DataError", "read")


CELLS = ("1e400", "nan", "-inf", "1" * 400, "0x10", "1_0", "", " ", "é", "'", "1e300", "9" * 10**5, "\0", "1,2", "2")


def test_damaged_and_hostile_tables(folder: Path) -> None:
    content = (Path(__file__).parents[1] / "data" / "diabetes.csv").read_bytes()
    columns = [line.split(",") for line in content.decode().splitlines()]

    def check(loaded: Any) -> str:
        x, y = loaded
        right = (x.shape, y.shape, x.dtype) == ((768, 8), (768, 1), np.float32)
        return "" if right and np.isfinite(x).all() and np.isin(y, (0, 1)).all() else "no table"

    def read(file: Path) -> Any:
        return load_diabetes(file, np.float32, standardize=True)

    with Judge(folder / "diabetes.csv", read, (DataError,)).judging() as judge:
        for rng in cases(250, "table bytes"):
            judge(mutated(content, content, rng), check)
        for rng in cases(150, "table cells"):
            rows, cell, everywhere = [list(row) for row in columns], rng.choice(CELLS), rng.random() < 0.2
            for row in rows if everywhere else [rng.choice(rows)]:
                row[rng.randrange(9) if not everywhere else 3] = cell
            judge("\n".join(",".join(row) for row in rows).encode(), check)
        judge(b"1," * 10**7, check)
    finish(judge, "DataError", "read")
