"""Each call that a save makes of the system fails in turn: what was there before stays, nothing else is left, and the
error says why."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import npnet
from npnet import Saver, archive
from tests.faults import ERRORS, Failing, Faults
from tests.small_training import TRAININGS, small_model

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
SUFFIXES = [".npz", ".safetensors"]


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


def weights(path: Path) -> list[bytes]:
    return [each.value.tobytes() for each in npnet.load(path).parameters()]


def some_of(calls: list[str]) -> list[int]:
    """All that happen once, and of the many writes the first, the last and some between."""
    writes = [i for i, name in enumerate(calls) if name == "write"]
    return [i for i, name in enumerate(calls) if name != "write"] + writes[:5] + writes[5:-5:17] + writes[-5:]


def break_each_call(path: Path, faults: Faults) -> set[str]:
    """Save over another save, once for each call and error; returns the calls that were made to fail."""
    old, new = small_model(1), small_model(2)
    old.save(path)
    before = path.read_bytes()
    with faults.at(-1, ERRORS[0]):
        new.save(path)
    calls = faults.calls
    assert calls[-3:] == ["fsync", "replace", "fsync of the folder"]
    for number in some_of(calls):
        for error in ERRORS:
            path.write_bytes(before)
            with faults.at(number, error), pytest.raises(type(error)) as raised:
                new.save(path)
            place = f"{calls[number]} {number}, {error!r}"
            late = calls[number] == "fsync of the folder"
            assert late or path.read_bytes() == before, place
            assert weights(path) == [each.value.tobytes() for each in (new if late else old).parameters()]
            assert os.listdir(path.parent) == [path.name], place  # noqa: PTH208
            if isinstance(error, OSError):
                assert raised.value.errno == error.errno
                said = str(raised.value)
                assert f"{path}" in said
                assert error.strerror in said
                assert ("a power cut could still undo" if late else "nothing was changed") in said
    return {calls[number] for number in some_of(calls)}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_whatever_call_fails_the_save_before_stays(suffix: str, faults: Faults, tmp_path: Path) -> None:
    failed = break_each_call(tmp_path / f"model{suffix}", faults)
    assert failed == {"open", "write", "fsync", "replace", "fsync of the folder"}


def test_writing_in_place_is_caught(faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""

    @contextmanager
    def in_place(path: Path) -> Iterator[Any]:
        with faults._open(path, "wb", buffering=0) as raw, io.BufferedWriter(Failing(faults, raw), 64) as file:  # type: ignore[type-var]
            yield file
            faults.call("fsync"), faults.call("replace"), faults.call("fsync of the folder")

    monkeypatch.setattr(archive, "replacing", in_place)
    with pytest.raises(AssertionError):
        break_each_call(tmp_path / "model.npz", faults)


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "no"), KeyboardInterrupt()])
def test_a_temporary_file_that_cannot_be_removed_hides_no_error(
    error: BaseException, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(Path, "unlink", refuse)
    with faults.at(3, error), pytest.raises(type(error), match=f"^{error}|no; nothing was changed$"):
        small_model().save(tmp_path / "model.npz")


# In a training.


def test_in_a_training_it_is_a_warning_and_the_last_save_stays(faults: Faults, tmp_path: Path) -> None:
    """The save that fails is the third of six; all that the error changes is that it is not there."""
    training, path = TRAININGS["adam"], tmp_path / "save.npz"
    whole = training.run().state()
    with faults.at(-1, ERRORS[0]):
        training.broken(path, 8, every=1)
    calls, third = faults.calls, [i for i, name in enumerate(faults.calls) if name == "open"][2]
    ends = {name: next(i for i in range(third, len(calls)) if calls[i] == name) for name in set(calls)}
    for name, number in ends.items():
        for error in (*ERRORS[:3], MemoryError()):
            path.unlink()
            with (
                faults.at(number, error),
                pytest.warns(RuntimeWarning, match=f"{path}.*Training goes on; .* 0 epochs and 2 steps"),
            ):
                training.broken(path, 4, every=1)
            assert TRAININGS["adam"].resumed(path).state() == whole, name
            path.unlink()
            with faults.at(number, error), pytest.raises(type(error)):
                training.run(saver=Saver(path, 1, stop_on_error=True))
            assert TRAININGS["adam"].resumed(path).state() == whole
