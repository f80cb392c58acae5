"""Pictures of training. Every function draws on ``ax`` (a new figure's, if None) and returns it; none is shown here."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from npnet.checks import check_kind, shown
from npnet.files import replacing
from npnet.measuring import StepCost
from npnet.memory import format_bytes
from npnet.run import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#3b6ea5", "#d9822b", "#8c8c8c"


def one_each(values: Any, count: int, name: str) -> list[Any]:
    """``values`` as a list of ``count``."""
    if not isinstance(values, Iterable) or (isinstance(values, np.ndarray) and not values.ndim):
        raise ValueError(f"{name}: expected a list of {count}, one for each, got {type(values).__name__}")
    if len(given := list(values)) != count:
        raise ValueError(f"{name}: expected a list of {count}, one for each, got {len(given)}")
    return given


def named(values: Any, name: str) -> Mapping[str, Any]:
    """``values``, if they are a mapping from texts, with something to draw."""
    if not isinstance(values, Mapping) or not all(isinstance(each, str) for each in values):
        raise TypeError(f"{name}: expected numbers by name, such as {{'plain': 1.0}}, got {shown(values)}")
    if not values:
        raise ValueError(f"{name}: expected at least one, by name, such as {{'plain': 1.0}}, got none")
    return values


def finite_numbers(
    values: Any, shape: tuple[int, ...], expected: str, name: str = "measured"
) -> npt.NDArray[np.float64]:
    """``values`` as finite numbers of this shape, where -1 stands for any length."""
    with suppress(TypeError, ValueError):
        array = np.asarray(values)
        fits = array.dtype.kind in "fiub" and array.ndim == len(shape) and array.shape[1:] == shape[1:]
        if (fits or array.shape == (0,)) and np.isfinite(array).all():
            return array.astype(np.float64).reshape(shape)
    raise ValueError(f"{name}: expected {expected}, got {shown(values)}")


def axes_or_new(ax: "Axes | None", size: tuple[float, float] = (6, 4)) -> "Axes":
    """``ax``, or that of a new figure (without pyplot, so that no window and no global state come with it)."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    if ax is not None:
        return check_kind(ax, Axes, "ax", "matplotlib's figure.add_subplot()")
    return Figure(figsize=size, layout="constrained").add_subplot()


def _whole_ticks(ax: "Axes") -> None:
    """Epochs are whole numbers, be there only one."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def plot_history(history: History, ax: "Axes | None" = None) -> "Axes":
    """Training loss and test accuracy, by epoch."""
    check_kind(history, History, "history", "npnet.fit gives")
    ax = axes_or_new(ax)
    epochs = [epoch.epoch for epoch in history.epochs]
    ax.plot(epochs, [epoch.loss for epoch in history.epochs], "o-", color=BLUE)
    score = history.accuracy
    reached = "training" if score is None else f"training: {100 * score:.2f} % on the test data"
    ax.set(title=reached, xlabel="epoch", ylabel="mean training loss")
    ax.yaxis.label.set_color(BLUE)
    _whole_ticks(ax)
    scores = [(epoch.epoch, 100 * epoch.accuracy) for epoch in history.epochs if epoch.accuracy is not None]
    if scores:
        right = ax.twinx()
        right.plot(*zip(*scores, strict=True), "s-", color=ORANGE)
        right.set_ylabel("test accuracy in %", color=ORANGE)
    return ax


def plot_bars(
    values: Mapping[str, float],
    ax: "Axes | None" = None,
    *,
    title: str = "",
    ylabel: str = "",
    labels: Sequence[str] = (),
) -> "Axes":
    """A bar for each name, the first in grey: the others are compared with it. ``labels`` stand on the bars.

    Raises:
        TypeError, ValueError: ``values`` are not finite numbers by name, or none, or ``labels`` not one text for each.
    """
    named(values, "values")
    heights = finite_numbers(list(values.values()), (len(values),), "finite numbers by name", "values")
    for text, what in ((title, "title"), (ylabel, "ylabel")):
        check_kind(text, str, what, "'a text'")
    labels = one_each(labels, len(values), "labels") if not isinstance(labels, tuple) or labels else []
    ax = axes_or_new(ax)
    bars = ax.bar(list(values), heights, color=[GREY, *[BLUE] * (len(values) - 1)], width=0.6)
    ax.bar_label(bars, labels=list(labels) or None, padding=2)
    ax.set(title=title, ylabel=ylabel)
    ax.margins(y=0.15)
    return ax


def plot_accuracies(accuracies: Mapping[str, Sequence[float]], ax: "Axes | None" = None) -> "Axes":
    """Accuracy by epoch, counted from 0, for several runs; of curves that lie on each other, the later are thinner.

    Raises:
        TypeError, ValueError: ``accuracies`` are not lists of finite numbers by name, at least one.
    """
    for values in named(accuracies, "accuracies").values():
        finite_numbers(values, (-1,), "lists of finite numbers by name", "accuracies")
    ax = axes_or_new(ax)
    for i, (name, values) in enumerate(accuracies.items()):
        epochs, scores, size = range(len(values)), [100 * value for value in values], len(accuracies) - i
        ax.plot(epochs, scores, "o-", label=name, linewidth=2.5 * size, markersize=4 + 4 * size, alpha=0.6)
    ax.set(title="accuracy, with and without checkpointing", xlabel="epoch", ylabel="test accuracy in %")
    _whole_ticks(ax)
    ax.legend()
    return ax


def plot_costs(costs: Sequence[StepCost], axes: "Sequence[Axes]") -> None:
    """Time and peak memory of one training step under several schedules, side by side on two ``axes``.

    Raises:
        TypeError, ValueError: ``costs`` are not such costs, or ``axes`` not two.
    """
    if not isinstance(costs, Sequence) or not costs:
        raise TypeError("costs: expected a list of costs, as npnet.step_costs gives it, with at least one")
    for cost in costs:
        check_kind(cost, StepCost, "costs", "npnet.step_costs gives")
    axes = [axes_or_new(ax) for ax in one_each(axes, 2, "axes")]
    base = costs[0]
    plot_bars(
        {cost.schedule: cost.seconds * 1e3 for cost in costs},
        axes[0],
        title="time of a training step",
        ylabel="ms (x: median of the rounds' ratios)",
        labels=[f"{cost.seconds * 1e3:.3g} ms\nx {cost.ratio:.2f}" for cost in costs],
    )
    plot_bars(
        {cost.schedule: cost.peak_bytes / 1e6 for cost in costs},
        axes[1],
        title="peak memory of training",
        ylabel="MB",
        labels=[f"{format_bytes(cost.peak_bytes)}\nx {cost.peak_bytes / base.peak_bytes:.2f}" for cost in costs],
    )


def figure(columns: int) -> Any:
    """A figure with ``columns`` axes in a row: (figure, list of axes)."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(4.6 * columns, 4), layout="constrained")
    return drawing, list(drawing.subplots(1, columns, squeeze=False)[0])


def save_figure(drawing: Any, path: Path) -> None:
    """Write a picture, all or nothing; its kind by its suffix."""
    with replacing(path) as file:
        drawing.savefig(file, dpi=120, format=path.suffix[1:] or "png")
