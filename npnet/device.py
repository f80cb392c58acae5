"""What a GPU is worth: creating arrays and multiplying them on the host and on the device."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from npnet.backend import BackendUnavailable, get_backend
from npnet.checks import check_whole
from npnet.report import Table


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
