"""Data sets: found where they should be, whole, ready to train on."""

import gzip
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
from npnet.idx import IDX_FILES
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
    """The folders that are searched, in order, all of them this test's own; but for the first and the current one, not
    there yet.
    """
    (tmp_path / "chosen").mkdir()
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setenv("NPNET_DATA", str(tmp_path / "chosen"))
    monkeypatch.setattr(datasets, "__file__", str(tmp_path / "repository" / "npnet" / "datasets.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folders = "chosen", "repository/data", "xdg/npnet", "current", "current/data"
    return [tmp_path / folder for folder in folders]


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
    elsewhere = write(places[0].parent / "elsewhere" / "digits.npz", random_digits(seed=9))
    for path in (elsewhere, str(elsewhere)):  # a file of any name
        assert equal(read_mnist(path), random_digits(seed=9))
    assert equal(read_mnist(places[2]), random_digits(seed=2))  # a folder


def test_the_cache_is_in_the_home_folder_unless_xdg_says_otherwise(
    places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("NPNET_DATA")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert datasets.data_folders() == [places[1], tmp_path / "home" / ".cache" / "npnet", *places[3:]]
    monkeypatch.setenv("NPNET_DATA", "")  # is as good as none
    assert len(datasets.data_folders()) == 4


def test_the_current_folder_is_searched_for_the_diabetes_data_too(places: list[Path]) -> None:
    with pytest.raises(FileNotFoundError) as error:
        npnet.load_diabetes()
    assert all(str(place / "diabetes.csv") in str(error.value) for place in places)
    content = (DATA / "diabetes.csv").read_bytes()
    places[4].mkdir()
    for place in (places[4], places[3]):
        (place / "diabetes.csv").write_bytes(content)
        x, _ = npnet.load_diabetes()
        assert x.shape == (768, 8)
        (place / "diabetes.csv").unlink()


def test_a_folder_is_searched_once(places: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    places[1].mkdir(parents=True)
    monkeypatch.chdir(places[1].parent)  # the repository
    assert datasets.data_folders() == [*places[:3], places[1].parent]


def test_a_current_folder_that_is_gone_is_passed_over(places: list[Path], tmp_path: Path) -> None:
    write(places[2], random_digits())
    places[3].rmdir()
    try:
        Path.cwd()
    except OSError:
        assert datasets.data_folders() == places[:3]
    assert datasets.find_mnist() == places[2] / "mnist.npz"


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


# The files that MNIST was published in.


def write_idx(folder: Path, arrays: dict[str, np.ndarray], end: str = "", dot: str = "-") -> dict[str, Path]:
    """The four files; ``end`` may be .gz."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, array in arrays.items():
        file = folder / f"{IDX_FILES[name].replace('-idx', dot + 'idx')}{end}"
        content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
        file.write_bytes(gzip.compress(content) if end else content)
        files[name] = file
    return files


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx_files_are_read_by_their_folder_or_by_any_of_them(tmp_path: Path, end: str, dot: str) -> None:
    arrays = random_digits()
    files = write_idx(tmp_path / "raw", arrays, end, dot)
    for path in (tmp_path / "raw", *files.values()):
        assert equal(read_mnist(path), arrays)
    (x, y), (x_test, _) = load_mnist(tmp_path / "raw", "f4")
    assert np.array_equal(x, load_mnist(write(tmp_path / "npz", arrays), "f4")[0][0])
    assert (y.argmax(axis=1) == arrays["y_train"]).all()
    assert x_test.shape == (3, 784)
    assert read_mnist(tmp_path / "raw")["x_train"].flags.writeable


def test_idx_files_are_found_where_mnist_is_searched_after_mnist_npz(places: list[Path]) -> None:
    write_idx(places[3], random_digits(seed=1), ".gz")
    assert equal(read_mnist(), random_digits(seed=1))
    write(places[3], random_digits(seed=2))
    assert equal(read_mnist(), random_digits(seed=2))


def test_the_real_mnist_in_idx_files_is_verified(tmp_path: Path) -> None:
    files = write_idx(tmp_path, real_mnist())
    assert verify_mnist(tmp_path) == files["x_train"]
    content = bytearray(files["y_test"].read_bytes())
    content[-1] ^= 1
    files["y_test"].write_bytes(content)
    with pytest.raises(DataError, match="y_test is not MNIST's"):
        verify_mnist(tmp_path)


def test_an_idx_file_that_lacks_the_others_says_which(tmp_path: Path) -> None:
    files = write_idx(tmp_path, random_digits())
    files["y_train"].unlink()
    files["x_test"].unlink()
    for path in (tmp_path, files["x_train"], files["y_test"]):
        with pytest.raises(
            FileNotFoundError, match=r"no train-labels-idx1-ubyte and no t10k-images-idx3-ubyte in .*files are four"
        ):
            load_mnist(path)


def replaced(start: int, *values: int) -> Callable[[bytes], bytes]:
    """Other bytes from ``start`` on."""
    return lambda content: content[:start] + bytes(values) + content[start + len(values) :]


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("x_train", lambda content: content[:-1], "which is not what there is"),
        ("x_train", lambda content: content + b"0", "which is not what there is"),
        ("x_train", lambda content: content[:9], "which is not what there is"),
        ("y_train", lambda content: b"", "does not begin as an idx file"),
        ("y_train", replaced(2, 13), "does not begin as an idx file"),  # of floats
        ("y_train", replaced(3, 0), "does not begin as an idx file"),
        ("x_train", replaced(4, 255, 255, 255, 255), "claims to hold more than the"),
        ("x_train", replaced(8, 0, 0, 0, 14, 0, 0, 0, 56), r"not an MNIST file: expected uint8 images .*\(6, 14, 56\)"),
        ("y_test", replaced(8, 10), r"not an MNIST file: y_test\[0\] is 10"),
    ],
)
def test_idx_files_that_are_damaged_are_named(tmp_path: Path, name: str, spoil: Any, message: str, end: str) -> None:
    files = write_idx(tmp_path, random_digits(), end)
    content = files[name].read_bytes()
    content = spoil(gzip.decompress(content) if end else content)
    files[name].write_bytes(gzip.compress(content) if end else content)
    with pytest.raises(DataError, match=message) as error:
        load_mnist(tmp_path)
    named = files[name] if "not an MNIST" not in message else files["x_train"]
    assert str(error.value).startswith(str(named))
    assert "npnet data fetch" in str(error.value)


def test_gzipped_files_that_are_damaged_are_named(tmp_path: Path) -> None:
    files = write_idx(tmp_path, random_digits(), ".gz")
    whole = files["x_train"].read_bytes()
    for content in (whole[:-9], whole[:50], b"\x1f\x8b" + whole[2:20], b"no gzip", replaced(60, 1, 2, 3)(whole)):
        files["x_train"].write_bytes(content)
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: truncated, damaged or not an idx file"):
            load_mnist(tmp_path)
