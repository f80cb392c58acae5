"""MNIST files that are damaged, or something else: always refused with the file's name, never read as other data."""

import io
import os
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import datasets
from npnet.datasets import DataError, load_mnist, read_mnist
from tests.small_mnist import Arrays, equal, random_digits, write


def refused(file: Path) -> str:
    with pytest.raises(DataError) as error:
        load_mnist(file)
    message = str(error.value)
    assert message.startswith(f"{file}: ")
    assert message.endswith(f"; name another file, or {datasets._HOW}")  # never: delete it
    return message


@pytest.mark.parametrize("compressed", [False, True])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, compressed: bool) -> None:
    file = write(tmp_path, random_digits(), compressed)
    whole = file.read_bytes()
    lengths = {0, 1, 2, 4, 22, *range(0, len(whole), 53), *range(len(whole) - 30, len(whole))}
    for length in sorted(lengths, reverse=True):
        os.truncate(file, length)
        assert "truncated, damaged or not an .npz file" in refused(file)
    file.write_bytes(whole)
    assert equal(read_mnist(file), random_digits())


def poke(stream: Any, place: int, byte: int) -> None:
    stream.seek(place)
    stream.write(bytes([byte]))


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_bytes_are_refused_or_harmless(tmp_path: Path, compressed: bool) -> None:
    """Never other arrays, never another error: each bit of the zip's directory, and others at random."""
    file, rng = write(tmp_path, random_digits(), compressed), np.random.default_rng(0)
    whole = file.read_bytes()
    flips = [(place, 1 << bit) for place in range(len(whole) - 250, len(whole)) for bit in range(8)]
    flips += [(int(place), int(mask)) for place, mask in rng.integers(1, (len(whole), 256), (600, 2))]
    flips += [(place, 1 << int(rng.integers(8))) for place in range(200)]  # the first array's header
    seen: Counter[str] = Counter()
    with file.open("r+b", buffering=0) as stream:
        for place, mask in flips:
            poke(stream, place, whole[place] ^ mask)
            try:
                assert equal(read_mnist(file), random_digits())
                seen["harmless"] += 1
            except DataError as error:
                seen["refused" if str(error).startswith(f"{file}: ") else "without the file's name"] += 1
            except Exception as error:
                seen[type(error).__name__] += 1
            poke(stream, place, whole[place])
    assert seen.keys() == {"harmless", "refused"}, seen
    assert min(seen.values()) > 100


def saved(array: np.ndarray) -> bytes:
    """What np.save writes."""
    np.save(stream := io.BytesIO(), array)
    return stream.getvalue()


OTHER_FILES = {
    "empty": b"",
    "text": b"label,pixel1,pixel2\n5,0,0\n",
    "page of an error": b"<!DOCTYPE html><html><body>404</body></html>",
    "single array": saved(np.zeros(3)),
    "pickled array": saved(np.array([{}], object)),
    "pickle": pickle.dumps(random_digits()),
    "empty zip": b"PK\5\6" + bytes(18),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "mnist.npz"
    file.write_bytes(OTHER_FILES[name])
    assert ("truncated, damaged" in refused(file)) == (name != "empty zip")


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def test_pickled_objects_are_refused_unseen(tmp_path: Path) -> None:
    trap = np.array([Trap(tmp_path / "sprung")], object)
    refused(write(tmp_path, random_digits() | {"y_test": trap}))
    assert not (tmp_path / "sprung").exists()
    with np.load(tmp_path / "mnist.npz", allow_pickle=True) as stored:  # the trap works
        assert stored["y_test"] is not None
    assert (tmp_path / "sprung").is_dir()


@pytest.mark.parametrize("name", datasets.MNIST_ARRAYS)
def test_an_array_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    arrays = random_digits()
    arrays["images"] = arrays.pop(name)
    message = refused(write(tmp_path, arrays))
    assert "not an MNIST file" in message
    assert f"expected {', '.join(datasets.MNIST_ARRAYS)}" in message
    assert name in message.partition("expected")[0]


WRONG_ARRAYS: dict[str, Callable[[Arrays], Arrays]] = {
    "images of floats": lambda a: {"x_train": a["x_train"] / 255},
    "flat images": lambda a: {"x_test": a["x_test"].reshape(3, 784)},
    "larger images": lambda a: {"x_train": np.zeros((6, 32, 32), np.uint8)},
    "images in colour": lambda a: {"x_train": np.zeros((6, 28, 28, 3), np.uint8)},
    "a label too few": lambda a: {"y_train": a["y_train"][1:]},
    "labels of the other part": lambda a: {"y_train": a["y_test"]},
    "one-hot labels": lambda a: {"y_test": np.eye(10, dtype=np.uint8)[a["y_test"]]},
    "a label": lambda a: {"y_test": np.uint8(3)},
    "labels of floats": lambda a: {"y_train": a["y_train"].astype(float)},
    "negative labels": lambda a: {"y_test": a["y_test"].astype(np.int8) - 5},
    "labels in words": lambda a: {"y_train": a["y_train"].astype(str)},
}


@pytest.mark.parametrize("name", WRONG_ARRAYS)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, name: str) -> None:
    arrays = random_digits()
    wrong = WRONG_ARRAYS[name](arrays)
    message = refused(write(tmp_path, arrays | wrong))
    assert "expected uint8 images (samples, 28, 28) and uint8 labels (samples,)" in message
    part = next(iter(wrong))[2:]
    assert f"in x_{part}, y_{part}, got " in message


def test_a_label_that_is_no_digit_is_named_with_its_place(tmp_path: Path) -> None:
    arrays = random_digits()
    arrays["y_train"][[2, 4]] = 11, 200
    assert "not an MNIST file: y_train[2] is 11, expected labels from 0 to 9; " in refused(write(tmp_path, arrays))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_healthy_file_of_another_kind_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    """Even if it is larger than MNIST may be."""
    arrays = random_digits()
    monkeypatch.setattr(datasets, "_MOST_MNIST", 2 * sum(array.nbytes for array in arrays.values()))
    assert equal(read_mnist(write(tmp_path, arrays, compressed)), arrays)
    floats = refused(write(tmp_path, arrays | {"x_train": arrays["x_train"].astype(np.float32)}, compressed))
    assert "expected uint8 images" in floats
    assert "got float32 (6, 28, 28) and uint8 (6,)" in floats
    many = refused(write(tmp_path, arrays | {"more": np.zeros((3, 6, 28, 28))}, compressed))
    assert "not MNIST: 119961 bytes of arrays, MNIST has 7065; " in many
    assert not any(word in floats + many for word in ("damaged", "truncated", "delete"))


def test_a_model_of_ones_own_is_not_to_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.npz"
    npnet.Network([4, 3, 2]).save(file)
    for read in (load_mnist, datasets.verify_mnist):
        with pytest.raises(DataError, match=r"not an MNIST file .*; name another file, or get it with") as error:
            read(file)
        assert "delete" not in str(error.value)
    cached = datasets.cache_folder() / "mnist.npz"  # where npnet itself fetches, what is not MNIST is of no use
    cached.parent.mkdir(parents=True)
    cached.write_bytes(file.read_bytes())
    with pytest.raises(DataError, match=r"not an MNIST file .*; delete it, and get it with"):
        load_mnist(cached)
