"""What a rank does in the tests of data-parallel training: ``mpiexec -n 3 python -m tests.rank_work JOB FOLDER``.

Each job trains something small and prints a line of JSON per rank, or fails as the test wants it.
"""

import hashlib
import json
import os
import signal
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import npnet
from npnet import GradScaler, Saver, Sequential, SoftmaxCrossEntropy, fit, measure_peak, mixed_precision, plan
from npnet.blocks import Dropout
from npnet.gradient_sums import GradientSums
from npnet.layer import Layer
from npnet.layers import Dense, mlp
from npnet.optimizers import SGD, Adam
from npnet.ranks import Ranks

COMMUNICATOR = MPI.COMM_WORLD
RANK = COMMUNICATOR.Get_rank()
FEATURES, CLASSES, SAMPLES, BATCH = 20, 4, 203, 10  # the last batch of an epoch has 3 rows: fewer than there are ranks


def data(dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """(203, 20) and (203, 4)."""
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((SAMPLES, FEATURES)), rng.integers(0, CLASSES, SAMPLES)
    return x.astype(dtype), np.eye(CLASSES, dtype=dtype)[labels]


class Centered(Layer):
    """y = x - (the running mean of x); counts its steps."""

    def __init__(self, features: int) -> None:
        self.mean, self.steps = npnet.Buffer(np.zeros(features)), npnet.Buffer(0)

    def forward(self, x: Any) -> Any:
        self.mean.update(lambda mean: 0.9 * mean + 0.1 * x.mean(axis=0))
        self.steps.update(lambda steps: steps + 1)
        return x - self.mean.value, None

    def backward(self, dy: Any, saved: Any) -> Any:
        return dy * 1


def tied() -> Sequential:
    """One weight in all hidden layers, and layers with state between them."""
    layers = model().layers
    for layer in layers[2:-1]:
        layer.weight = layers[1].weight  # type: ignore[attr-defined]
    centered = Centered(16)
    return Sequential(*layers[:2], centered, *layers[2:4], Centered(16), *layers[4:-1], centered, layers[-1])


def model(dropout: bool = False, hidden: int = 6, width: int = 16, dtype: Any = np.float64) -> Sequential:
    """Tanh layers, with dropout between them; first weights that are another rank's own."""
    layers: list[Layer] = []
    for number in range(hidden):
        seed = 1000 * RANK + number  # rank 0's are broadcast
        layers.append(Dense(width if number else FEATURES, width, "tanh", rng=seed, dtype=dtype))
        layers += [Dropout(0.2, key=number)] if dropout else []
    return Sequential(*layers, Dense(width, CLASSES, "identity", rng=1000 * RANK + 99, dtype=dtype))


def trained(
    network: Sequential, epochs: int = 10, *, dropout_seed: int = 5, communicator: Any = COMMUNICATOR, **options: Any
) -> np.ndarray:
    """All weights after a training, in a row."""
    npnet.set_seed(dropout_seed)
    options = {"optimizer": Adam(1e-2), "loss": SoftmaxCrossEntropy(), "batch_size": BATCH, "rng": 3} | options
    fit(network, options.pop("data", None) or data(), epochs=epochs, log=False, communicator=communicator, **options)
    return np.concatenate([each.value.ravel() for each in network.named_arrays().values()])


CASES: dict[str, tuple[bool | None, dict[str, Any]]] = {
    "plain": (False, {}),
    "checkpointed, dropout": (True, {"schedule": "sqrt"}),
    "accumulated": (True, {"accumulation_steps": 3, "schedule": "sqrt"}),
    "clipped": (True, {"clip_norm": 0.1}),
    "after the backward pass": (False, {"streaming": False, "test_data": data()}),
    "momentum, decay of weights": (False, {"optimizer": SGD(0.1, momentum=0.9, weight_decay=1e-3), "decay": True}),
    "shared, with state, checkpointed": (None, {"schedule": "sqrt", "clip_norm": 1.0}),
}
"""Whether there is dropout (None: the `tied` model), and what else `npnet.fit` is given.

210 steps each (70 with accumulation).
"""


def equal(folder: Path) -> Any:
    """Train all cases; rank 0 writes the weights, each rank says their hash."""
    hashes = {}
    for name, (dropout, options) in CASES.items():
        if "optimizer" in options:
            options = options | {"optimizer": type(options["optimizer"])(**options["optimizer"].config())}
        weights = trained(tied() if dropout is None else model(dropout), **options)
        hashes[name] = hashlib.sha256(weights.tobytes()).hexdigest()
        if RANK == 0:
            np.save(folder / f"{name}.npy", weights)
    return hashes


def own_masks(folder: Path) -> Any:
    """As if dropout knew nothing of the other ranks."""
    npnet.random.first_row = lambda: 0
    if RANK == 0:
        np.save(folder / "own masks.npy", trained(model(True), schedule="sqrt"))
    else:
        trained(model(True), schedule="sqrt")


def not_summed(folder: Path) -> Any:
    """Gradients stay each rank's own."""
    Ranks.start_sum = lambda self, buffer: COMMUNICATOR.Ibarrier()  # type: ignore[method-assign]
    trained(model())


def counted(folder: Path) -> Any:
    """How many sums there are, of how many numbers, and how many layers were still to come when each began."""
    sums, passed = [], [0]
    start_sum, add = Ranks.start_sum, GradientSums.add
    npnet.chain_costs.MESSAGE_BYTES = 2 * 16 * 17 * 8  # type: ignore[attr-defined] # two layers of 16

    def counting(self: Ranks, buffer: np.ndarray) -> Any:
        sums.append([buffer.size, passed[0]])
        return start_sum(self, buffer)

    def adding(self: GradientSums, layer: Layer) -> None:
        add(self, layer)
        passed[0] += 1

    Ranks.start_sum, GradientSums.add = counting, adding  # type: ignore[method-assign,assignment]
    few = tuple(part[:30] for part in data())
    trained(model(), 1, data=few, accumulation_steps=3)
    return sums


def memory(folder: Path) -> Any:
    """Predicted and measured peak of a training step, construction included."""
    npnet.set_seed(0)
    x, y = np.ones((4096, 64)), np.eye(8)[np.arange(4096) % 8]
    sizes = [64, *[96] * 10, 8]
    chosen = plan(mlp(sizes, "tanh", dtype=np.float64), 4096, strategy="sqrt", loss=SoftmaxCrossEntropy(),
                  optimizer=Adam(), ranks=COMMUNICATOR.Get_size())  # fmt: skip
    rows = len(range(4096)[Ranks(COMMUNICATOR).share(4096)])

    def step() -> None:
        fit(mlp(sizes, "tanh", dtype=np.float64, rng=0), (x, y), loss=SoftmaxCrossEntropy(), optimizer=Adam(),
            epochs=2, batch_size=4096, schedule=chosen.schedule, shuffle=False, log=False,
            communicator=COMMUNICATOR)  # fmt: skip

    step()  # what Python and MPI keep from the first time on
    return [chosen.peak_bytes, measure_peak(step).increase_bytes, rows]


def overflow(folder: Path) -> Any:
    """Half precision, where the gradients of rank 1's rows alone overflow: all skip that step."""
    x, y = data(np.float32)
    x = x[:20].copy()
    x[7] = 600  # in the second half of the first batch
    linear = mlp([FEATURES, 16, CLASSES], "identity", rng=0)
    network, scaler = mixed_precision(linear, half_products=True), GradScaler(2.0**17)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = trained(network, 4, data=(x, y[:20]), scaler=scaler, shuffle=False, optimizer=SGD(0.01))
    return [scaler.state_dict(), hashlib.sha256(weights.tobytes()).hexdigest()]


class OnRank(Layer):
    """Does something on one rank in its third forward pass, and else nothing."""

    output_suffices = True

    def __init__(self, rank: int, action: Callable[[], Any]) -> None:
        self.rank, self.action, self.passes = rank, action, 0

    def config(self) -> dict[str, Any]:
        """For a save."""
        return {}

    def forward(self, x: np.ndarray) -> Any:
        self.passes += 1
        if self.rank == RANK and self.passes == 3:
            self.action()
        return x.copy(), (x, x)

    def backward(self, dy: np.ndarray, saved: Any) -> np.ndarray:
        return dy.copy()


def with_layer(rank: int, action: Callable[[], Any]) -> Sequential:
    """A model in which it happens."""
    network = model()
    return Sequential(*network.layers[:3], OnRank(rank, action), *network.layers[3:])


def fails() -> None:
    """A mistake in somebody's layer."""
    raise ZeroDivisionError("on purpose")


def failing(folder: Path) -> Any:
    """Rank 1 fails in a forward pass: before anything is summed, so all can be told."""
    try:
        trained(with_layer(1, fails))
    except (ZeroDivisionError, npnet.RankFailed) as error:
        return f"{type(error).__name__}: {error}"


def failing_backward(folder: Path) -> Any:
    """Rank 1 fails when sums are under way."""

    class Failing(Dense):
        def backward_(self, dy: np.ndarray, saved: Any, needs_dx: bool = True) -> np.ndarray | None:
            if RANK == 1 and npnet.random.next_step() > 3:
                fails()
            return super().backward_(dy, saved, needs_dx)

    npnet.chain_costs.MESSAGE_BYTES = 64  # type: ignore[attr-defined]
    network = model()
    network.layers[0] = Failing(FEATURES, 16, "tanh", rng=0, dtype=np.float64)
    trained(network)


def diverging(folder: Path) -> Any:
    """A row of rank 1's share is too much for the loss."""
    x, y = data()
    x[8] = 1e200  # of the first batch's second half
    network = mlp([FEATURES, 16, 16, CLASSES], "identity", dtype=np.float64, rng=0)
    before = np.concatenate([parameter.value.ravel() for parameter in network.parameters()])
    try:
        trained(network, data=(x, y), shuffle=False, loss=npnet.Quadratic())
    except npnet.TrainingDiverged as error:
        after = np.concatenate([parameter.value.ravel() for parameter in network.parameters()])
        return [str(error), bool(np.array_equal(before, after))]


def diverging_tests(folder: Path) -> Any:
    """The last row of the test data, which is the last rank's, is too much: all hear the same kind of error."""
    x, y = data()
    x[-1] = 1e200
    network = mlp([FEATURES, 16, 16, CLASSES], "identity", dtype=np.float64, rng=0)
    network.layers[-1].weight.value *= 1e200  # type: ignore[attr-defined]
    few = x[:20] * 1e-300, y[:20]
    said = []
    for _ in range(2):
        try:
            trained(network, 1, data=few, test_data=(x, y), optimizer=SGD(0.0))
        except npnet.TrainingDiverged as error:
            said.append(str(error))
    return said


def failing_transform(folder: Path) -> Any:
    """Rank 1 fails between two steps: all can be told."""
    passes = []

    def transform(rows: np.ndarray) -> np.ndarray:
        passes.append(rows)
        if RANK == 1 and len(passes) == 7:
            fails()
        return rows

    try:
        trained(model(), transform=transform)
    except (ZeroDivisionError, npnet.RankFailed) as error:
        return f"{type(error).__name__}: {error}"


def late(folder: Path) -> Any:
    """Rank 1 comes to the training when rank 0 has lost its patience."""
    npnet.ranks.PATIENCE = 0.2
    if RANK == 1:
        time.sleep(1)
    return hashlib.sha256(trained(model(), 1).tobytes()).hexdigest()


def unseeded(folder: Path) -> Any:
    """Dropout and weights that each rank has drawn for itself are rank 0's, and so is what the optimizer remembers."""
    optimizer, hashes = Adam(1e-2), []
    for _ in range(2):
        layers = [Dense(FEATURES, 16, "tanh", dtype=np.float64), Dropout(0.5), Dense(16, CLASSES, dtype=np.float64)]
        weights = trained(Sequential(*layers), 2, optimizer=optimizer, dropout_seed=RANK)
        hashes.append(hashlib.sha256(weights.tobytes()).hexdigest())
    network = Sequential(*layers)
    if RANK:
        optimizer._forget(network.parameters())
    weights = trained(network, 2, optimizer=optimizer)
    return [*hashes, hashlib.sha256(weights.tobytes()).hexdigest()]


def again(folder: Path) -> Any:
    """Planned, and measured where the optimizer remembers something already; the parameters are most of it."""
    tracemalloc.start()  # so that it knows what is freed later
    x, y = np.ones((8, 600), np.float32), np.eye(600, dtype=np.float32)[np.arange(8)]
    network, optimizer = mlp([600] * 7, "tanh", rng=0), Adam()
    size = COMMUNICATOR.Get_size()
    planned = plan(network, 8, strategy="none", loss=SoftmaxCrossEntropy(), optimizer=optimizer, ranks=size)

    def step() -> None:
        fit(network, (x, y), loss=SoftmaxCrossEntropy(), optimizer=optimizer, epochs=1, batch_size=8, log=False,
            communicator=COMMUNICATOR)  # fmt: skip

    step()
    there = 3 * sum(parameter.value.nbytes for parameter in network.parameters())
    return [planned.peak_bytes - there, measure_peak(step).increase_bytes, max(
        parameter.value.nbytes for parameter in network.parameters())]  # fmt: skip


class Scaled(Layer):
    """A layer of one's own that cannot say how it was made."""

    output_suffices = True

    def __init__(self, by: float) -> None:
        self.factor = by

    def forward(self, x: np.ndarray) -> Any:
        y = x * self.factor
        return y, (x, y)

    def backward(self, dy: np.ndarray, saved: Any) -> np.ndarray:
        return dy * self.factor


def unlike(folder: Path) -> Any:
    """Each kind of difference between the ranks: the message on each."""
    said = {}
    x, y = data()
    other = x + 1.0 if RANK == 1 else x
    for name, options in {
        "batch_size": {"batch_size": 10 + RANK},
        "optimizer": {"optimizer": Adam(0.1 if RANK == 1 else 0.01)},
        "data": {"data": (other, y)},
        "model": {"network": model(hidden=5 + RANK)},
        "streaming": {"streaming": RANK == 0},
        "own layer": {"network": Sequential(*model().layers[:2], Scaled(2.0 + RANK), *model().layers[2:])},
        "argument": {"epochs": -1 if RANK == 1 else 1},
        "own budget": {"memory_budget": "1 kB" if RANK == 1 else "1 GB"},
    }.items():
        try:
            trained(options.pop("network", None) or model(), **({"epochs": 1} | options))  # type: ignore[arg-type]
            said[name] = "nothing"
        except (ValueError, npnet.RankFailed) as error:
            said[name] = f"{type(error).__name__}: {error}"
    npnet.__version__ = f"0.{RANK}"
    try:
        trained(model(), 1)
    except ValueError as error:
        said["version"] = str(error)
    return said


def saved(folder: Path) -> Any:
    """Two epochs of four, saved; or, if there is a save, the rest."""
    saver = Saver(folder / "run.npz", 7, resume=True)
    epochs = int(os.environ.get("EPOCHS", "4"))
    network = model(True)
    weights = trained(network, epochs, saver=saver, schedule="sqrt")
    if RANK == 0:
        np.save(folder / f"after {epochs}.npy", weights)
    return saver.last if RANK == 0 else None


class Napping(OnRank):
    """Takes its time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(-1, fails)
        self.seconds = seconds

    def forward(self, x: np.ndarray) -> Any:
        time.sleep(self.seconds)
        return super().forward(x)


def slow(folder: Path) -> Any:
    """A training that takes its time, saved every step; it says which process each rank is."""
    (folder / f"pid {RANK}").write_text(str(os.getpid()), encoding="utf-8")
    seconds, epochs = float(os.environ.get("NAP", "0")), int(os.environ.get("EPOCHS", "2"))
    saver = Saver(folder / "run.npz", 1, resume=True)
    weights = trained(Sequential(Napping(seconds), *model().layers), epochs, saver=saver)
    if RANK == 0:
        np.save(folder / "slow.npy", weights)


def main() -> None:
    """Do the job, and print what it says, rank by rank."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    said = globals()[sys.argv[1]](Path(sys.argv[2]))
    everybody = COMMUNICATOR.gather(said)
    if RANK == 0:
        print(json.dumps(everybody))


if __name__ == "__main__":
    main()
