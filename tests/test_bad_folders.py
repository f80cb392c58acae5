"""Folders that vanish or may not be written, files that may not grow, and what killed processes left."""

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest

import npnet
from npnet import Saver, files
from npnet.run import TrainingRun
from tests.small_training import TRAININGS, small_model

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
ROOT = Path(__file__).parents[1]


def test_a_folder_that_vanishes_and_one_that_is_there_again(tmp_path: Path) -> None:
    training, folder = TRAININGS["adam"], tmp_path / "runs"
    whole = training.run().state()
    path = folder / "save.npz"
    with pytest.raises(FileNotFoundError, match=r"save\.npz: there is no folder .*runs; make it"):
        training.run(saver=Saver(path, 5))

    class Vanishing(Saver):
        def step_done(self, run: TrainingRun, ending: bool = False) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            super().step_done(run, ending)

    folder.mkdir()
    with pytest.warns(RuntimeWarning, match=r"cannot write .*save\.npz: No such file.*nothing was saved yet"):
        assert training.run(saver=Vanishing(path, 5)).state() == whole
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"cannot write .*save\.npz: No such file"):
        training.run(saver=Vanishing(path, 5, stop_on_error=True))
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training.run(saver=Saver(path, 5))
    assert training.resumed(path).state() == whole


NOBODY = 65534
WITHOUT_RIGHTS = f"""
import os, sys, warnings
sys.path.insert(0, sys.argv[2])
import npnet
from pathlib import Path
from tests.small_training import TRAININGS
TRAININGS["adam"].run()  # which imports what it needs
os.geteuid() or (os.setegid({NOBODY}), os.seteuid({NOBODY}))  # root may write
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    TRAININGS["adam"].run(saver=npnet.Saver(Path(sys.argv[1]), 5))
print(said[-1].message)
try:
    TRAININGS["adam"].run(saver=npnet.Saver(Path(sys.argv[1]), 5, stop_on_error=True))
except PermissionError as error:
    print(error)
"""


def test_a_folder_that_may_not_be_written() -> None:
    with tempfile.TemporaryDirectory() as place:  # not in tmp_path, which others may not even enter
        Path(place).chmod(0o555)
        save = Path(place) / "save.npz"
        process = subprocess.run(
            [sys.executable, "-c", WITHOUT_RIGHTS, save, ROOT], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert process.returncode == 0, process.stderr
        error = f"[Errno 13] cannot write {save}: Permission denied; nothing was changed"
        assert process.stdout == f"{error}. Training goes on; nothing was saved yet\n{error}\n"


SHORT_WRITES = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
import npnet
from pathlib import Path
from tests.small_training import small_model
path, old, new = Path(sys.argv[1]), small_model(1), small_model(2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
old.save(path)
before, size = path.read_bytes(), path.stat().st_size
refused = 0
for limit in [*range(0, size, max(1, size // 40)), size - 1, size, size + 1]:
    path.write_bytes(before)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        new.save(path)
    except OSError as error:
        assert str(error) == f"[Errno 27] cannot write {path}: File too large; nothing was changed", error
        assert path.read_bytes() == before
        refused += 1
    else:
        assert limit >= size and path.read_bytes() != before
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    npnet.load(path)
print(refused)
"""


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_disk_that_is_full_at_any_byte(suffix: str, tmp_path: Path) -> None:
    """A limit on the length of a file stands in for it: writes are really cut short."""
    process = subprocess.run(
        [sys.executable, "-c", SHORT_WRITES, tmp_path / f"model{suffix}", ROOT],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) >= 40


# What was left by processes that were killed.


def test_leftovers_are_removed_where_their_writer_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    names = {
        "dead": files._temporary_name(path, gone.stdout.decode().strip(), "00000000"),
        "another's by now": files._temporary_name(path, str(os.getpid()), "11111111"),
        "alive": files._temporary_name(path, str(os.getpid()), "22222222"),
        "another file's": files._temporary_name(tmp_path / "other.npz", gone.stdout.decode().strip(), "33333333"),
    }
    for name in names.values():
        (tmp_path / name).write_bytes(b"")
    os.utime(tmp_path / names["another's by now"], (1e9, 1e9))  # long before this process began
    small_model().save(path)
    left = {each.name for each in tmp_path.iterdir()}
    assert left == {"model.npz", names["alive"], names["another file's"]}
    assert np.array_equal(npnet.load(path).layers[0].weight.value, small_model().layers[0].weight.value)


def test_names_as_long_as_names_can_be(tmp_path: Path) -> None:
    path = tmp_path / f"{'a' * 251}.npz"
    small_model().save(path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "model.npz").symlink_to(tmp_path / "there" / "model.npz")
    small_model().save(tmp_path / "model.npz")
    assert (tmp_path / "model.npz").is_symlink()
    assert [each.name for each in (tmp_path / "there").iterdir()] == ["model.npz"]
