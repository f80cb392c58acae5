"""A training step on a GPU: time and peak of its memory, npnet beside PyTorch. One call, of less than ten minutes.

    python -m tests.benchmarks.gpu [--seconds 480] [--networks C,512,2048,8192] [--modes float32,tf32,half]
                                   [--json FILE] [--quick]

Networks: C is 784,30x50,10 at batch 4096, a number is the width of 16 hidden layers at batch 4096 (8192: 6 layers at
batch 2048); ReLU, cross-entropy, Adam. Each step plain, every sqrt(L), with the optimal schedule at half of what plain
takes besides what is fixed, and with offloading; in PyTorch eager, compiled, and with checkpoint_sequential. In each
round all take a step, in changing order, waited for before and after; ratios are within a round, medians over rounds.
Peaks are of one more step: npnet's from its pool beside what was predicted, PyTorch's from
torch.cuda.max_memory_allocated, both with parameters and the optimizer's state, without the batch. TF32 is measured in
a process of its own, since CuPy reads CUPY_TF32 when it is loaded. Before anything is timed, gradients are compared: on
the device with those on the host, and between schedules bit for bit.
"""

import argparse
import datetime
import functools
import importlib.util
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import npnet
from npnet.device import diagnose
from npnet.report import Table

NETWORKS: dict[str, tuple[tuple[int, ...], int]] = {
    "C": ((784, *[30] * 50, 10), 4096),
    "512": ((784, *[512] * 16, 10), 4096),
    "2048": ((784, *[2048] * 16, 10), 4096),
    "8192": ((784, *[8192] * 6, 10), 2048),
    "tiny": ((20, *[16] * 6, 10), 64),
}
DEFAULT = "C,512,2048,8192"
MODES = ("float32", "tf32", "half")


class Npnet:
    """A model on the device, with its batch; ``strategies`` are steps by name."""

    def __init__(self, sizes: tuple[int, ...], batch: int, mode: str) -> None:
        rng = np.random.default_rng(0)
        x, y = rng.random((batch, sizes[0]), np.float32), np.eye(10, dtype=np.float32)[rng.integers(10, size=batch)]
        self.sizes = sizes
        model = npnet.mlp(sizes, "relu", rng=0, backend="cupy")
        self.scaler = npnet.GradScaler() if mode == "half" else None
        self.model = npnet.mixed_precision(model) if mode == "half" else model
        self.loss, self.optimizer = npnet.SoftmaxCrossEntropy(), npnet.Adam(1e-4)
        self.batch = x, y
        self.x, self.y = npnet.to_backend(x, "cupy"), npnet.to_backend(y, "cupy")
        plain = self.plan(strategy="none")
        budget = plain.chain.fixed + (plain.peak_bytes - plain.chain.fixed) // 2
        self.plans = {"plain": plain, "sqrt": self.plan(strategy="sqrt"), "offload": self.plan(strategy="offload")}
        try:
            self.plans["half the plain peak"] = self.plan(memory_budget=budget)
        except npnet.InfeasibleBudget as error:
            self.plans["smallest peak"] = self.plan(memory_budget=error.smallest_bytes)

    def plan(self, **options: Any) -> npnet.Plan:
        streaming = self.scaler is None
        given = {"loss": self.loss, "optimizer": self.optimizer, "streaming": streaming, **options}
        return npnet.plan(self.model, len(self.x), **given)

    def step(self, plan: npnet.Plan) -> None:
        npnet.accumulated_step(
            self.model, self.loss, self.optimizer, plan.schedule, [(self.x, self.y)], len(self.x), scaler=self.scaler
        )

    def peak(self, plan: npnet.Plan) -> dict[str, Any]:
        npnet.backend.ones.cache_clear()
        report = npnet.measure_peak(self.step, plan, backend="cupy")
        bytes_ = report.increase_bytes + plan.chain.parameters + plan.chain.optimizer
        return {"peak bytes": bytes_, "predicted": plan.peak_bytes, "off %": percent(bytes_, plan.peak_bytes),
                "pool bytes": report.pool_bytes, "outside bytes": report.outside_bytes}  # fmt: skip

    def check(self, mode: str) -> dict[str, Any]:
        """Gradients: whether every schedule gives the same bits, and how far they are from the host's."""
        xp = npnet.get_backend("cupy").xp
        _, plain = npnet.value_and_grad(self.model, self.loss, self.x, self.y)
        equal = True
        for plan in self.plans.values():
            _, other = npnet.value_and_grad(self.model, self.loss, self.x, self.y, schedule=plan.schedule)
            equal = equal and all(bool(xp.array_equal(plain[name], other[name])) for name in plain)
        found: dict[str, Any] = {"schedules give the same bits": equal}
        if mode == "float32" and sum(each.value.size for each in self.model.parameters()) < 2e7:
            few, host = slice(0, 256), npnet.mlp(self.sizes, "relu", rng=0)
            _, here = npnet.value_and_grad(host, self.loss, *(array[few] for array in self.batch))
            _, there = npnet.value_and_grad(self.model, self.loss, self.x[few], self.y[few])
            pairs = [(npnet.to_host(there[name]), here[name]) for name in here]
            apart = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
            found["gradients differ from the host's by"] = float(f"{apart:.2g}")
        return found


def percent(found: int, expected: int) -> float:
    return round(100 * (found - expected) / expected, 2)


class Torch:
    """The same network in PyTorch: ``how`` is eager, compile or checkpoint."""

    def __init__(
        self, sizes: tuple[int, ...], batch: tuple[np.ndarray, np.ndarray], mode: str, how: str, device: str = "cuda"
    ) -> None:
        import torch
        from torch.utils.checkpoint import checkpoint_sequential

        torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
        layers: list[Any] = []
        for n, m in itertools.pairwise(sizes):
            layers += [torch.nn.Linear(n, m), torch.nn.ReLU()]
        self.torch, model = torch, torch.nn.Sequential(*layers[:-1]).to(device)
        self.optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=device == "cuda")  # one launch, as npnet's
        self.scaler = torch.amp.GradScaler(device, enabled=mode == "half")
        self.x, self.y = (torch.from_numpy(array).to(device) for array in batch)
        segments = round(math.sqrt(len(sizes) - 1))

        def loss(x: Any, y: Any) -> Any:
            with torch.autocast(device, torch.float16, enabled=mode == "half"):
                output = (
                    checkpoint_sequential(model, segments, x, use_reentrant=False) if how == "checkpoint" else model(x)
                )
            return torch.nn.functional.cross_entropy(output.float(), y)

        if how == "compile":
            torch._dynamo.reset()  # after eight models it would go on uncompiled
        self.loss: Callable[[Any, Any], Any] = torch.compile(loss) if how == "compile" else loss

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.x, self.y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        loss.item()  # npnet looks at its loss, too

    def there(self) -> int:
        """Bytes of parameters and of what the optimizer keeps."""
        tensors = [each for group in self.optimizer.param_groups for each in group["params"]]
        states = [each for state in self.optimizer.state.values() for each in state.values() if hasattr(each, "nbytes")]
        return sum(int(each.nbytes) for each in (*tensors, *states) if each.ndim)

    def peak(self) -> dict[str, Any]:
        self.optimizer.zero_grad(set_to_none=True)
        before = self.torch.cuda.memory_allocated()  # the other contenders' arrays, too
        self.torch.cuda.reset_peak_memory_stats()
        self.step()
        return {"peak bytes": self.torch.cuda.max_memory_allocated() - before + self.there()}


Step = tuple[Callable[[], None], Callable[[], dict[str, Any]]]
"""A step, and what measures its peak."""


def contenders(sizes: tuple[int, ...], own: Npnet, mode: str) -> dict[str, Callable[[], Step]]:
    """Each by its name, not made yet."""

    def ours(plan: npnet.Plan) -> Step:
        return lambda: own.step(plan), lambda: own.peak(plan)

    def theirs(how: str) -> Step:
        other = Torch(sizes, own.batch, mode, how)
        return other.step, other.peak

    found = {f"npnet {name}": functools.partial(ours, plan) for name, plan in own.plans.items()}
    if importlib.util.find_spec("torch") is not None:
        found |= {f"torch {how}": functools.partial(theirs, how) for how in ("eager", "compile", "checkpoint")}
    return found


def tried(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it says, or why it does not: one failure does not end the others' measurement."""
    try:
        return work()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def compare(network: str, mode: str, until: float) -> Iterator[dict[str, Any]]:
    """A row per contender, as it is known."""
    sizes, batch = NETWORKS[network]
    wait = npnet.get_backend("cupy").xp.cuda.runtime.deviceSynchronize
    about = {"network": network, "mode": mode}
    made: list[Npnet] = []
    failed = tried(lambda: made.append(Npnet(sizes, batch, mode)) or {})
    if not made:
        yield {**about, "contender": "npnet", **failed}
        return
    (own,) = made
    yield {**about, "contender": "check", **tried(lambda: own.check(mode))}
    steps: dict[str, Step] = {}

    def begun(name: str, make: Callable[[], Step]) -> dict[str, Any]:
        step, peak = make()
        for _ in range(3):  # kernels are compiled, memory is taken
            step()
        wait()
        steps[name] = step, peak
        return {}

    def timed(name: str) -> dict[str, Any]:
        wait()
        start = time.perf_counter()
        steps[name][0]()
        wait()
        times[name].append(time.perf_counter() - start)
        return {}

    for name, make in contenders(sizes, own, mode).items():
        failed = tried(functools.partial(begun, name, make))
        if failed:
            yield {**about, "contender": name, **failed}
    times: dict[str, list[float]] = {name: [] for name in steps}
    shuffle, rounds = random.Random(0).shuffle, 0
    while steps and (rounds < 5 or (time.perf_counter() < until and rounds < 200)):
        order = list(steps)
        shuffle(order)
        for name in order:
            failed = tried(functools.partial(timed, name))
            if failed:
                del steps[name], times[name]
                yield {**about, "contender": name, **failed}
        rounds += 1
    for name, taken in times.items():
        row: dict[str, Any] = {**about, "contender": name, "ms": round(1e3 * statistics.median(taken), 3)}
        row["rounds"] = rounds
        for base in ("npnet plain", "torch eager"):
            if base in times:
                ratios = [mine / theirs for mine, theirs in zip(taken, times[base], strict=True)]
                row[f"/ {base}"] = round(statistics.median(ratios), 3)
        yield row | tried(steps[name][1])


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    xp = npnet.get_backend("cupy").xp
    runtime = xp.cuda.runtime
    number = runtime.getDevice()
    versions = {"npnet": npnet.__version__, "numpy": np.__version__, "cupy": getattr(xp, "__version__", "?")}
    if "torch" in sys.modules:
        versions["torch"] = sys.modules["torch"].__version__
    return {
        "date": datetime.date.today().isoformat(),
        "device": runtime.getDeviceProperties(number)["name"].decode(),
        "driver": runtime.driverGetVersion(),
        "runtime": runtime.runtimeGetVersion(),
        **versions,
    }


def parts(options: argparse.Namespace) -> dict[str, Any]:
    """All networks in the modes of this process; each row is written at once: a limit of time costs only the rest."""
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    modes, networks = options.modes.split(","), options.networks.split(",")
    begin, share = time.perf_counter(), options.seconds / (len(modes) * len(networks))
    for number, (mode, network) in enumerate((mode, network) for mode in modes for network in networks):
        until = begin + (number + 0.7) * share  # peaks and the next one's kernels take the rest
        for row in compare(network, mode, until):
            print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
            rows.append(row)
            found = {"environment": environment(), "rows": rows}
            if options.json:
                options.json.write_text(json.dumps(found, indent=1))
        print(flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480.0, help="for all of it, about")
    parser.add_argument("--networks", default=DEFAULT)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny network for a few seconds: does it run?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.networks, options.seconds = "tiny", min(options.seconds, 20.0)
    try:
        npnet.get_backend("cupy")
    except npnet.BackendUnavailable as error:
        print(f"this benchmark needs a GPU: {error}\n", *map(str, diagnose()), sep="\n", file=sys.stderr)
        return 1
    modes = options.modes.split(",")
    alone = [mode for mode in modes if mode == "tf32" and os.environ.get("CUPY_TF32") != "1"]
    share = options.seconds / len(modes)
    options.modes = ",".join(mode for mode in modes if mode not in alone)
    found: dict[str, Any] = {"environment": environment(), "rows": []}
    if options.modes:
        options.seconds -= share * len(alone)
        found = parts(options)
    for mode in alone:
        with tempfile.TemporaryDirectory() as folder:
            file = options.json.with_suffix(f".{mode}.json") if options.json else Path(folder) / "rows.json"
            own = ["--modes", mode, "--networks", options.networks, "--seconds", str(share), "--json", str(file)]
            command = [sys.executable, "-m", "tests.benchmarks.gpu", *own]
            subprocess.run(command, env={**os.environ, "CUPY_TF32": "1"}, check=False)
            found["rows"] += json.loads(file.read_text())["rows"] if file.exists() else []
            file.unlink(missing_ok=True)
    found["environment"] = environment()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    columns = [
        "network",
        "mode",
        "contender",
        "ms",
        "/ npnet plain",
        "/ torch eager",
        "peak bytes",
        "predicted",
        "off %",
    ]
    rows = [{column: row.get(column) for column in columns} for row in found["rows"] if "ms" in row]
    if rows:
        title = ", ".join(f"{key} {value}" for key, value in found["environment"].items())
        print(Table("gpu", title, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
