"""The net under `tests.test_fuzz_files` holds: without one of npnet's checks, each kind of harm is done, and seen."""

import io
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import SaveError, archive, storage
from npnet.archive import read_archive
from tests import hostile_files as hostile
from tests.judge import Judge
from tests.saved_models import is_same, one_of_each
from tests.test_damaged_data import Trap


def judged(file: Path, content: bytes, read: Callable[[Path], Any] = npnet.load, **options: Any) -> str:
    """What was found wrong with reading one file; empty if nothing was."""
    with Judge(file, read, (SaveError,)).judging() as judge:
        judge(content, **options)
    return judge.wrong[0][1] if judge.wrong else ""


def entries(folder: Path, change: Callable[[Any], None] = lambda said: None) -> hostile.Arrays:
    """All that is in a save, after a change of its description."""
    one_of_each().save(folder / "original.npz")
    said, arrays = read_archive(folder / "original.npz")
    change(said)
    return {"npnet": np.frombuffer(hostile.json.dumps(said).encode(), np.uint8), **arrays}


def test_a_file_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, content = tmp_path / "model.npz", hostile.bomb(10**8, entries(tmp_path))
    assert not judged(file, content)
    read_npz = archive.read_npz
    monkeypatch.setattr(archive, "read_npz", lambda path, most: read_npz(path, 10**12))
    assert "bytes for a file of" in judged(file, content)


class Whatever:
    """A product that is always what there is."""

    def __mul__(self, other: Any) -> Any:
        return self

    def __ne__(self, other: object) -> bool:
        return False


def test_a_header_that_claims_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, given = tmp_path / "model.npz", entries(tmp_path)
    honest = hostile.npz(given)
    content = with_right_checksums(honest.replace(b"'shape': (3,), }       ", b"'shape': (30000000,), }"))
    assert len(content) == len(honest)
    assert content != honest
    assert not judged(file, content)
    monkeypatch.setattr(archive.math, "prod", lambda shape: Whatever())
    assert "bytes for a file of" in judged(file, content)


def test_a_description_that_claims_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def larger(said: Any) -> None:
        said["model"]["config"]["layers"][0]["config"].update(in_features=3000, out_features=3000)

    file, content = tmp_path / "model.npz", hostile.npz(entries(tmp_path, larger))
    assert not judged(file, content)
    monkeypatch.setattr(storage, "_numbers_in", lambda said, known: 0)
    assert "bytes for a file of" in judged(file, content)


def test_pickled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, trap = tmp_path / "model.npz", np.array([Trap(tmp_path / "sprung")], object)
    content = hostile.npz(entries(tmp_path) | {"0.bias": trap})
    assert not judged(file, content)
    assert not (tmp_path / "sprung").exists()
    monkeypatch.setattr(archive, "_read_array", lambda s, size: np.lib.format.read_array(s, allow_pickle=True))
    judged(file, content)
    assert (tmp_path / "sprung").is_dir()


def other_numbers(loaded: Any) -> str:
    return "" if is_same(loaded, one_of_each(), layout=False) else "other numbers"


def flipped(content: bytes, number: float) -> bytes:
    """One bit of the first of these numbers is another."""
    place = content.index(np.float32(number).tobytes())
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_without_checksums_other_numbers_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_of_each()
    number = model.layers[0].weight.value[1, 1]
    for suffix in (".npz", ".safetensors"):
        model.save(tmp_path / f"model{suffix}")
        content = flipped((tmp_path / f"model{suffix}").read_bytes(), number)
        assert not judged(tmp_path / f"model{suffix}", content, check=other_numbers)
    monkeypatch.setattr(zipfile.ZipExtFile, "_update_crc", lambda *args: None)
    monkeypatch.setattr(archive, "_seal", lambda text, arrays: "seal")
    for suffix in (".npz", ".safetensors"):
        model.save(tmp_path / f"model{suffix}")
        content = flipped((tmp_path / f"model{suffix}").read_bytes(), number)
        assert judged(tmp_path / f"model{suffix}", content, check=other_numbers) == "other numbers"


def test_numpys_parser_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, given = tmp_path / "model.npz", entries(tmp_path)
    content = hostile.npz(given).replace(b"'shape': (3,), }  ", b"'shape': (3L,), } ")
    content = with_right_checksums(content)
    assert not judged(file, content)
    monkeypatch.setattr(archive, "_read_array", lambda s, size: np.lib.format.read_array(s, allow_pickle=False))
    assert "Warning" in judged(file, content)


def with_right_checksums(content: bytes) -> bytes:
    """The zip with CRCs of what is in it."""
    given = io.BytesIO(content)
    with zipfile.ZipFile(result := io.BytesIO(), "w") as new, zipfile.ZipFile(given) as old:
        for member in old.infolist():
            given.seek(member.header_offset + 30 + len(member.filename))
            new.writestr(zipfile.ZipInfo(member.filename), given.read(member.file_size))
    return result.getvalue()


def raising(error: Exception) -> Callable[[Path], Any]:
    def read(path: Path) -> Any:
        raise error

    return read


def busy(path: Path) -> None:
    end = time.process_time() + 2.1
    while time.process_time() < end:
        pass


def test_the_judge_sees_what_it_is_for(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    assert judged(file, b"", raising(KeyError("x"))) == "KeyError: 'x'"
    assert judged(file, b"", raising(RecursionError("deep"))) == "RecursionError: deep"
    assert "does not name the file" in judged(file, b"", raising(SaveError("damaged")))
    assert not judged(file, b"", raising(SaveError("a.npz: damaged")))
    assert "2.1 s" in judged(file, b"", busy)
    assert "RuntimeWarning" in judged(file, b"", lambda path: warnings.warn("x", RuntimeWarning, stacklevel=2))
    assert "bytes for a file of 0" in judged(file, b"", lambda path: bytes(3_000_000))
    assert judged(file, b"", lambda path: 1, check=lambda result: "one" if result == 1 else "") == "one"
    assert "when it was used" in judged(file, b"", lambda path: 0, check=lambda result: str(1 / result))
