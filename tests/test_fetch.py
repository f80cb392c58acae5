"""Fetching MNIST: from a server on this machine, and what is said when it fails. Nothing leaves the machine."""

import gc
import hashlib
import http.server
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from npnet import datasets
from npnet.datasets import DataError, fetch_mnist, verify_mnist
from tests.small_mnist import random_digits, write

DATA = Path(__file__).parents[1] / "data"

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that offers this project's data folder, and npnet fetches from there."""
    pytest.importorskip("pooch")
    monkeypatch.setenv("NO_PROXY", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=DATA)) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/mnist.npz"
        monkeypatch.setattr(datasets, "MNIST_URL", url)
        digest = hashlib.sha256((DATA / "mnist.npz").read_bytes()).hexdigest()
        monkeypatch.setattr(datasets, "MNIST_URL_SHA256", digest)
        yield
        running.shutdown()
        gc.collect()  # pooch leaves the sockets of failed downloads to the collector: here, where that is ignored


@pytest.mark.usefixtures("server")
def test_fetching_ends_with_a_verified_file_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = fetch_mnist()
    assert file == tmp_path / "npnet" / "mnist.npz" == verify_mnist(tmp_path / "npnet")
    assert file.read_bytes() == (DATA / "mnist.npz").read_bytes()
    assert fetch_mnist(tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "mnist.npz"


@pytest.mark.usefixtures("server")
def test_what_is_there_and_whole_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = fetch_mnist(tmp_path)
    monkeypatch.setattr(datasets, "MNIST_URL", "http://127.0.0.1:1/")
    assert fetch_mnist(str(tmp_path)) == file


def no_server(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setattr(datasets, "MNIST_URL", "http://127.0.0.1:1/mnist.npz")
    return "refused"


def no_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setattr(datasets, "MNIST_URL", f"{datasets.MNIST_URL}.gone")
    return "404"


def another_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setattr(datasets, "MNIST_URL_SHA256", "0" * 64)
    return "hash"


def no_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    folder.write_text("a file")
    return str(folder)


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("problem", [no_server, no_file, another_file, no_folder])
def test_a_failed_fetch_says_from_where_into_where_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Callable[..., str]
) -> None:
    folder = tmp_path / "there"
    cause = problem(monkeypatch, folder)
    with pytest.raises(OSError, match="could not be fetched") as error:
        fetch_mnist(folder)
    for text in (datasets.MNIST_URL, str(folder), cause, "By hand: put mnist.npz there", "NPNET_DATA"):
        assert text in str(error.value)
    assert not list(folder.parent.rglob("mnist.npz"))


def test_what_was_fetched_is_verified_array_by_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the address ever serve other data under a hash that somebody updated carelessly."""
    pooch = pytest.importorskip("pooch")
    monkeypatch.setattr(pooch, "retrieve", lambda *_, fname, path, **__: write(path / fname, random_digits()))
    with pytest.raises(DataError, match="x_train is not MNIST's"):
        fetch_mnist(tmp_path)


def test_without_pooch_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"package pooch: pip install 'npnet\[data\]'"):
        fetch_mnist(tmp_path)
    assert not list(tmp_path.iterdir())
