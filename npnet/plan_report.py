"""What ``npnet plan`` prints, writes and draws."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from npnet.backend import get_backend
from npnet.losses import LOSSES
from npnet.mnist import Settings, build
from npnet.optimizers import OPTIMIZERS
from npnet.planner import plan, tradeoff
from npnet.plans import MOST_LAYERS, Plan
from npnet.plots import figure, plot_timelines, plot_tradeoff
from npnet.report import Table, write_json
from npnet.schedules import ScheduleLike


def plan_report(
    settings: Settings, checkpoints: ScheduleLike, memory_budget: int | None, json: Path | None, picture: Path | None
) -> None:
    """Plan one training step of ``settings`` and print the plan, with the usual strategies beside it.

    Args:
        checkpoints: the schedule to describe, where there is no budget.
        memory_budget: bytes: describe the cheapest schedule that keeps to it.
        json, picture: files to write, or None.

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
    }
    curve = tradeoff(model, settings.batch_size, **options) if len(model.layers) <= MOST_LAYERS else None
    if curve is not None:
        for kind, others in curve.others.items():
            if others:
                plans[f"{kind}, smallest peak"] = min(others, key=lambda each: (each.peak_bytes, each.recompute_flops))
        plans["optimal, smallest peak"] = curve.optimal[0]
    table = Table("plan", f"A training step of {settings}", [_row(name, each, plans) for name, each in plans.items()])
    print(table)
    how = checkpoints if memory_budget is None else "optimal"
    chosen = plan(model, settings.batch_size, strategy=how, memory_budget=memory_budget, **options)
    print(f"\n{chosen.describe()}")
    if json is not None:
        write_json(json, _content(settings, chosen, table))
        print(f"\nplan in {json}")
    if picture is not None:
        columns = 3 if curve is not None else 2
        drawing, axes = figure(columns)
        plot_timelines([plans["plain"], chosen], axes=axes[:2])
        if curve is not None:
            plot_tradeoff(curve, ax=axes[2])
        drawing.savefig(picture, dpi=120)
        print(f"\npicture in {picture}")


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
