"""kill -9 at any moment loses nothing that was saved: a short run of `tests.kill`, and its negative control."""

import sys
from pathlib import Path

import pytest

from tests.kill import TEMPORARY, Harness, Lost

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")


@pytest.mark.parametrize(("suffix", "kills"), [(".npz", 10), (".safetensors", 3)])
def test_a_training_killed_again_and_again_ends_as_one_that_was_not(suffix: str, kills: int, tmp_path: Path) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    harness = Harness(tmp_path, suffix)
    harness.run(kills)
    assert harness.kills == kills
    assert harness.in_a_save > 0, harness
    assert not list(tmp_path.rglob(TEMPORARY))  # what the killed ones left, their successors removed


def test_a_save_written_in_place_is_caught(tmp_path: Path) -> None:
    """Negative control."""
    with pytest.raises(Lost, match="unreadable"):
        Harness(tmp_path, writer="in place").run(30)
