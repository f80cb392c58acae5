"""Pictures of plans: bytes alive, action by action, and what memory costs in time."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from npnet.checks import check_kind
from npnet.drawing import BLUE, GREY, axes_or_new, figure, finite_numbers, one_each
from npnet.memory import format_bytes
from npnet.planner import Tradeoff
from npnet.plans import Plan
from npnet.schedule import BACKWARD, Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BYTES = {"parameters": "#c8c8c8", "optimizer": "#858585", "gradients": "#5a1e4a"}
BYTES |= {"checkpoints": BLUE, "segment": "#93c8f2", "workspace": "#f2c14e"}
"""What bytes are for (`npnet.pricing.Moment`), and its colour; told apart with every kind of colour blindness."""

MOST_STEPS = 2500  # of a curve: more would be finer than pixels, and slow
MAKE_PLAN = "npnet.plan(network, batch_size)"


def bytes_axis(axis: Any, most: float, label: str) -> None:
    """Numbers of bytes on ``axis`` are printed in the unit that suits the largest, ``most``; the label names it."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    unit, size = next((each for each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if most >= each[1]), ("B", 1))
    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / size:g}"))
    axis.set_label_text(f"{label} ({unit})")


def bytes_alive_axis(ax: "Axes", fixed: int, most: float, room: float) -> None:
    """The y axis from 0 to ``most`` bytes and some ``room``; from ``fixed`` on, if what is above were a thin strip."""
    low = fixed - 0.25 * (most - fixed) if fixed > 0.75 * most else 0.0
    ax.set_ylim(low, low + room * (most - low))
    bytes_axis(ax.yaxis, most, "bytes alive, not from 0" if low else "bytes alive")


def plot_timeline(plan: Plan, measured: Sequence[float] | None = None, ax: "Axes | None" = None) -> "Axes":
    """The bytes alive in one training step, action by action, by what they are (`Plan.timeline`).

    Action i of n, counted from 1, takes the width from i - 1/2 to i + 1/2; of more than `MOST_STEPS`, the worst of
    every few is drawn. The workspace, on top, is what an action takes at its worst, so that the upper edge is its peak.
    The y axis begins at 0, but where parameters and optimizer are nearly all. The legend stands to the right of ``ax``:
    a figure with ``layout="constrained"`` makes room for it.

    Args:
        plan: what is predicted.
        measured: what `npnet.measure_timeline` gives for the plan's schedule: a number of bytes for each action, above
            those before the step; the plan's parameters and optimizer state are added here.

    Raises:
        TypeError: not a plan.
        ValueError: ``measured`` is not one finite number for each action.
    """
    check_kind(plan, Plan, "plan", MAKE_PLAN)
    return plot_timelines([plan], None if measured is None else [measured], None if ax is None else [ax])[0]


def plot_timelines(
    plans: Iterable[Plan],
    measured: Sequence[Sequence[float] | None] | None = None,
    axes: "Sequence[Axes] | None" = None,
) -> "list[Axes]":
    """`plot_timeline` for each of ``plans``, with the same y axis and one legend, at the right of the last.

    Args:
        measured: for each plan, what `plot_timeline` takes, or None.
        axes: one for each plan; by default in a new figure, side by side.

    Raises:
        TypeError, ValueError: as for `plot_timeline`, or not one for each plan.
    """
    given = enumerate(plans if isinstance(plans, Iterable) and not isinstance(plans, np.ndarray) else [plans])
    drawn = [check_kind(plan, Plan, f"plans[{i}]", MAKE_PLAN) for i, plan in given]
    if not drawn:
        raise ValueError("plans: expected at least one plan, got none")
    lines = one_each([None] * len(drawn) if measured is None else measured, len(drawn), "measured")
    totals = [None if line is None else _total(plan, line) for plan, line in zip(drawn, lines, strict=True)]
    if axes is None:
        axes = figure(len(drawn))[1] if len(drawn) > 1 else [axes_or_new(None, (7.5, 4))]
    axes = [axes_or_new(ax) for ax in one_each(axes, len(drawn), "axes")]
    most = max(_draw_timeline(*each) for each in zip(axes, drawn, totals, strict=True))
    for ax in axes:
        bytes_alive_axis(ax, min(plan.chain.fixed for plan in drawn), most, 1.42)
        ax.yaxis.set_visible(ax is axes[0] or ax.get_position().y0 != axes[0].get_position().y0)  # once in a row
    handles = {handle.get_label(): handle for ax in axes for handle in ax.get_legend_handles_labels()[0]}
    areas = [handles.pop(label) for label in reversed(BYTES) if label in handles]  # from the top
    axes[-1].legend(handles=[*handles.values(), *areas], loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return axes


def _total(plan: Plan, measured: Any) -> npt.NDArray[np.float64]:
    """All bytes alive, from what `measure_timeline` gives."""
    actions = len(plan.schedule)
    return plan.chain.fixed + finite_numbers(measured, (actions,), f"finite numbers of bytes for {actions} actions")


def _draw_timeline(ax: "Axes", plan: Plan, total: npt.NDArray[np.float64] | None) -> float:
    """`plot_timeline` but for the y axis and the legend; returns how many bytes have to be in sight."""
    moments, peaks, number = plan.timeline, [moment.peak_bytes for moment in plan.timeline], len(plan.schedule)
    starts = range(0, number, -(-number // MOST_STEPS))  # a step of the areas is drawn for the worst action of a few
    worst = [max(range(start, min(start + starts.step, number)), key=peaks.__getitem__) for start in starts]
    edges, upper = np.array([*starts, number]) + 0.5, np.zeros(len(worst), dtype=np.int64)
    for kind, color in BYTES.items():
        values = np.array([getattr(moments[i], kind) for i in worst])
        lower, upper = upper, upper + values
        if values.any():
            ax.stairs(upper, edges, baseline=lower, fill=True, color=color, label=kind)
    most = max(peaks)
    at, peak = peaks.index(most), f"peak {format_bytes(most)}"
    if total is not None:
        ax.stairs(np.maximum.reduceat(total, starts), edges, baseline=None, color="black", label="measured")
        peak, most = f"{peak}\nmeasured {format_bytes(total.max())}", max(most, int(total.max()))
    side = "left" if at < 0.3 * number else "right" if at > 0.7 * number else "center"
    arrow = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (at + 1, peaks[at]), (0, 13), textcoords="offset points", arrowprops=arrow)
    ax.annotate(peak, (at + 1, most), (0, 13), textcoords="offset points", ha=side, va="bottom", fontsize=9)
    most = draw_budget(ax, plan, most)
    _draw_passes(ax, plan.schedule)
    title = f"{plan.schedule.name}\nextra forwards: {plan.extra_forwards} ({100 * plan.overhead:.1f} % more flops)"
    ax.set_title(title, fontsize=11, parse_math=False)
    ax.set(xlabel="action", xlim=(0.5, number + 0.5))
    ax.spines[["top", "right"]].set_visible(False)
    return most


def _draw_passes(ax: "Axes", schedule: Schedule) -> None:
    """A line before the first backward action, with what is left and right of it."""
    first = next(i for i, action in enumerate(schedule) if action.kind is BACKWARD) + 0.5
    ax.axvline(first, color=GREY, linewidth=1, linestyle=":")
    backward = "backward pass\nwith recomputation" if schedule.extra_forwards else "backward pass"
    style: dict[str, Any] = {"textcoords": "offset points", "va": "top", "fontsize": 8.5, "color": "#555555"}
    style["xycoords"] = ax.get_xaxis_transform()  # y from 0 to 1
    if first > 0.2 * len(schedule):  # else there is no room for it
        ax.annotate("forward pass", (first, 0.99), (-4, 0), ha="right", **style)
    ax.annotate(backward, (first, 0.99), (4, 0), ha="left", **style)


def draw_budget(ax: "Axes", plan: Plan, most: int) -> int:
    """A dashed line at the plan's budget, if it has one; returns how many bytes have to be in sight."""
    if (budget := plan.memory_budget or 0) > 0:
        ax.axhline(budget, color="black", linestyle="--", linewidth=1, label=f"budget {format_bytes(budget)}")
    return budget if most < budget < 2 * most else most  # a budget far above is only in the legend


STRATEGIES: dict[str, dict[str, Any]] = {
    "every nth": {"marker": "s", "color": "#2aa084", "markersize": 4.5},
    "sqrt": {"marker": "*", "color": "#f2c14e", "markersize": 15, "zorder": 4},
    "revolve": {"marker": "^", "color": "#e8862e", "markersize": 5},
}


def plot_tradeoff(
    tradeoff: Tradeoff, measured: Sequence[tuple[float, float]] | None = None, ax: "Axes | None" = None
) -> "Axes":
    """Peak bytes against recomputation: the optimal schedules as a curve, the usual strategies as points.

    The curve says what a budget costs: between two points, as much as at the left one. In view are sqrt, the points of
    every nth that no other of them beats, the cheapest revolve, and the curve but for a steep beginning. A few of the
    points that no other of their strategy beats are named. The legend stands to the right of ``ax``.

    Args:
        tradeoff: from `npnet.tradeoff`.
        measured: pairs (peak bytes, overhead), the overhead as in `Plan.overhead`: 0.25 for a quarter of a plain step.
            Time is not flops: if it is that of time, say so, as `npnet.plan_report` does.

    Raises:
        TypeError, ValueError: not a `Tradeoff`, or ``measured`` is not pairs of finite numbers.
    """
    pairs = finite_numbers([] if measured is None else measured, (-1, 2), "pairs such as (900_000, 0.25)") * (1, 100)
    ax = axes_or_new(ax, (8, 4.4))
    check_kind(tradeoff, Tradeoff, "tradeoff", "npnet.tradeoff(network, batch_size)")
    peaks, costs = _points(tradeoff.optimal).T
    points = {name: _points(plans) for name, plans in tradeoff.others.items()}
    every = np.concatenate([*points.values(), pairs, _points(tradeoff.optimal)])  # shape (points, 2)
    top = 1.25 * _most_in_view(tradeoff)
    bottom = min(-0.03 * top, 1.25 * pairs[:, 1].min(initial=0))  # a step may be measured faster than a plain one
    span = max(every[:, 0].max() - peaks[0], 0.1 * peaks[0])
    left, right = peaks[0] - 0.12 * span, every[:, 0].max() + 0.05 * span
    ax.axvspan(left, peaks[0], color="#e9e9e9", zorder=0)
    ax.text((left + peaks[0]) / 2, 0, "no schedule fits", rotation=90, ha="center", va="bottom", color="#555555")
    for name, xy in points.items():
        plans, style = tradeoff.others[name], STRATEGIES.get(name, {"marker": "D", "markersize": 5})
        label = f"{name} ({plans[0].schedule.name})" if len(plans) == 1 else name
        ax.plot(*xy.T, linestyle="", label=label, markeredgecolor="white", markeredgewidth=0.5, **style)
    shown = [*range(len(peaks))]  # not the end of the line, at the right
    style = {"drawstyle": "steps-post", "markersize": 3.5, "markevery": shown, "linewidth": 1.8, "zorder": 3}
    ax.plot([*peaks, right], [*costs, costs[-1]], "o-", color=BLUE, label="optimal", **style)
    if len(pairs):
        ax.plot(*pairs.T, "x", color="black", label="measured", markersize=8, markeredgewidth=1.8, zorder=5)
    plan = tradeoff.optimal[0]
    ax.set_title(f"what memory costs in time\n{plan.chain.depth} layers, batch size {plan.batch_size}", fontsize=11)
    bytes_axis(ax.xaxis, right, "peak bytes of a training step")
    ax.set(ylabel="recomputation in % of a plain step's flops", xlim=(left, right), ylim=(bottom, top))
    for plans in tradeoff.others.values():
        _name(ax, plans if len(plans) > 1 else [], np.column_stack([peaks, costs]))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return ax


def _most_in_view(tradeoff: Tradeoff) -> float:
    """The most recomputation, in %, that has to be in view; 1 if there is none."""
    peaks, costs = _points(tradeoff.optimal).T
    seen = [*costs[peaks > 0.9 * peaks[0] + 0.1 * peaks[-1]]]  # the steep beginning may go out of the picture
    for name, plans in tradeoff.others.items():
        best = [plan for plan in _best(plans) if plan.overhead]
        seen += [100 * plan.overhead for plan in (best[-1:] if name == "revolve" else best)]
    return float(max(seen, default=0) or costs.max() or 1)


def _best(plans: Sequence[Plan]) -> list[Plan]:
    """The plans that no other beats in bytes and recomputation, from the smallest peak to the least recomputation."""
    best: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.peak_bytes, plan.overhead)):
        if not best or plan.overhead < best[-1].overhead:
            best.append(plan)
    return best


def _points(plans: Sequence[Plan]) -> npt.NDArray[np.float64]:
    """(peak bytes, recomputation in %) of each plan, shape (plans, 2)."""
    return np.array([(plan.peak_bytes, 100 * plan.overhead) for plan in plans], dtype=np.float64).reshape(-1, 2)


def _name(ax: "Axes", plans: Sequence[Plan], curve: npt.NDArray[np.float64]) -> None:
    """Name four at most of the ``plans`` in view, such that no other one is better, where there is room for a name.

    That is to the left below its point, where no other point of the strategy is, if the ``curve`` is not there either;
    else to the right below.
    """
    from matplotlib.patheffects import withStroke

    inches = np.array([ax.bbox.width, ax.bbox.height]) / ax.figure.dpi
    wide, high = np.diff([ax.get_xlim(), ax.get_ylim()]).T[0] / inches * (0.065, 0.2)  # of a letter, in bytes and %
    best = [plan for plan in _best(plans) if 0 < 100 * plan.overhead < ax.get_ylim()[1]]
    style: dict[str, Any] = {"va": "top", "fontsize": 8, "color": "#333333", "parse_math": False, "zorder": 6}
    style["path_effects"] = [withStroke(linewidth=2, foreground="white")]
    last = 0.0
    for plan in best if len(best) <= 4 else [best[i * len(best) // 5] for i in range(1, 5)]:
        name, (peak, cost) = plan.schedule.name.replace("revolve", "slots"), _points([plan])[0]
        for side, offset, begin in (("right", (-1, -2), peak - wide * len(name)), ("left", (3, -1), peak)):
            most = curve[max(np.searchsorted(curve[:, 0], begin, "right") - 1, 0), 1]  # of the curve, under the name
            if most < cost - high and peak - wide * len(name) > last:
                ax.annotate(name, (peak, cost), offset, textcoords="offset points", ha=side, **style)
                last = peak if side == "right" else peak + wide * len(name)
                break
