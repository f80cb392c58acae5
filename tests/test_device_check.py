"""What `npnet device` says of a machine: of made-up ones, and of this one."""

import ctypes
import importlib.metadata
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from npnet import device
from npnet.backend import BackendUnavailable, available_backends
from npnet.cli import main
from npnet.device import diagnose
from tests.test_package import config


class Library:
    """libcuda as npnet calls it: functions that write through pointers, and return 0 if all is well."""

    def __init__(self, version: int, devices: int, status: int = 0) -> None:
        self.version, self.devices, self.status = version, devices, status

    def cuDriverGetVersion(self, pointer: Any) -> int:  # noqa: N802 - CUDA's name
        pointer._obj.value = self.version
        return 0

    def cuInit(self, flags: int) -> int:  # noqa: N802 - CUDA's name
        return self.status

    def cuDeviceGetCount(self, pointer: Any) -> int:  # noqa: N802 - CUDA's name
        pointer._obj.value = self.devices
        return 0


class FakeGPU:
    """A module like cupy that works on the host; ``off`` is added to its products."""

    float32 = np.float32
    asarray, asnumpy = staticmethod(np.array), staticmethod(np.array)
    cuda = SimpleNamespace(
        runtime=SimpleNamespace(
            getDevice=lambda: 0,
            memGetInfo=lambda: (79_000_000_000, 80_000_000_000),
            getDeviceProperties=lambda number: {"name": b"Fake"},
        )
    )

    def __init__(self, off: float = 0.0) -> None:
        self.off = off

    def dot(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a @ b + np.float32(self.off)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """machine(library, packages, gpu): such a machine."""

    def make(library: Library | None, packages: list[str], gpu: Any = None) -> None:
        def load(name: str) -> Library:
            if library is None:
                raise OSError(f"{name}: cannot open shared object file")
            return library

        def get_backend(name: str) -> Any:
            assert name == "cupy"
            if gpu is None:
                raise BackendUnavailable("backend 'cupy': the reason")
            return SimpleNamespace(xp=gpu)

        found = [SimpleNamespace(metadata={"Name": n}, version=v) for n, v in (p.split() for p in packages)]
        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: [*found, *found])  # some are listed twice
        monkeypatch.setattr(device, "get_backend", get_backend)

    return make


BARE = ["numpy 2.4.6", "cupyx-something 1.0"]
WHOLE = [*BARE, "cupy-cuda12x 14.2.0"]
MACHINES: dict[str, tuple[Library | None, list[str], Any, list[tuple[str, str, str]]]] = {
    "nothing": (None, BARE, None, [("driver", "missing", "install it"), ("package", "missing", "npnet[cuda12]")]),
    "package alone": (None, WHOLE, None, [("driver", "missing", "CPU"), ("package", "ok", "cupy-cuda12x 14.2.0")]),
    "driver, no device": (
        Library(12040, 0), WHOLE, None,
        [("driver", "ok", "CUDA 12.4"), ("device", "missing", "CUDA_VISIBLE_DEVICES"), ("package", "ok", "cupy")],
    ),
    "driver that cannot start": (
        Library(12040, 3, status=999), WHOLE, None,
        [("driver", "ok", "CUDA 12.4"), ("device", "missing", "0 found"), ("package", "ok", "cupy")],
    ),
    "no package": (
        Library(12080, 1), BARE, None,
        [("driver", "ok", "12.8"), ("device", "ok", "1"), ("package", "missing", "pip install 'npnet[cuda12]'")],
    ),
    "no package, CUDA 13": (
        Library(13010, 2), BARE, None,
        [("driver", "ok", "13.1"), ("device", "ok", "2"), ("package", "missing", "pip install 'npnet[cuda13]'")],
    ),
    "two packages": (
        Library(12080, 1), [*WHOLE, "cupy 14.2.0"], None,
        [("driver", "ok", ""), ("device", "ok", ""), ("package", "broken", "uninstall all of them")],
    ),
    "package newer than the driver": (
        Library(12080, 1), ["cupy_cuda13x 14.2.0"], None,
        [("driver", "ok", ""), ("device", "ok", ""), ("package", "broken", "is for CUDA 13, the driver for 12.8")],
    ),
    "package that does not load": (
        Library(12080, 1), WHOLE, None,
        [("driver", "ok", ""), ("device", "ok", ""), ("package", "ok", ""), ("product", "broken", "the reason")],
    ),
    "products that are wrong": (
        Library(13000, 1), WHOLE, FakeGPU(1.0),
        [("driver", "ok", ""), ("device", "ok", ""), ("package", "ok", ""), ("memory", "ok", "79.0 GB of 80.0 GB free"),
         ("product", "broken", "wrong")],
    ),
    "all is there": (
        Library(13000, 1), WHOLE, FakeGPU(),
        [("driver", "ok", ""), ("device", "ok", ""), ("package", "ok", ""), ("memory", "ok", "device 0, Fake"),
         ("product", "ok", "right")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MACHINES)
def test_what_is_there_is_said_and_what_to_do_about_the_rest(machine: Any, name: str) -> None:
    library, packages, gpu, expected = MACHINES[name]
    machine(library, packages, gpu)
    checks = diagnose()
    assert [(each.what, each.state) for each in checks] == [(what, state) for what, state, _ in expected]
    for each, (_, state, words) in zip(checks, expected, strict=True):
        assert words in str(each)
        assert str(each).startswith(f"{each.what:8} {each.state:8} ")
        assert bool(each.advice) == (state != "ok") or each.what == "product"


@pytest.mark.parametrize(("name", "code"), [("nothing", 0), ("package alone", 0), ("two packages", 1)])
def test_the_command_fails_where_something_is_broken_not_where_nothing_is(
    machine: Any, capsys: pytest.CaptureFixture[str], name: str, code: int
) -> None:
    machine(*MACHINES[name][:3])
    assert main(["device", "--size", "20", "--repeats", "1"]) == code
    text = capsys.readouterr().out
    assert text.startswith("driver ")
    assert ("Two random matrices" in text) == (code == 0)


def test_this_machine_is_diagnosed() -> None:
    states = {each.what: each.state for each in diagnose()}
    assert {"driver", "package"} <= set(states)
    assert ("product" in states and "broken" not in states.values()) == ("cupy" in available_backends())


def test_each_extra_takes_the_wheel_for_its_cuda_with_nvidias_libraries() -> None:
    """Of CUDA only the driver has to be there; and "cupy" itself would be compiled from source."""
    extras = config()["options.extras_require"]
    for major in ("12", "13"):
        assert re.fullmatch(rf"cupy-cuda{major}x\[ctk\]>=14", extras[f"cuda{major}"])
    assert not re.search(r"\bcupy\s*([<>=\[]|$)", "\n".join(extras.values()), re.MULTILINE)
