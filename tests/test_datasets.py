"""Data sets: found where they should be, whole, ready to train on."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import datasets
from npnet.datasets import DataError, load_mnist, one_hot, read_mnist, verify_mnist
from tests.small_mnist import equal, random_digits, real_mnist, write

DATA = Path(__file__).parents[1] / "data"


# What is loaded.


def test_mnist_is_scaled_rows_and_one_hot_labels(mnist: Any) -> None:
    raw = real_mnist()
    for (x, y), part, samples in zip(mnist, ("train", "test"), (60000, 10000), strict=True):
        assert (x.shape, y.shape) == ((samples, 784), (samples, 10))
        assert (x.dtype, y.dtype) == (np.float64, np.float64)
        assert (x.min(), x.max()) == (0.0, 1.0)
        np.testing.assert_array_equal(np.round(x[:500] * 255), raw[f"x_{part}"][:500].reshape(500, 784))
        np.testing.assert_array_equal(y.argmax(axis=1), raw[f"y_{part}"])
        assert set(np.unique(y)) == {0.0, 1.0}
        assert (y.sum(axis=1) == 1).all()
    assert mnist[0][1][:3].argmax(axis=1).tolist() == [5, 0, 4]  # as everybody's first three digits


@pytest.mark.parametrize("dtype", [np.float32, np.float64, "float32"])
def test_dtype_is_that_of_all_four_arrays(tmp_path: Path, dtype: Any) -> None:
    arrays = random_digits()
    (x, y), (x_test, y_test) = load_mnist(write(tmp_path, arrays), dtype=dtype)
    assert {array.dtype for array in (x, y, x_test, y_test)} == {np.dtype(dtype)}
    np.testing.assert_array_equal(x_test, arrays["x_test"].reshape(3, 784).astype(dtype) / 255)
    assert all(array.flags.c_contiguous for array in (x, y, x_test, y_test))


# Where it is looked for.


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The three folders that are searched, in order, all of them this test's own; but for the first, not there yet."""
    (tmp_path / "chosen").mkdir()
    monkeypatch.setenv("NPNET_DATA", str(tmp_path / "chosen"))
    monkeypatch.setattr(datasets, "__file__", str(tmp_path / "repository" / "npnet" / "datasets.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return [tmp_path / "chosen", tmp_path / "repository" / "data", tmp_path / "xdg" / "npnet"]


def test_the_repositorys_folder_is_searched() -> None:
    assert DATA in datasets.data_folders()


def test_the_first_place_that_has_it_is_taken(places: list[Path]) -> None:
    assert datasets.data_folders() == places
    for seed, place in reversed(
        list(enumerate(places))
    ):  # from the last place on: each new file goes before the others
        file = write(place, random_digits(seed=seed))
        assert datasets.find_mnist() == file
        assert equal(read_mnist(), random_digits(seed=seed))
    elsewhere = write(places[0].parent / "elsewhere" / "digits.npz", random_digits(seed=3))
    for path in (elsewhere, str(elsewhere)):  # a file of any name
        assert equal(read_mnist(path), random_digits(seed=3))
    assert equal(read_mnist(places[2]), random_digits(seed=2))  # a folder


def test_the_cache_is_in_the_home_folder_unless_xdg_says_otherwise(
    places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("NPNET_DATA")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert datasets.data_folders() == [places[1], tmp_path / "home" / ".cache" / "npnet"]
    monkeypatch.setenv("NPNET_DATA", "")  # is as good as none
    assert len(datasets.data_folders()) == 2


@pytest.mark.parametrize("read", [load_mnist, read_mnist, verify_mnist, datasets.find_mnist])
def test_a_missing_file_is_said_with_every_place_and_what_to_do(places: list[Path], read: Callable[..., Any]) -> None:
    with pytest.raises(FileNotFoundError) as error:
        read()
    for text in (*(str(place / "mnist.npz") for place in places), "npnet data fetch", "copy data/mnist.npz"):
        assert text in str(error.value)
    write(places[1], random_digits())
    for path, file in ((places[0] / "a.npz", "a.npz"), (places[0].parent, "mnist.npz")):  # no other place will do
        with pytest.raises(FileNotFoundError, match=rf"no MNIST file at \S*{file}; get it with `npnet data fetch`"):
            read(path)
    places[2].joinpath("mnist.npz").mkdir(parents=True)  # a folder of that name is no file
    with pytest.raises(FileNotFoundError):
        read(places[2])


@pytest.mark.parametrize("chosen", ["nowhere", "a file", "n" * 5000])
def test_a_chosen_folder_that_is_not_there_is_not_passed_over(
    places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    write(places[1], random_digits())
    (tmp_path / "a file").write_bytes(b"")
    assert (
        datasets.find_mnist() == places[1] / "mnist.npz"
    )  # the folder is there, without a file: the next one is asked
    monkeypatch.setenv("NPNET_DATA", str(tmp_path / chosen))
    for search in (load_mnist, npnet.load_diabetes):
        with pytest.raises(FileNotFoundError, match=rf"^NPNET_DATA=\S*{chosen}: there is no such folder; .*unset it$"):
            search()
    assert datasets.find_mnist(places[1]) == places[1] / "mnist.npz"  # named by the caller, it needs no variable


# Whether it is the real one.


def test_every_byte_of_the_repositorys_mnist_is_right() -> None:
    assert verify_mnist(DATA) == DATA / "mnist.npz"


@pytest.mark.parametrize(("name", "place"), [("x_test", (9999, 27, 27)), ("y_train", (0,))])
def test_a_single_other_byte_is_found(tmp_path: Path, name: str, place: tuple[int, ...]) -> None:
    other = real_mnist()[name].copy()
    other[place] ^= 1
    file = write(tmp_path, {**real_mnist(), name: other})
    with pytest.raises(DataError, match=f"{name} is not MNIST's.*expected .*{datasets.MNIST_ARRAYS[name][1][:8]}"):
        verify_mnist(file)
    read_mnist(file)  # but it can be read


def test_a_part_of_mnist_is_not_mnist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x_train is not MNIST's: shape \(6, 28, 28\).* expected \(60000, 28, 28\)"):
        verify_mnist(write(tmp_path, random_digits()))


def test_the_data_folders_readme_tells_the_truth() -> None:
    text = (DATA / "README.md").read_text(encoding="utf-8")
    for name, (shape, digest) in datasets.MNIST_ARRAYS.items():
        assert f"| `{name}` | {shape} | `{digest}` |" in text
    csv = (DATA / "diabetes.csv").read_bytes()
    assert hashlib.sha256(csv).hexdigest() in text
    table = np.loadtxt(csv.decode().splitlines(), delimiter=",")
    assert table.shape == (768, 9)
    assert "768 rows, 8 features, binary target last, no header" in text
    assert set(table[:, 8]) == {0.0, 1.0}
    zeros = re.search(r"(\d+) in glucose, (\d+) in .*?, (\d+) in .*?, (\d+)\s+in\s+insulin, (\d+) in body", text)
    assert zeros is not None
    assert [int(count) for count in zeros.groups()] == (table[:, 1:6] == 0).sum(axis=0).tolist()
    assert (table[:, 1:6] == 0).sum(axis=0).tolist() == [5, 35, 227, 374, 11]


# Labels and batches.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("labels", [[2, 0, 1, 2], np.array([2, 0, 1, 2], np.uint8), (2, 0, 1, 2)])
def test_one_hot_puts_a_one_at_each_label(labels: Any, dtype: Any) -> None:
    rows = one_hot(labels, 4, dtype)
    np.testing.assert_array_equal(rows, np.eye(4)[[2, 0, 1, 2]])
    assert rows.dtype == dtype


def test_one_hot_of_no_labels_has_no_rows() -> None:
    assert one_hot(np.array([], int), 3).shape == (0, 3)


@pytest.mark.parametrize(
    ("labels", "classes", "error", "message"),
    [
        ([0, 3], 3, ValueError, r"values from 0 to 2, got array\(\[0, 3\]\)"),
        ([-1, 0], 3, ValueError, "values from 0 to 2"),
        ([[0], [1]], 3, ValueError, r"expected shape \(samples,\)"),
        (1, 3, ValueError, r"expected shape \(samples,\)"),
        ([0.0, 1.0], 3, TypeError, "expected whole numbers, got dtype float64"),
        ([True, False], 3, TypeError, "expected whole numbers, got dtype bool"),
        (["0"], 3, TypeError, "expected whole numbers"),
        ([0], 0, ValueError, "classes: expected a whole number, at least 1, got 0"),
        ([0], 2.0, TypeError, r"classes: expected a whole number, at least 1, got 2\.0"),
    ],
)
def test_one_hot_refuses_what_are_no_labels(labels: Any, classes: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        one_hot(labels, classes)


def numbered(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Each sample's number, as x and, negative, as y."""
    x = np.arange(float(samples)).reshape(-1, 1)
    return x, -x


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [1, 3, 5, 10, 11])
def test_batches_hold_every_sample_once_beside_its_target(size: int, shuffle: bool) -> None:
    drawn = list(npnet.batches(*numbered(10), size, 0, shuffle))
    assert [len(x) for x, _ in drawn] == [size] * (10 // size) + ([10 % size] if 10 % size else [])
    assert all(np.array_equal(x, -y) for x, y in drawn)
    order = np.concatenate([x for x, _ in drawn]).ravel().tolist()
    assert sorted(order) == list(range(10))
    assert (order == list(range(10))) == (not shuffle)


def test_batches_are_shuffled_by_their_seed() -> None:
    def order(rng: Any) -> list[float]:
        return [float(x[0, 0]) for x, _ in npnet.batches(*numbered(50), 1, rng)]

    generator = np.random.default_rng(1)
    assert order(1) == order(1) == order(generator)
    assert order(1) != order(2)
    assert order(1) != order(generator)  # which has moved on: each epoch has its own order
    assert order(None) != order(None)


def test_batches_in_order_are_views() -> None:
    x, y = numbered(4)
    assert all(np.shares_memory(x, a) and np.shares_memory(y, b) for a, b in npnet.batches(x, y, 3, shuffle=False))


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), ("2", TypeError)])
def test_batches_refuse_a_bad_batch_size(size: Any, error: type) -> None:
    with pytest.raises(error, match="batch_size: expected a whole number, at least 1"):
        list(npnet.batches(*numbered(4), size))
