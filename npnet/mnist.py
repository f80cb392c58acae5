"""The MNIST training script: what ``npnet train`` runs, from data to report."""

import json
import platform
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import npnet
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
from npnet.settings import Settings
from npnet.training import fit

MEASURING = 20.0
"""Seconds that measuring steps may take, besides one round of them."""


def train(
    settings: Settings,
    backend: Backend,
    *,
    data: str | None = None,
    out: Path | None = None,
    saver: Saver | None = None,
    done: int = 0,
    ranks: Ranks | None = None,
    log: bool = True,
) -> None:
    """Train on MNIST, print a report, and write it to ``out``: metrics.json, metrics.csv, training.png, model.npz.

    Steps are measured before: with the schedule of the settings, and with plain backpropagation beside it.

    Args:
        data: MNIST's file or folder, if it is not to be searched.
        out: an existing folder, or None.
        saver: saves the training, and goes on with it (see `npnet.Saver`).
        done: epochs that are done in the save to go on with, if there is one.
        ranks: the processes that share each batch. Rank 0 alone measures steps, on its own share, and writes.
        log: show progress bars.

    Raises:
        InfeasibleBudget: no schedule keeps to the budget.
        TrainingDiverged, KeyboardInterrupt, SystemExit: after what was measured so far is printed and written (and the
            model, where it is sound).
    """
    ranks = ranks or Ranks()
    if ranks.size > 1:
        print(ranks.processes(), flush=True)
    if settings.arch[0] != 784 or settings.arch[-1] != 10:
        raise ValueError(f"MNIST needs 784 inputs and 10 outputs, the network is {describe_sizes(settings.arch)}")
    with ranks.together():
        model = build(settings, backend)
        loss, optimizer = LOSSES[settings.loss](), OPTIMIZERS[settings.optimizer](settings.learning_rate)
        terms: dict[str, Any] = {"loss": loss, "optimizer": optimizer, "ranks": ranks.size}
        plans = [plan(model, settings.batch_size, **how, **terms) for how in ({"strategy": "none"}, settings.strategy)]
        print("loading MNIST", flush=True)
        training_data, test_data = _load(settings, backend, data)

    shared = f" on {ranks.size} ranks" if ranks.size > 1 else ""
    title = f"{settings}{shared}, checkpoints: {plans[-1].schedule.name}"
    print(title, flush=True)
    if settings.remark:
        print(settings.remark, flush=True)
    if settings.memory_budget is not None:
        print(f"\n{plans[-1].describe()}\n", flush=True)
    transform = partial(scaled, dtype=settings.dtype)
    x, y = (part[: plans[0].batch_size] for part in training_data)
    # what is measured is a step by itself, without the buffers in which gradients are summed
    predicted = {each.schedule: each.peak_bytes - each.chain.communication for each in plans}
    costs: list[StepCost] = []
    if done >= settings.epochs:
        more = "" if settings.decay == "linear" else "; more --epochs train on"
        print(f"nothing is left to do: {done} of {settings.epochs} epochs are done{more}", flush=True)
    elif settings.measure and not ranks.rank:
        costs = step_costs(model, loss, optimizer, predicted, transform(x), y, seconds=MEASURING, log=log)
    ranks.wait_for_all()

    chosen: dict[str, Any] = {"schedule": plans[-1].schedule}
    if settings.memory_budget is not None:
        chosen = {"memory_budget": settings.memory_budget, "offload": settings.offload}
    history, outcome = History(), ""
    try:
        fit(
            model,
            training_data,
            loss=loss,
            optimizer=optimizer,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            **chosen,
            capture=settings.capture,
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
            _report(settings, title, model, history, costs, list(predicted.values()), outcome, out, saver, ranks.size)


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
    available = len(arrays["x_train"])
    count = settings.samples or available
    if count > available:
        raise ValueError(f"samples: {count} is more than the {available} training samples; leave it out to take all")
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
    model: Sequential,
    history: History,
    costs: list[StepCost],
    predicted: list[int],
    outcome: str,
    out: Path | None,
    saver: Saver | None,
    ranks: int,
) -> None:
    if history.accuracy is not None:
        print(f"\ntest accuracy {100 * history.accuracy:.2f} %, {history.seconds:.1f} s in training steps ({outcome})")
    rows = compare_costs(costs, predicted) if costs else []
    if costs:
        share = f" on rank 0's share of a batch, one of {ranks}" if ranks > 1 else ""
        taken = f"rounds: {costs[0].rounds}"
        print(f"\n{Table('costs', f'A training step{share}, measured before the training, {taken}', rows)}")
    if saver is not None:
        print(f"\n{saver.last}")
    kept = _keep(model, history, outcome, out)
    if out is None:
        return
    if costs or not _reported(history, out):
        content = {
            "outcome": outcome,
            "test_accuracy": history.accuracy,
            "seconds": history.seconds,
            "ranks": ranks,
            "model": kept,
            "costs": rows,
            "rounds": costs[0].rounds if costs else 0,
            "epochs": history.rows(),
            "settings": asdict(settings),
            "versions": {"npnet": npnet.__version__, "numpy": np.__version__, "python": platform.python_version()},
        }
        write_json(out / "metrics.json", content)
        _draw(title, history, costs, out)
    print(f"\nresults in {out}")


def _keep(model: Sequential, history: History, outcome: str, out: Path | None) -> str | None:
    """Write the model, as it is now, to ``out``; the name of the file, or None where there is none."""
    if not history.epochs or outcome not in ("finished", "interrupted"):
        return None
    if out is None:
        if outcome == "interrupted":
            print("\nthe weights are lost; --out DIR keeps them, and with --save-every 100 a training can be resumed")
        return None
    path = out / "model.npz"
    try:
        model.save(path)
    except ValueError as error:  # the last step has made a NaN
        print(f"\nthe model is lost: {error}")
        return None
    print(f"\nthe model is in {path}: npnet.load({str(path)!r})")
    return path.name


def _reported(history: History, out: Path) -> bool:
    """Whether ``out`` has the report of this training, which was finished before: with costs, which were measured."""
    try:
        said = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        return bool(said["outcome"] == "finished" and said["epochs"] == history.rows())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _draw(title: str, history: History, costs: list[StepCost], out: Path) -> None:
    """metrics.csv and training.png, if there is anything to see."""
    if not history.epochs:
        return
    Table("metrics", title, history.rows()).write(out)
    drawing, axes = figure(3 if costs else 1)
    plot_history(history, axes[0])
    if costs:
        plot_costs(costs, axes[1:])
    save_figure(drawing, out / "training.png")


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
