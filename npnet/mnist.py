"""The MNIST training script: what ``npnet train`` runs, from data to report."""

import platform
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import npnet
from npnet.archive import SaveError, read_archive
from npnet.backend import Backend, to_backend
from npnet.datasets import one_hot, read_mnist, scaled
from npnet.drawing import figure, plot_costs, plot_history, save_figure
from npnet.layer import Pair
from npnet.layers import Sequential, mlp
from npnet.losses import LOSSES, TrainingDiverged
from npnet.measuring import StepCost, step_costs
from npnet.memory import format_bytes
from npnet.network import Network
from npnet.optimizers import OPTIMIZERS
from npnet.planner import plan
from npnet.ranks import Ranks
from npnet.report import Table, describe_sizes, write_json
from npnet.run import History
from npnet.saver import Saver
from npnet.schedules import ScheduleLike
from npnet.training import fit


@dataclass(frozen=True)
class Settings:
    """How to train. ``exercise`` means: the classic exercise's first weights, samples in order, whole batches only."""

    arch: tuple[int, ...]
    activation: str
    loss: str
    optimizer: str
    learning_rate: float
    decay: str
    batch_size: int
    epochs: int
    dtype: str
    exercise: bool = False
    seed: int = 0
    samples: int | None = None  # the first so many only

    @classmethod
    def of_save(cls, path: Path) -> "Settings":
        """The settings that a training was saved with.

        Raises:
            SaveError: the file cannot be read, or has none.
        """
        said = read_archive(path)[0].get("about")
        try:
            settings = cls(**said["settings"])  # type: ignore[index]
            return replace(settings, arch=tuple(settings.arch))
        except (TypeError, KeyError):
            raise SaveError(f"{path}: not saved by npnet train") from None

    def __str__(self) -> str:
        return (
            f"{describe_sizes(self.arch)} {self.activation}, {self.loss}, {self.optimizer} {self.learning_rate:g}, "
            f"batch {self.batch_size}, {self.dtype}"
        )


MODERN = Settings(
    (784, *[128] * 20, 10), "relu", "softmax_cross_entropy", "adam", 1e-3, "linear", 512, 12, "float32"
)  # fmt: skip
CLASSIC = Settings(
    (784, 30, 30, 30, 30, 10), "sigmoid", "quadratic", "sgd", 3.0, "none", 100, 5, "float64", exercise=True
)  # fmt: skip


def train(
    settings: Settings,
    checkpoints: ScheduleLike,
    backend: Backend,
    *,
    memory_budget: float | str | None = None,
    capture: bool = False,
    data: str | None = None,
    out: Path | None = None,
    saver: Saver | None = None,
    ranks: Ranks | None = None,
    log: bool = True,
) -> None:
    """Train on MNIST, print a report, and write it to ``out``: metrics.json, metrics.csv, training.png.

    Args:
        checkpoints: the schedule to train with; plain backpropagation is measured beside it.
        memory_budget: instead of it, bytes or "20 MB": the cheapest schedule for this budget is planned.
        capture: replay recorded steps (see `npnet.CapturedStep`).
        data: MNIST's file or folder, if it is not to be searched.
        out: an existing folder, or None.
        saver: saves the training, and goes on with it (see `npnet.Saver`).
        ranks: the processes that share each batch. Rank 0 alone measures steps, on its own share, and writes.
        log: show progress bars.

    Raises:
        InfeasibleBudget: no schedule keeps to the budget.
        TrainingDiverged, KeyboardInterrupt, SystemExit: after what was measured so far is printed and written.
    """
    ranks = ranks or Ranks()
    if ranks.size > 1:
        print(ranks.processes(), flush=True)
    if settings.arch[0] != 784 or settings.arch[-1] != 10:
        raise ValueError(f"MNIST needs 784 inputs and 10 outputs, the network is {describe_sizes(settings.arch)}")
    with ranks.together():
        model = build(settings, backend)
        loss, optimizer = LOSSES[settings.loss](), OPTIMIZERS[settings.optimizer](settings.learning_rate)
        strategy = checkpoints if memory_budget is None else "optimal"
        plans = [
            plan(
                model,
                settings.batch_size,
                strategy=how,
                memory_budget=budget,
                loss=loss,
                optimizer=optimizer,
                ranks=ranks.size,
            )
            for how, budget in (("none", None), (strategy, memory_budget))
        ]
        print("loading MNIST", flush=True)
        training_data, test_data = _load(settings, backend, data)

    shared = f" on {ranks.size} ranks" if ranks.size > 1 else ""
    title = f"{settings}{shared}, checkpoints: {plans[-1].schedule.name}"
    print(title, flush=True)
    if memory_budget is not None:
        print(f"\n{plans[-1].describe()}\n", flush=True)
    transform = partial(scaled, dtype=settings.dtype)
    x, y = (part[: plans[0].batch_size] for part in training_data)
    # what is measured is a step by itself, without the buffers in which gradients are summed
    predicted = {each.schedule: each.peak_bytes - each.chain.communication for each in plans}
    costs = [] if ranks.rank else step_costs(model, loss, optimizer, predicted, transform(x), y)
    ranks.wait_for_all()

    history, outcome = History(), ""
    try:
        fit(
            model,
            training_data,
            loss=loss,
            optimizer=optimizer,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            **({"schedule": plans[-1].schedule} if memory_budget is None else {"memory_budget": memory_budget}),
            capture=capture,
            test_data=test_data,
            transform=transform,
            rng=settings.seed,
            shuffle=not settings.exercise,
            decay=settings.decay == "linear",
            history=history,
            saver=saver,
            show={"peak memory": format_bytes(costs[-1].peak_bytes)} if costs else None,
            communicator=ranks,
            log=log,
        )
        outcome = "finished"
    except (KeyboardInterrupt, SystemExit):
        outcome = "interrupted"
        raise
    except TrainingDiverged as error:
        outcome = f"diverged: {error}"
        raise
    except (OSError, MemoryError) as error:
        outcome = f"failed: {error}" if history.epochs else ""
        raise
    finally:
        if outcome and not ranks.rank:  # else nothing was trained, and what is in ``out`` stays
            _report(settings, title, history, costs, list(predicted.values()), outcome, out, saver, ranks.size)


def build(settings: Settings, backend: Backend) -> Sequential:
    """The untrained model; for the exercise with the weights that its network has after np.random.seed(seed)."""
    if settings.exercise and settings.activation == "sigmoid":
        np.random.seed(settings.seed)
        return Sequential(*Network(settings.arch, dtype=settings.dtype, backend=backend.name).layers)
    output = "sigmoid" if settings.loss == "quadratic" else "identity"
    return mlp(
        settings.arch, settings.activation, output, dtype=settings.dtype, rng=settings.seed, backend=backend.name
    )


def _load(settings: Settings, backend: Backend, data: str | None) -> tuple[Pair, Pair]:
    """Images stay bytes, 55 MB: they are scaled batch by batch."""
    arrays = read_mnist(data)
    count = min(settings.samples or len(arrays["x_train"]), len(arrays["x_train"]))
    if settings.batch_size > count:
        raise ValueError(f"batch size {settings.batch_size} is more than the {count} training samples")
    if settings.exercise:
        count -= count % settings.batch_size

    def pair(part: str, rows: slice) -> Pair:
        images, labels = arrays[f"x_{part}"][rows], arrays[f"y_{part}"][rows]
        targets = one_hot(labels, 10, settings.dtype)
        return to_backend(images.reshape(len(images), -1), backend.name), to_backend(targets, backend.name)

    return pair("train", slice(count)), pair("test", slice(None))


def _report(
    settings: Settings,
    title: str,
    history: History,
    costs: list[StepCost],
    predicted: list[int],
    outcome: str,
    out: Path | None,
    saver: Saver | None,
    ranks: int,
) -> None:
    share = f" on rank 0's share of a batch, one of {ranks}" if ranks > 1 else ""
    table = Table("costs", f"A training step{share}, measured before the training", compare_costs(costs, predicted))
    if history.accuracy is not None:
        print(f"\ntest accuracy {100 * history.accuracy:.2f} %, {history.seconds:.1f} s in training steps ({outcome})")
    print(f"\n{table}")
    if saver is not None:
        print(f"\n{saver.last}")
    if out is None:
        return
    content = {
        "outcome": outcome,
        "test_accuracy": history.accuracy,
        "seconds": history.seconds,
        "ranks": ranks,
        "costs": table.rows,
        "epochs": history.rows(),
        "settings": asdict(settings),
        "versions": {"npnet": npnet.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }
    write_json(out / "metrics.json", content)
    if history.epochs:
        Table("metrics", title, history.rows()).write(out)
        drawing, axes = figure(3)
        plot_history(history, axes[0])
        plot_costs(costs, axes[1:])
        save_figure(drawing, out / "training.png")
    print(f"\nresults in {out}")


def compare_costs(costs: list[StepCost], predicted: list[int]) -> list[dict[str, Any]]:
    """A row per schedule, with ratios to the first."""
    base = costs[0]
    return [
        {
            "checkpoints": cost.schedule,
            "extra forwards": cost.extra_forwards,
            "ms a step": round(cost.seconds * 1e3, 3),
            "time ratio": round(cost.ratio, 3),
            "peak bytes": cost.peak_bytes,
            "memory ratio": round(cost.peak_bytes / base.peak_bytes, 3),
            "predicted bytes": bytes_,
        }
        for cost, bytes_ in zip(costs, predicted, strict=True)
    ]
