"""The GPU: whether there is one and what it lacks, and what it is worth beside the CPU."""

import ctypes
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from npnet.backend import BackendUnavailable, get_backend
from npnet.checks import check_whole
from npnet.memory import format_bytes
from npnet.report import Table


class Check(NamedTuple):
    """One thing that a GPU needs: ``state`` is "ok", "missing" or "broken", ``advice`` what to do about it."""

    what: str
    state: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.what:8} {self.state:8} {self.found}" + (f"; {self.advice}" if self.advice else "")


def diagnose() -> list[Check]:
    """What there is of all that a GPU needs, from the bottom up: driver, device, package, memory, a small product.

    Driver and device are asked for without CuPy, so that they are known where that is missing. What stands on
    something missing is not tried.
    """
    version, count = _driver()
    if not version:
        advice = "install it (nvidia-smi must work), or use the CPU: backend 'numpy' needs nothing"
        checks = [Check("driver", "missing", "no NVIDIA driver", advice)]
    else:
        checks = [Check("driver", "ok", f"for CUDA {_version(version)} and before")]
        advice = "" if count else "is it in the machine, and does CUDA_VISIBLE_DEVICES not hide it? (nvidia-smi)"
        checks.append(Check("device", "ok" if count else "missing", f"{count} found", advice))
    checks.append(_package_check(version))
    if all(each.state == "ok" for each in checks):
        checks += _trial()
    return checks


def _driver() -> tuple[int, int]:
    """The newest CUDA version that the NVIDIA driver can serve, 12040 for 12.4, and how many GPUs it sees; 0: none."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0, 0
    version, count = ctypes.c_int(), ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)):
        return 0, 0
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        return version.value, 0
    return version.value, count.value


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _package_check(driver: int) -> Check:
    """CuPy's package: one of them, and not for a newer CUDA than the driver's, of version ``driver`` or 0."""
    extra = "cuda13" if driver >= 13000 else "cuda12"
    install = f"pip install 'npnet[{extra}]'"
    packages = sorted(
        {f"{name} {each.version}" for each in importlib.metadata.distributions() if (name := _cupy(each))}
    )
    found = ", ".join(packages)
    if not packages:
        choose = install if driver else f"{install} (or npnet[cuda13], after the CUDA version that nvidia-smi prints)"
        return Check("package", "missing", "no CuPy", choose)
    if len(packages) > 1:
        return Check("package", "broken", f"{found}, which overwrite each other", f"uninstall all of them; {install}")
    major = int("".join(filter(str.isdigit, found.split()[0])) or 0)
    if driver and major > driver // 1000:
        problem = f"{found} is for CUDA {major}, the driver for {_version(driver)}"
        return Check("package", "broken", problem, f"update the driver, or uninstall it and {install}")
    return Check("package", "ok", found)


def _cupy(distribution: importlib.metadata.Distribution) -> str:
    """Its name, if it is one of CuPy's packages: cupy-cuda12x, say; "cupy" is the source, compiled here."""
    name = str(distribution.metadata["Name"] or "").lower().replace("_", "-")
    return name if name == "cupy" or name.startswith(("cupy-cuda", "cupy-rocm")) else ""


def _trial() -> Iterator[Check]:
    """Where all is there: does it work?"""
    try:
        xp = get_backend("cupy").xp
        runtime = xp.cuda.runtime
        number = runtime.getDevice()
        free, total = runtime.memGetInfo()
        name = runtime.getDeviceProperties(number)["name"].decode()
        yield Check("memory", "ok", f"{format_bytes(free)} of {format_bytes(total)} free on device {number}, {name}")
        a = np.arange(12.0, dtype=np.float32).reshape(3, 4)
        product = xp.asnumpy(xp.dot(xp.asarray(a), xp.asarray(a.T)))
    except (BackendUnavailable, ImportError, RuntimeError, MemoryError, OSError) as error:
        yield Check("product", "broken", f"{type(error).__name__}: {error}", "reinstall the extra cuda12 or cuda13")
        return
    right = np.array_equal(product, a @ a.T)  # whole numbers: exact, whatever the order of the sums
    yield Check("product", "ok" if right else "broken", f"of two small matrices is {'right' if right else 'wrong'}")


def compare_devices(size: int = 5000, repeats: int = 3) -> Table:
    """Time the creation of two random float32 matrices (size, size) and their product, on the CPU and on the GPU.

    Medians of ``repeats`` runs, after one to warm up. The GPU works on its own: each time is taken when it has
    finished. "transfer" moves both matrices to the GPU and the product back. Where there is no GPU, the title says why.

    Raises:
        TypeError, ValueError: ``size`` or ``repeats`` is not a whole number >= 1.
    """
    size, repeats = check_whole(size, "size", least=1), check_whole(repeats, "repeats", least=1)

    def seconds(work: Callable[[], Any], wait: Callable[[], Any]) -> float:
        times = []
        for _ in range(repeats + 1):
            wait()
            start = time.perf_counter()
            work()
            wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    generator = np.random.default_rng(0)
    a, b = (generator.random((size, size), np.float32) for _ in range(2))
    cpu = {
        "create": seconds(lambda: generator.random((size, size), np.float32), lambda: None),
        "multiply": seconds(lambda: a @ b, lambda: None),
    }
    rows, title = [_row("cpu", cpu, cpu)], f"Two random matrices {size} x {size}, float32, and their product"
    try:
        xp = get_backend("cupy").xp
    except BackendUnavailable as error:
        return Table("device", f"{title}; no GPU ({error})", rows)
    wait = xp.cuda.Stream.null.synchronize
    c, d = xp.asarray(a), xp.asarray(b)
    gpu = {
        "create": seconds(lambda: xp.random.random((size, size), xp.float32), wait),
        "multiply": seconds(lambda: c @ d, wait),
        "transfer": seconds(lambda: (xp.asarray(a), xp.asarray(b), xp.asnumpy(c)), wait),
    }
    name = xp.cuda.runtime.getDeviceProperties(xp.cuda.runtime.getDevice())["name"].decode()
    rows.append(_row("gpu", gpu, cpu))
    return Table("device", f"{title}; GPU: {name}", rows)


def _row(device: str, times: dict[str, float], cpu: dict[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"device": device}
    for what in ("create", "multiply", "transfer"):
        row[f"{what} ms"] = round(1e3 * times[what], 3) if what in times else None
    row["speed-up"] = round(cpu["multiply"] / times["multiply"], 2) if "multiply" in times else None
    with_transfer = times.get("multiply", 0.0) + times.get("transfer", 0.0)
    row["with transfer"] = round(cpu["multiply"] / with_transfer, 2) if "transfer" in times else None
    return row
