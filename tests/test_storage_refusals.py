"""What cannot be loaded is refused, each thing in words of its own; what cannot be saved leaves the file as it was."""

import json
import pickle
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import Network, SaveError, Sequential
from npnet.archive import FORMAT, read_archive, write_archive
from tests.saved_models import is_same, one_of_each
from tests.test_damaged_data import Trap

SUFFIXES = (".npz", ".safetensors")
each_format = pytest.mark.parametrize("suffix", SUFFIXES)


def saved(folder: Path, suffix: str = ".npz") -> Path:
    file = folder / f"model{suffix}"
    one_of_each().save(file)
    return file


def changed(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """Write the file once more, with checksums that are right, after ``change(description, arrays)``."""
    description, arrays = read_archive(file)
    change(description, arrays)
    entries = {"npnet": np.frombuffer(json.dumps(description).encode(), np.uint8), **arrays}
    if file.suffix == ".npz":
        np.savez(file, **entries)
    else:
        from npnet.archive import _write_safetensors

        with file.open("wb") as stream:
            _write_safetensors(stream, json.dumps(description), arrays)


def refused(file: Path, message: str, **options: Any) -> None:
    with pytest.raises(SaveError, match=f"^{re.escape(str(file))}: .*{message}"):
        npnet.load(file, **options)


def newer(description: dict[str, Any], arrays: dict[str, Any]) -> None:
    description |= {"format": FORMAT + 1, "npnet": "9.8"}


def nested(description: dict[str, Any], arrays: dict[str, Any]) -> None:
    for _ in range(400):
        description["model"] = {"kind": "Residual", "config": {"inner": description["model"]}}


LARGE = {"kind": "Dense", "config": {"in_features": 10**6, "out_features": 10**6}}
LARGE_NORM = {"kind": "LayerNorm", "config": {"features": 10**12}}
CHANGES: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "newer": (
        newer,
        f"written by npnet 9.8 in format {FORMAT + 1}; this is npnet .* up to format {FORMAT}: upgrade npnet",
    ),
    "no format": (lambda d, a: d.pop("format"), "damaged, its description cannot be read"),
    "format in words": (lambda d, a: d.update(format="1"), "damaged, its description cannot be read"),
    "no model": (lambda d, a: d.pop("model"), "does not describe a model"),
    "a number for a model": (lambda d, a: d.update(model=3), "does not describe a model"),
    "another architecture": (
        lambda d, a: d["model"]["config"]["layers"].pop(),
        "does not describe a model.*parameters 8.bias, 8.weight are in the file or in the model, but not in both",
    ),
    "another size": (
        lambda d, a: a.update({"8.bias": np.zeros(4, np.float32)}),
        r"8\.bias: the file has float32 \(4,\)",
    ),
    "an array less": (lambda d, a: a.pop("8.bias"), "describes more parameters than it holds"),
    "an array more": (lambda d, a: a.update({"9.bias": np.zeros(3)}), "9.bias are in the file or in the model"),
    "whole numbers": (lambda d, a: a.update({"8.bias": np.zeros(3, int)}), r"8\.bias: the file has int64"),
    "another class": (lambda d, a: d["model"].update(kind="os.system"), "needs a class os.system that is not npnet's"),
    "a class in a list": (lambda d, a: d["model"].update(kind=[]), "does not describe a model"),
    "nested": (nested, "does not describe a model.*recursion"),
    "an argument more": (lambda d, a: d["model"]["config"].update(colour=3), "does not describe a model.*colour"),
    "a backend": (lambda d, a: d["model"]["config"]["layers"][0]["config"].update(backend="cupy"), "backend"),
    "large": (lambda d, a: d["model"]["config"]["layers"].append(LARGE), "describes more parameters than it holds"),
    "large norm": (lambda d, a: d["model"]["config"]["layers"].append(LARGE_NORM), "more parameters than it holds"),
    "negative": (
        lambda d, a: d["model"]["config"]["layers"][0]["config"].update(in_features=-6),
        "sizes: expected whole numbers",
    ),
    "NaN": (lambda d, a: a["0.bias"].__setitem__(1, np.nan), r"0\.bias holds infinities or NaN"),
    "infinity": (lambda d, a: a["0.weight"].__setitem__((1, 0), np.inf), r"0\.weight holds infinities or NaN"),
    "NaN in the description": (
        lambda d, a: d.update(about=float("nan")),
        r"its description cannot be read \(NaN is no number\)",
    ),
}


@each_format
@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, suffix: str, name: str) -> None:
    file, (change, message) = saved(tmp_path, suffix), CHANGES[name]
    changed(file, change)
    refused(file, message)


def test_a_network_with_other_numbers_than_it_says_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "network.npz"
    Network([3, 2]).save(file)
    changed(file, lambda d, a: a.update({name: array.astype(np.float32) for name, array in a.items()}))
    refused(file, "it says float64, but holds other numbers")


def test_what_changes_nothing_is_loaded(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        file = saved(tmp_path, suffix)
        changed(file, lambda d, a: d.update(about="more to say"))
        assert is_same(npnet.load(file), one_of_each(), layout=False)


# Bytes.


@each_format
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, suffix: str) -> None:
    file = saved(tmp_path, suffix)
    whole = file.read_bytes()
    for length in {*range(0, len(whole), 131), *range(len(whole) - 30, len(whole)), 1, 2, 4, 8}:
        file.write_bytes(whole[:length])
        refused(file, "truncated|not an .npz file")


@each_format
def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path, suffix: str) -> None:
    file, seen = saved(tmp_path, suffix), Counter[str]()
    whole, model = file.read_bytes(), one_of_each()
    for place in range(3, len(whole), 29):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            assert is_same(npnet.load(file), model, layout=False)
            seen["harmless"] += 1  # a date, an attribute of the zip's
        except SaveError as error:
            seen["refused" if str(error).startswith(f"{file}: ") else "without the file's name"] += 1
    assert seen.keys() <= {"refused", "harmless"}
    assert seen["refused"] > 3 * seen["harmless"], seen


OTHER = {
    "empty": (b"", "truncated|not an .npz file"),
    "text": (b"These are my weights.\n" * 9, "not an .npz file|not a .safetensors file"),
    "pickle": (pickle.dumps({"0.weight": 1}), "not an .npz file|not a .safetensors file"),
    "empty zip": (b"PK\5\6" + bytes(18), "not saved by npnet|not a .safetensors file"),
}


@each_format
@pytest.mark.parametrize("name", OTHER)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, suffix: str, name: str) -> None:
    content, message = OTHER[name]
    (tmp_path / f"model{suffix}").write_bytes(content)
    refused(tmp_path / f"model{suffix}", message)


def test_arrays_of_others_are_refused_with_what_to_do(tmp_path: Path) -> None:
    np.savez(tmp_path / "theirs.npz", **one_of_each().state_dict())
    refused(tmp_path / "theirs.npz", r"not saved by npnet; .*model.load_state_dict\(numpy.load\(path\)\)")
    model = one_of_each()
    model.load_state_dict(np.load(tmp_path / "theirs.npz"))
    from safetensors.numpy import save_file

    save_file({"weight": np.ones(3)}, tmp_path / "theirs.safetensors")
    refused(tmp_path / "theirs.safetensors", "not saved by npnet; .*model.load_state_dict")


@each_format
def test_what_is_no_file(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"there is no file \S*none{suffix}"):
        npnet.load(tmp_path / f"none{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(OSError, match=rf"folder{suffix} is a folder, not a file"):
        npnet.load(tmp_path / f"folder{suffix}")


@pytest.mark.parametrize("name", ["model.pt", "model", "model.npz.gz", "model.NPZ", ""])
def test_another_suffix_is_refused_by_both(tmp_path: Path, name: str) -> None:
    for call in (one_of_each().save, npnet.load):
        with pytest.raises(ValueError, match=r"expected a name that ends in \.npz or \.safetensors"):
            call(tmp_path / name)
        with pytest.raises(TypeError, match="path: expected the name of a file, got 3"):
            call(3)
    assert not list(tmp_path.iterdir())


def test_without_the_package_safetensors_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(tmp_path, ".safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (one_of_each().save, npnet.load):
        with pytest.raises(ImportError, match=r"pip install 'npnet\[safetensors\]'"):
            call(file)


# Nothing that a file holds is executed.


def test_pickled_objects_are_refused_unseen(tmp_path: Path) -> None:
    for name in ("0.bias", "npnet", "more"):
        file = saved(tmp_path)
        trap = np.array([Trap(tmp_path / "sprung")], object)
        np.savez(file, **dict(np.load(file)) | {name: trap})
        refused(file, "pickled objects, which could run any code")
        assert not (tmp_path / "sprung").exists()
    assert np.load(file, allow_pickle=True)["more"] is not None
    assert (tmp_path / "sprung").is_dir()  # the trap works


# Saving.


@each_format
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, suffix: str, wrong: float) -> None:
    file, model = saved(tmp_path, suffix), one_of_each()
    before = file.read_bytes()
    model.layers[0].bias.value[1] = wrong
    with pytest.raises(ValueError, match=r"not saved: 0\.bias holds infinities or NaN.* is untouched"):
        model.save(file)
    assert (file.read_bytes(), list(tmp_path.iterdir())) == (before, [file])


def test_a_description_that_json_cannot_hold_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_archive(tmp_path / "a.npz", {"about": float("nan")}, {})
    assert not list(tmp_path.iterdir())


def test_a_model_of_its_own_kind_may_stand_where_npnets_do(tmp_path: Path) -> None:
    Sequential(one_of_each()).save(tmp_path / "nested.npz")
    assert is_same(npnet.load(tmp_path / "nested.npz"), Sequential(one_of_each()))


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_a_file_of_another_program_is_not_called_damaged(tmp_path: Path, write: Any) -> None:
    """Compressed, it holds more bytes than it has; no save of npnet does."""
    write(tmp_path / "arrays.npz", x=np.zeros(10_000))
    with pytest.raises(SaveError, match="not saved by npnet"):
        npnet.load(tmp_path / "arrays.npz")
