"""Choosing a backend, moving arrays between them, and what is said where CuPy is not there or not whole."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import backend as registry
from npnet.backend import backend_of
from tests.guard import DeviceArray, GuardModule
from tests.scenarios import batch, network, parameters
from tests.scenarios import fresh_registry as fresh_registry
from tests.scenarios import guard_module as guard_module

# Choosing a backend.


def test_registering_a_name_again_replaces_the_backend(xp: GuardModule) -> None:
    class OtherArray:
        pass

    other = registry.Backend("guard", np, OtherArray, np.asarray)
    npnet.register_backend("guard", lambda: other)
    assert npnet.get_backend("guard") is other
    assert backend_of(OtherArray()) is other


@pytest.mark.usefixtures("xp")
def test_use_backend_chooses_for_good_or_for_a_while() -> None:
    def current() -> str:
        return npnet.get_backend().name

    assert current() == "numpy"
    with npnet.use_backend("guard") as chosen:
        assert chosen is npnet.get_backend("guard")
        assert current() == "guard"
        with npnet.use_backend("numpy"):
            assert current() == "numpy"
        assert current() == "guard"
        with pytest.raises(ZeroDivisionError), npnet.use_backend("numpy"):
            raise ZeroDivisionError
        assert current() == "guard"
    assert current() == "numpy"
    npnet.use_backend("guard")
    assert current() == "guard"
    npnet.use_backend("numpy")
    assert current() == "numpy"


@pytest.mark.usefixtures("xp")
def test_what_is_created_goes_to_the_current_backend_and_stays_there() -> None:
    with npnet.use_backend("guard"):
        net, layer = network(None), npnet.Dense(5, 3, rng=0)
        explicit = network("numpy")
        moved = npnet.to_backend(np.ones(2))
    assert {type(array) for array in [*parameters(net), layer.weight.value, layer.bias.value, moved]} == {DeviceArray}
    assert {type(array) for array in [*parameters(explicit), *parameters(network(None))]} == {np.ndarray}
    net.update_mini_batch(batch("guard"), 3.0)
    assert {type(array) for array in parameters(net)} == {DeviceArray}
    x, _ = batch("guard", dtype=np.float32)
    assert isinstance(layer.forward(x)[0], DeviceArray)


@pytest.mark.usefixtures("xp")
@pytest.mark.parametrize(
    "create",
    [
        npnet.use_backend,
        network,
        lambda name: npnet.mlp([2, 1], backend=name),
        lambda name: npnet.to_backend(np.ones(2), name),
        npnet.get_backend,
    ],
)
def test_an_unknown_name_is_refused_and_changes_nothing(create: Callable[[str], Any]) -> None:
    npnet.use_backend("guard")
    with pytest.raises(ValueError, match="unknown backend 'tpu'; choose one of 'numpy', 'cupy', 'guard'") as error:
        create("tpu")
    assert "NPNET_BACKEND" not in str(error.value)
    assert npnet.get_backend().name == "guard"


def test_the_environment_decides_until_somebody_else_does(xp: GuardModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPNET_BACKEND", "guard")
    assert isinstance(network(None).weights[0], DeviceArray)
    with npnet.use_backend("numpy"):
        assert npnet.get_backend().name == "numpy"
    assert npnet.get_backend().name == "guard"
    monkeypatch.setenv("NPNET_BACKEND", "")
    assert npnet.get_backend().name == "numpy"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("guard", "guard"),
        (
            "tpu",
            "unknown backend 'tpu' (chosen by the environment variable NPNET_BACKEND); choose one of 'numpy', 'cupy'",
        ),
    ],
)
def test_the_environment_of_a_fresh_process_decides(value: str, expected: str) -> None:
    code = """if True:
        from tests.guard import install_guard
        import npnet
        with install_guard():
            try:
                print(npnet.Network([2, 1]).backend.name)
            except ValueError as error:
                print(error)
    """
    root = Path(__file__).parents[1]
    environment = os.environ | {"NPNET_BACKEND": value}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout.startswith(expected)


def test_to_backend_and_to_host_copy_only_between_backends(xp: GuardModule) -> None:
    host = np.asfortranarray(np.ones((2, 3)))
    device = npnet.to_backend(host, "guard")
    assert isinstance(device, DeviceArray)
    assert device.flags.f_contiguous  # the layout that products like best survives
    assert backend_of(device).xp is npnet.array_module(device) is xp
    assert npnet.to_backend(device, "guard") is device
    assert npnet.to_backend(host, "numpy") is npnet.to_host(host) is host
    device[0, 0] = 5.0
    back = npnet.to_host(device)
    assert (back[0, 0], host[0, 0]) == (5.0, 1.0)
    back[0, 0] = 6.0
    assert npnet.to_backend(device, "numpy")[0, 0] == 5.0
    assert xp.syncs == {"asnumpy": 2}
    with pytest.raises(TypeError, match="expected an array of 'numpy', 'guard', got list"):
        npnet.array_module([1.0])


# CuPy that is not there, or not whole.


def pretend_cupy(monkeypatch: pytest.MonkeyPatch, driver: int, devices: Callable[[], int]) -> ModuleType:
    """A module cupy as ``import`` finds it, on a machine with that driver and those devices."""
    forget_cupy(monkeypatch)
    cupy = ModuleType("cupy")
    runtime = SimpleNamespace(driverGetVersion=lambda: driver, getDeviceCount=devices)
    cupy.__dict__.update(cuda=SimpleNamespace(runtime=runtime), ndarray=type("ndarray", (), {}), asnumpy=np.asarray)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return cupy


def forget_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = registry._loaded.pop("cupy", None)
    if loaded is not None:
        registry._by_type.pop(loaded.array_type)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)


def package_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forget_cupy(monkeypatch)
    monkeypatch.setitem(sys.modules, "cupy", None)


def package_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forget_cupy(monkeypatch)
    (tmp_path / "cupy.py").write_text("raise ImportError('libcublas.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)


def driver_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_cupy(monkeypatch, 0, driver_error)


def driver_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_cupy(monkeypatch, 11020, driver_error)


def device_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_cupy(monkeypatch, 12040, lambda: 0)


class CUDARuntimeError(RuntimeError):
    """As in CuPy."""


def driver_error() -> int:
    raise CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")


UNAVAILABLE: dict[Any, tuple[str, str]] = {
    package_missing: ("the package is missing", "pip install 'npnet[cuda12]'"),
    package_broken: ("does not load (libcublas.so.12: cannot open shared object file)", "pip install 'npnet[cuda12]'"),
    driver_missing: ("the NVIDIA driver is missing", "install the driver"),
    driver_too_old: ("the driver cannot serve this CuPy (cudaErrorInsufficientDriver", "update the driver"),
    device_missing: ("a GPU is not", "use backend 'numpy'"),
}


@pytest.mark.parametrize("break_cupy", UNAVAILABLE)
@pytest.mark.usefixtures("xp")
def test_cupy_unavailable_says_what_is_missing_and_what_to_do(
    break_cupy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    break_cupy(monkeypatch, tmp_path)
    npnet.use_backend("guard")
    for create in (npnet.use_backend, npnet.get_backend, network):
        with pytest.raises(npnet.BackendUnavailable) as error:
            create("cupy")
        message = str(error.value)
        assert message.startswith("backend 'cupy': ")
        for diagnosis, _ in UNAVAILABLE.values():
            assert (diagnosis in message) == (diagnosis == UNAVAILABLE[break_cupy][0])
        assert UNAVAILABLE[break_cupy][1] in message
    assert npnet.get_backend().name == "guard"
    assert npnet.available_backends() == ("numpy", "guard")
    # Once mended, it works at once: a failure is not remembered.
    cupy = pretend_cupy(monkeypatch, 12040, lambda: 1)
    assert npnet.get_backend("cupy").xp is cupy
    assert npnet.available_backends() == ("numpy", "cupy", "guard")
    assert backend_of(cupy.ndarray()).name == "cupy"


def test_the_environment_may_ask_for_a_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPNET_BACKEND", "cupy")
    pretend_cupy(monkeypatch, 12040, lambda: 0)
    with pytest.raises(npnet.BackendUnavailable, match="a GPU is not"):
        network(None)
    assert network("numpy").backend.name == "numpy"


def test_real_cupy_without_a_gpu_is_unavailable() -> None:
    cupy = pytest.importorskip("cupy")
    if cupy.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(npnet.BackendUnavailable, match=r"driver|GPU"):
        npnet.get_backend("cupy")
