"""What ``npnet plan`` prints, writes and draws."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from npnet.backend import get_backend
from npnet.datasets import one_hot
from npnet.drawing import figure, save_figure
from npnet.layers import Sequential
from npnet.losses import LOSSES, Loss
from npnet.measuring import StepCost, measure_timeline, step_costs
from npnet.mnist import MEASURING, build, compare_costs
from npnet.optimizers import OPTIMIZERS, Optimizer
from npnet.plan_drawing import plot_timelines, plot_tradeoff
from npnet.planner import plan, tradeoff
from npnet.plans import MOST_LAYERS, Plan
from npnet.report import Table, write_json
from npnet.settings import Settings
from npnet.step import train_step


def plan_report(
    settings: Settings,
    *,
    measure: bool = False,
    json: Path | None = None,
    picture: Path | None = None,
    log: bool = True,
) -> None:
    """Plan one training step of ``settings`` and print the plan, with the usual strategies beside it.

    Args:
        settings: with the schedule to describe, or the budget to plan for.
        measure: run steps on random data, and set what they take beside what was predicted.
        json, picture: files to write, or None.
        log: show a progress bar while steps are measured.

    Raises:
        InfeasibleBudget: after the table is printed.
    """
    model = build(settings, get_backend())
    loss, optimizer = LOSSES[settings.loss](), OPTIMIZERS[settings.optimizer](settings.learning_rate)
    options: Mapping[str, Any] = {"loss": loss, "optimizer": optimizer}
    plans = {
        "plain": plan(model, settings.batch_size, strategy="none", **options),
        "sqrt": plan(model, settings.batch_size, strategy="sqrt", **options),
        "revolve": plan(model, settings.batch_size, strategy="revolve", **options),
        "offload": plan(model, settings.batch_size, strategy="offload", **options),
    }
    curve = tradeoff(model, settings.batch_size, **options) if len(model.layers) <= MOST_LAYERS else None
    if curve is not None:
        for kind in ("every nth", "revolve"):
            others = curve.others[kind]
            if others:
                plans[f"{kind}, smallest peak"] = min(others, key=lambda each: (each.peak_bytes, each.recompute_flops))
        plans["optimal, smallest peak"] = curve.optimal[0]
    table = Table("plan", f"A training step of {settings}", [_row(name, each, plans) for name, each in plans.items()])
    print(table)
    chosen = plan(model, settings.batch_size, **settings.strategy, **options)
    print(f"\n{chosen.describe()}")
    if settings.remark:
        print(f"\n{settings.remark}")
    content, lines, points = _content(settings, chosen, table), None, None
    if measure:
        shown = [plans["plain"], chosen]
        more = curve.optimal[: -1 : max(1, len(curve.optimal) // 5)] if curve is not None else []  # the last is plain
        costs, lines = _measured(model, loss, optimizer, settings, [*shown, *more], len(shown), log)
        points = [(cost.peak_bytes, cost.ratio - 1) for cost in costs]
        rows = compare_costs(costs[:2], [each.peak_bytes for each in shown])
        compared = Table("measured", f"Measured, rounds: {costs[0].rounds}", rows)
        content["measured"] = compared.rows
        print(f"\n{compared}")
    if json is not None:
        write_json(json, content)
        print(f"\nplan in {json}")
    if picture is not None:
        drawing, axes = figure(2 if curve is None else 3)
        drawing.set_figwidth(drawing.get_figwidth() + 1.6)  # for the legends
        plot_timelines([plans["plain"], chosen], lines, axes=axes[:2])
        if curve is not None:
            ax = plot_tradeoff(curve, points, ax=axes[2])
            if points:  # which are off the curve where time is not as flops
                ax.set_ylabel("extra flops (x: time) in % of a plain step")
                legend: Any = ax.get_legend()
                legend.get_texts()[-1].set_text("measured time: the median\nof the rounds' ratios")
        save_figure(drawing, picture)
        print(f"\npicture in {picture}")


def _measured(
    model: Sequential,
    loss: Loss,
    optimizer: Optimizer,
    settings: Settings,
    plans: Sequence[Plan],
    timelines: int,
    log: bool,
) -> tuple[list[StepCost], list[list[int]]]:
    """The costs of a step of each plan, and the timelines of the first few, with the same peaks, on random data."""
    rng = np.random.default_rng(settings.seed)
    x = rng.random((settings.batch_size, settings.arch[0])).astype(settings.dtype)
    y = one_hot(rng.integers(0, settings.arch[-1], settings.batch_size), settings.arch[-1], settings.dtype)
    schedules = [each.schedule for each in plans]
    costs = step_costs(model, loss, optimizer, schedules, x, y, rounds=20, seconds=MEASURING, log=log)
    optimizer.learning_rate = 0.0
    train_step(model, loss, optimizer, plans[0].schedule, x, y)  # the optimizer allocates its state
    lines = []
    for each, cost in zip(plans[:timelines], costs, strict=False):
        line = measure_timeline(model, loss, optimizer, each.schedule, x, y)
        # what was there before the step is not in it, Python's own objects among that: the cost has them
        before = cost.peak_bytes - each.chain.fixed - max(line)
        lines.append([number + before for number in line])
    return costs, lines


def _row(name: str, each: Plan, plans: Mapping[str, Plan]) -> dict[str, Any]:
    return {
        "strategy": name,
        "schedule": each.schedule.name,
        "peak bytes": each.peak_bytes,
        "ratio": round(each.peak_bytes / plans["plain"].peak_bytes, 3),
        "extra forwards": each.extra_forwards,
        "extra flops": f"{100 * each.overhead:.1f} %",
    }


def _content(settings: Settings, chosen: Plan, table: Table) -> dict[str, Any]:
    return {
        "settings": asdict(settings),
        "plan": {**chosen.row(), "memory budget": chosen.memory_budget, "description": chosen.describe().split("\n")},
        "strategies": table.rows,
        "timeline": [
            {**moment._asdict(), "action": str(moment.action), "peak bytes": moment.peak_bytes}
            for moment in chosen.timeline
        ],
    }
