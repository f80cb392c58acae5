"""Fetching MNIST by many processes at once, over a bad line, onto a bad disk: all of the file, or none and why.

Each process is a real one, and a server on this machine holds its answers back until all are under way. The file is a
small one that stands in for MNIST.
"""

import gc
import hashlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npnet import datasets
from npnet.datasets import DataError, fetch_mnist, load_mnist, read_mnist
from tests.small_mnist import Arrays, equal, random_digits, write

pooch = pytest.importorskip("pooch")
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

MANY = 10
DIGITS = random_digits(400, 100)
ROOT = Path(__file__).parents[1]

FETCH = """
import json, signal, sys, time
from pathlib import Path
from npnet import datasets
signal.signal(signal.SIGINT, signal.default_int_handler)
given = json.loads(sys.argv[1])
datasets.MNIST_URL, datasets.MNIST_URL_SHA256 = given["url"], given["sha256"]
datasets.MNIST_ARRAYS = {name: (tuple(shape), digest) for name, (shape, digest) in given["arrays"].items()}
exec(given["first"])
try:
    print(datasets.fetch_mnist(given["folder"]))
except OSError as error:
    print(error)
    sys.exit(3)
"""


class Offer(http.server.ThreadingHTTPServer):
    """Serves one file, in two halves; ``between()`` is called in between, and may hang up by raising an error."""

    daemon_threads = True
    request_queue_size = 2 * MANY

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.status, self.requests = content, 200, 0
        self.between: Callable[[], Any] = lambda: None
        self.url = f"http://127.0.0.1:{self.server_port}/mnist.npz"

    def handle_error(self, *_: Any) -> None: ...


class Answer(http.server.BaseHTTPRequestHandler):
    server: Offer

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.server.requests += 1
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        half = len(self.server.content) // 2
        self.wfile.write(self.server.content[:half])
        self.server.between()
        self.wfile.write(self.server.content[half:])


def digests(arrays: Arrays) -> dict[str, Any]:
    return {name: (array.shape, hashlib.sha256(array.tobytes()).hexdigest()) for name, array in arrays.items()}


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Offer]:
    """A server with a small file, which npnet takes for MNIST in this process."""
    monkeypatch.setenv("NO_PROXY", "*")
    content = write(tmp_path / "offered", DIGITS).read_bytes()
    with Offer(content) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(datasets, "MNIST_URL", running.url)
        monkeypatch.setattr(datasets, "MNIST_URL_SHA256", hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(datasets, "MNIST_ARRAYS", digests(DIGITS))
        yield running
        running.shutdown()
        gc.collect()  # pooch leaves the sockets of failed downloads to the collector: here, where that is ignored


def start(folder: Path, first: str = "", **options: Any) -> subprocess.Popen[str]:
    """A process that runs the code ``first`` and then fetches, as this one would."""
    given = {
        "url": datasets.MNIST_URL,
        "sha256": datasets.MNIST_URL_SHA256,
        "arrays": datasets.MNIST_ARRAYS,
        "folder": str(folder),
        "first": first,
    }
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, json.dumps(given)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def said(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it printed, when it has ended with that exit code."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, (out, err)
    return out.strip()


def names(folder: Path) -> list[str]:
    """What is in the folder."""
    return [path.name for path in folder.iterdir()]


class Reader(threading.Thread):
    """Reads the file again and again until it is told to stop, and notes what it saw."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.seen, self.done = folder, set[str](), threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            try:
                self.seen.add("whole" if equal(read_mnist(self.folder / "mnist.npz"), DIGITS) else "other")
            except FileNotFoundError:
                self.seen.add("none")
            except DataError:
                self.seen.add("half")
            time.sleep(0.005)

    def stop(self) -> set[str]:
        self.done.set()
        self.join(60)
        return self.seen


# Many at once.


@pytest.mark.parametrize("there", ["no folder", "a damaged file"])
def test_ten_processes_at_once_all_get_the_file_and_no_reader_sees_half_of_it(
    offer: Offer, tmp_path: Path, there: str
) -> None:
    folder = tmp_path / "deep" / "cache"
    if there == "a damaged file":
        folder.mkdir(parents=True)
        (folder / "mnist.npz").write_bytes(offer.content[:-1000])
    offer.between = threading.Barrier(MANY, timeout=120).wait  # each has half of the file before one gets the rest
    reader = Reader(folder)
    reader.start()
    processes = [start(folder) for _ in range(MANY)]
    assert [said(process) for process in processes] == [str(folder / "mnist.npz")] * MANY
    assert reader.stop() <= {"half" if there == "a damaged file" else "none", "whole"}
    assert "half" not in reader.seen or there == "a damaged file"
    assert offer.requests == MANY
    assert (folder / "mnist.npz").read_bytes() == offer.content
    assert names(folder) == ["mnist.npz"]


IN_PIECES = """
def slow_copy(self, target):
    content = self.read_bytes()
    with open(target, "wb", buffering=0) as stream:
        stream.write(content[: len(content) // 2])
        time.sleep(0.5)
        stream.write(content[len(content) // 2 :])
Path.replace = slow_copy
"""


def test_the_reader_would_see_half_a_file(offer: Offer, tmp_path: Path) -> None:
    """Negative control: a fetch that copies the file to its place instead of moving it there."""
    reader = Reader(tmp_path / "cache")
    reader.start()
    said(start(tmp_path / "cache", IN_PIECES))
    assert "half" in reader.stop()


def test_who_comes_later_fetches_nothing(offer: Offer, tmp_path: Path) -> None:
    file = fetch_mnist(tmp_path / "cache")
    before = file.stat().st_mtime_ns
    assert said(start(tmp_path / "cache")) == str(file)
    assert offer.requests == 1
    assert file.stat().st_mtime_ns == before


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_whoever_may_enter_the_folder_may_read_the_file(offer: Offer, tmp_path: Path) -> None:
    assert fetch_mnist(tmp_path / "cache").stat().st_mode & 0o777 == 0o644


# Broken off.


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_process_that_is_stopped_in_the_middle_leaves_no_file_and_the_next_one_gets_it(
    offer: Offer, tmp_path: Path, name: str
) -> None:
    half, folder = threading.Event(), tmp_path / "cache"

    def wait() -> None:
        half.set()
        time.sleep(60)

    offer.between = wait
    process = start(folder)
    assert half.wait(60)
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (folder / "mnist.npz").exists()
    if name == "SIGINT":
        assert names(folder) == []
    offer.between = lambda: None
    assert said(start(folder)) == str(folder / "mnist.npz")


# What goes wrong, and what is said then.


def hang_up(offer: Offer, monkeypatch: pytest.MonkeyPatch) -> str:
    offer.between = lambda: 1 / 0
    return r"IncompleteRead\(\d+ bytes read, \d+ more expected\)"


def fall_silent(offer: Offer, monkeypatch: pytest.MonkeyPatch) -> str:
    offer.between = lambda: time.sleep(60)
    monkeypatch.setattr(pooch.downloaders, "DEFAULT_TIMEOUT", 0.2)
    return "timed out"


def refuse(offer: Offer, monkeypatch: pytest.MonkeyPatch) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(datasets, "MNIST_URL", f"http://127.0.0.1:{free.getsockname()[1]}/mnist.npz")
    return r"\[(Errno|WinError) \d+\] .*refused"


def know_no_name(offer: Offer, monkeypatch: pytest.MonkeyPatch) -> str:
    def nobody(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    monkeypatch.setattr(datasets, "MNIST_URL", "http://npnet.invalid/mnist.npz")
    return r"\[Errno -2\] Name or service not known"


def offer_nothing(offer: Offer, monkeypatch: pytest.MonkeyPatch) -> str:
    offer.status = 404
    return "404 Client Error: Not Found for url: http"


def be_overloaded(offer: Offer, monkeypatch: pytest.MonkeyPatch) -> str:
    offer.status = 503
    return "503 Server Error: Service Unavailable"


def offer_other_bytes(offer: Offer, monkeypatch: pytest.MonkeyPatch) -> str:
    offer.content = offer.content[:5000] + bytes([offer.content[5000] ^ 1]) + offer.content[5001:]
    return r"SHA256 hash of downloaded file \(mnist\.npz\) does not match the known hash"


def offer_a_page(offer: Offer, monkeypatch: pytest.MonkeyPatch) -> str:
    offer.content = b"<html>Please log in to this hotel's network</html>"
    return r"SHA256 hash of downloaded file \(mnist\.npz\) does not match the known hash"


PROBLEMS = [
    hang_up, fall_silent, refuse, know_no_name, offer_nothing, be_overloaded, offer_other_bytes, offer_a_page,
]  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("damaged", [False, True])
def test_a_failed_fetch_says_why_in_a_sentence_and_leaves_nothing_new(
    offer: Offer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Callable[..., str], damaged: bool
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    if damaged:
        (folder / "mnist.npz").write_bytes(b"damaged")
    cause = problem(offer, monkeypatch)
    try:
        raise KeyError("of the caller, who fetches because of it; it is not the cause")
    except KeyError:
        expected = rf"^MNIST could not be fetched from {datasets.MNIST_URL} into \S*cache: {cause}"
        with pytest.raises(OSError, match=expected) as error:
            fetch_mnist(folder)
    message = str(error.value)
    assert "\n" not in message
    assert ".." not in message.replace("...", "")
    assert "object at 0x" not in message  # no library's insides
    assert message.endswith(
        "By hand: put mnist.npz there (downloaded in a browser, or data/mnist.npz of the npnet repository), or "
        "anywhere and name its folder in the environment variable NPNET_DATA"
    )
    assert names(folder) == ["mnist.npz"] * damaged


def test_other_bytes_would_arrive_without_the_hash(
    offer: Offer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control; and the second net, each array's own hash, holds."""
    offer_other_bytes(offer, monkeypatch)
    monkeypatch.setattr(pooch.core, "hash_matches", lambda *_, **__: True)
    with pytest.raises(DataError, match=r"Bad CRC-32.*; name another file, or get it with `npnet data fetch`"):
        fetch_mnist(tmp_path / "cache")
    assert (tmp_path / "cache" / "mnist.npz").read_bytes() == offer.content


NOBODY = 65534
FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_a_disk_that_is_full_leaves_nothing(offer: Offer, tmp_path: Path) -> None:
    """A limit on the length of a file stands in for it: the write fails in the same place."""
    assert len(offer.content) > 100_000
    text = said(start(tmp_path / "cache", FULL_DISK), code=3)
    assert f"into {tmp_path / 'cache'}: [Errno 27] File too large. By hand: " in text
    assert names(tmp_path / "cache") == []


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
@pytest.mark.parametrize("there", ["", "not/there/yet"])
def test_a_folder_that_cannot_be_written_is_named(offer: Offer, there: str) -> None:
    with tempfile.TemporaryDirectory() as place:  # not in tmp_path, which others may not even enter
        Path(place).chmod(0o555)
        first = f"import os, pooch; os.geteuid() or os.seteuid({NOBODY})"  # root may write
        text = said(start(Path(place) / there, first), code=3)
        assert f"into {Path(place) / there}: [Errno 13] Permission denied: '{place}" in text
        assert "NPNET_DATA" in text
        assert names(Path(place)) == []
    assert offer.requests == 0


# Damaged afterwards.


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "a bit of an image": lambda content: flip(content, len(content) // 3),
    "the page of an error": lambda content: b"<html>503</html>",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_damaged_afterwards_is_refused_with_what_to_do_and_fetched_again(
    offer: Offer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NPNET_DATA", raising=False)
    monkeypatch.setattr(datasets, "data_folders", lambda: [datasets.cache_folder()])
    file = fetch_mnist()
    file.write_bytes(DAMAGES[damage](offer.content))
    with pytest.raises(DataError) as error:
        load_mnist()
    assert str(error.value).startswith(f"{file}: ")
    assert str(error.value).endswith(
        "; delete it, and get it with `npnet data fetch`, or copy data/mnist.npz from the npnet repository"
    )
    assert fetch_mnist() == file
    assert file.read_bytes() == offer.content
    assert np.array_equal(load_mnist()[0][1].argmax(axis=1), DIGITS["y_train"])
    assert offer.requests == 2
