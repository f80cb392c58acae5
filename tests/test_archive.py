"""Zip files that other readers would believe: refused before a number of theirs is used."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from npnet import SaveError
from npnet.archive import read_npz


def zipped(file: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def npy(array: np.ndarray) -> bytes:
    np.save(stream := io.BytesIO(), array)
    return stream.getvalue()


def read(file: Path, most: int = 10**6) -> dict[str, np.ndarray]:
    return dict(read_npz(file, most))


def test_a_stream_that_ends_early_leaves_no_numbers_to_chance(tmp_path: Path) -> None:
    """Deflated to less than the directory says, with the checksum of what there is."""
    file, content = tmp_path / "short.npz", npy(np.arange(1000.0))
    short = content[:-4000]
    zipped(file, {"a.npy": short}, zipfile.ZIP_DEFLATED)
    size = len(short).to_bytes(4, "little")
    file.write_bytes(file.read_bytes().replace(size, len(content).to_bytes(4, "little")))
    with pytest.raises(SaveError, match="an array is shorter than it claims"):
        read(file)


def test_two_entries_for_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.npz"
    zipped(file, {"a": npy(np.zeros(3)), "a.npy": npy(np.ones(3))})
    with pytest.raises(SaveError, match="two of its arrays have the same name"):
        read(file)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_takes_any_memory_is_refused(tmp_path: Path, compression: int) -> None:
    zipped(tmp_path / "a.npz", {"a.npy": npy(np.zeros(3))}, compression)
    with pytest.raises(SaveError, match="compressed in an unknown way"):
        read(tmp_path / "a.npz")
