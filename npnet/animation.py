"""A schedule in pictures, still and moving: what is in memory, layer by layer and action by action."""

from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from npnet.checks import check_kind, check_number
from npnet.drawing import BLUE, axes_or_new
from npnet.files import replacing, write_text
from npnet.memory import format_bytes
from npnet.plan_drawing import MAKE_PLAN, bytes_alive_axis, draw_budget
from npnet.plans import Plan
from npnet.schedule import BACKWARD, DROP, DURING, FETCH, FORWARD, HOLDING, OFFLOAD, Action, Schedule

if TYPE_CHECKING:
    from matplotlib.animation import FuncAnimation
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

STATES = {
    "computed": "#2aa084",
    "recomputed": "#e8862e",
    "used, then freed": "#5a1e4a",
    "held": "#93c8f2",
    "held as checkpoint": BLUE,
    "out of memory, offloaded": "#d9c27a",
    "not in memory": "#ffffff",
}
"""What an activation is during an action, and its colour; told apart with every kind of colour blindness."""

COMPUTED, RECOMPUTED, USED, HELD, CHECKPOINT, OUT, GONE = range(7)

SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")

MOST_FRAMES = 300  # of an animation

MOST_CELLS = 500  # of a picture, in a row or column

FEW = 40
"""Up to so many rows or columns, each has its name and its letter."""


def states(schedule: Schedule, checkpoints: Collection[int] = ()) -> npt.NDArray[np.uint8]:
    """What each activation is during each action: positions in `STATES`, shape (actions, L + 1).

    Args:
        schedule: what is done.
        checkpoints: forward actions, by index, whose activation is held as a checkpoint.
    """
    row = np.full(schedule.depth + 1, GONE, dtype=np.uint8)
    row[0] = HELD
    table = np.empty((len(schedule), schedule.depth + 1), dtype=np.uint8)
    seen: set[int] = set()
    now = {DROP: GONE, BACKWARD: USED, OFFLOAD: OUT, FETCH: HELD}
    for i, (kind, layer) in enumerate(schedule):
        row[layer] = now[kind] if kind is not FORWARD else RECOMPUTED if layer in seen else COMPUTED
        seen.add(layer)
        table[i] = row
        holds = CHECKPOINT if i in checkpoints else HELD
        row[layer] = holds if kind in HOLDING else OUT if kind is OFFLOAD else GONE
    return table


def _picture(table: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The table's colours, shape (rows, columns, 3). Where cells would be finer than pixels, several become one, with
    that state of theirs which comes first in `STATES`.
    """
    for axis, count in enumerate(table.shape):
        table = np.minimum.reduceat(table, range(0, count, _blend(count)), axis=axis)
    palette = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in STATES.values()]
    return np.array(palette, dtype=np.uint8)[table]


def _blend(count: int) -> int:
    """How many of ``count`` rows or columns become one."""
    return -(-count // MOST_CELLS)


def _draw_states(ax: "Axes", table: npt.NDArray[np.uint8], which: Collection[int], **legend: Any) -> "AxesImage":
    """The table as an image, row 1 at the top, with names of columns, and the states ``which`` as a legend."""
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    (rows, columns), picture = table.shape, _picture(table)
    bottom, right = (size * _blend(count) for size, count in zip(picture.shape, table.shape, strict=False))
    extent = (-0.5, right - 0.5, bottom + 0.5, 0.5)
    image = ax.imshow(picture, aspect="auto", extent=extent, interpolation="nearest")
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(rows + 0.5, 0.5))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=columns if columns <= FEW else 10))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda layer, _: name(round(layer))))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axis, count, first in ((ax.xaxis, columns, -0.5), (ax.yaxis, rows, 0.5)):
        if count <= FEW:  # lines between the cells
            axis.set_ticks(first + np.arange(count + 1), minor=True)
            axis.grid(which="minor", color="#dddddd", linewidth=0.8)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_color("#bbbbbb")
    items = [(label, color) for i, (label, color) in enumerate(STATES.items()) if i in which]
    handles = [Patch(facecolor=color, edgecolor="#999999", label=label) for label, color in items]
    ax.legend(handles=handles, frameon=False, **legend)
    return image


def name(layer: int) -> str:
    """The activation's name, "a" with a subscript (a character: mathematical text is slow to draw)."""
    return "a" + str(layer).translate(SUBSCRIPTS)


def plot_schedule(schedule: Schedule, ax: "Axes | None" = None) -> "Axes":
    """What is in memory, as a picture: a row for each action, from the top, a column for each activation.

    It shows what `Schedule.diagram` prints, and where there is room its letters: F for an activation that is computed,
    R for recomputed, B for used by the backward pass and freed, > and < for out of memory and back. Of cells finer than
    pixels, the busiest state is shown. The legend stands to the right of ``ax``.

    Raises:
        TypeError: not a schedule.
    """
    check_kind(schedule, Schedule, "schedule", "npnet.schedules.every_nth(10, 3), or the plan.schedule of a plan")
    table = states(schedule)
    actions, columns = table.shape
    ax = axes_or_new(ax, (7.5, min(max(3.0, 0.22 * actions + 1), 7.5)))
    which = {COMPUTED, RECOMPUTED, HELD, USED, GONE, *([OUT] if schedule.offloads else [])}
    _draw_states(ax, table, which, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    if actions <= FEW and columns <= FEW:
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "fontweight": "bold", "color": "white"}
        for row, (kind, layer) in enumerate(schedule):
            if kind is not DROP:
                letter = "FR"[table[row, layer]] if kind is FORWARD else DURING[kind]  # states 0 and 1
                ax.text(layer, row + 1, letter, **style)
    if actions <= FEW:
        ax.set_yticks(range(1, actions + 1), list(map(str, schedule)), fontsize=8)
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    ax.tick_params(which="both", length=0)
    ax.set(xlabel="activation", ylabel="action (time runs down)")
    ax.set_title(f"{schedule.name}, extra forwards: {schedule.extra_forwards}", fontsize=11, parse_math=False)
    return ax


OTHERS = {DROP: "forget", OFFLOAD: "move out of memory", FETCH: "bring back"}


def caption(action: Action, again: bool) -> str:
    """An action in words; ``again`` says that the layer has run before."""
    layer, a = action.layer, name(action.layer)
    if action.kind is FORWARD:
        return f"{action}: compute {a}{' again' * again} from {name(layer - 1)}"
    if action.kind in OTHERS:
        return f"{action}: {OTHERS[action.kind]} {a}"
    below = f" and at {name(layer - 1)}" if layer > 1 else ""
    return f"{action}: from the gradient at {a} those of layer {layer}{below}; free {a}"


def animate_schedule(plan: Plan, ax: "Axes | None" = None, *, interval: float = 200) -> "FuncAnimation":
    """A training step as an animation: above, the state of each activation; below, the bytes alive until then.

    One frame for each action; of more than `MOST_FRAMES` actions, so many frames spread evenly, so that files stay
    small (the curve has every action all the same). In a notebook, ``HTML(animation.to_jshtml())`` plays it. Keep the
    animation in a variable until it is shown or saved: matplotlib warns of one that is thrown away before.

    Args:
        plan: whose schedule is shown, in bytes as in `Plan.timeline`.
        ax: where; its place is taken by the two pictures.
        interval: milliseconds between frames.

    Raises:
        TypeError, ValueError: ``plan`` is not a plan, or ``interval`` not a number of at least 1.
    """
    from matplotlib.animation import FuncAnimation
    from matplotlib.figure import Figure

    plan, interval = check_kind(plan, Plan, "plan", MAKE_PLAN), check_number(interval, "interval", least=1)
    if ax is None:  # with a layout that is computed, the picture would shake
        ax = Figure(figsize=(7.5, 4.2)).add_axes((0.1, 0.13, 0.87, 0.79))
    frames = np.unique(np.linspace(0, len(plan.schedule) - 1, MOST_FRAMES).round().astype(int)).tolist()
    show = _Stage(plan, axes_or_new(ax))
    return FuncAnimation(ax.figure.figure, show, frames=frames, interval=interval)


class _Stage:
    """The two pictures of `animate_schedule`; called with the index of an action, it shows that."""

    def __init__(self, plan: Plan, ax: "Axes") -> None:
        self.schedule = plan.schedule
        held = [0, *(moment.checkpoints for moment in plan.timeline)]
        made = {i for i, action in enumerate(plan.schedule) if action.kind in HOLDING and held[i + 1] > held[i]}
        self.table = states(plan.schedule, made)
        self.peaks = np.array([moment.peak_bytes for moment in plan.timeline])
        self.edges = np.arange(len(self.schedule) + 1) + 0.5
        ax.set_axis_off()
        ax.set_title(f"{plan.schedule.name}, extra forwards: {plan.extra_forwards}", fontsize=11, parse_math=False)
        self._draw_row(ax.inset_axes((0, 0.74, 1, 0.12)))
        self._draw_curve(ax.inset_axes((0, 0, 1, 0.44)), plan)

    def _draw_row(self, ax: "Axes") -> None:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.5), "ncols": 6, "fontsize": 8}
        which = [state for state in range(len(STATES)) if state != OUT or self.schedule.offloads]
        self.row = _draw_states(ax, self.table[:1], which, handlelength=1.2, columnspacing=1.5, **place)
        ax.set_yticks([])
        (self.pointer,) = ax.plot([0], [0.3], ">", color="black", markersize=7, clip_on=False)
        self.caption = ax.set_title("", fontsize=10, loc="left", pad=16)

    def _draw_curve(self, ax: "Axes", plan: Plan) -> None:
        self.area = ax.stairs(self.peaks[:1], self.edges[:2], fill=True, color=STATES["held"])
        self.line = ax.stairs(self.peaks[:1], self.edges[:2], baseline=None, color=BLUE, linewidth=1.2)
        self.now = ax.set_title("", fontsize=10, loc="left")
        most = draw_budget(ax, plan, int(self.peaks.max()))
        if plan.memory_budget is not None:
            ax.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=9, borderpad=0)
        bytes_alive_axis(ax, plan.chain.fixed, most, 1.1)
        ax.set(xlim=(0.5, len(self.peaks) + 0.5), xlabel="action")
        ax.spines[["top", "right"]].set_visible(False)

    def __call__(self, i: int) -> list[Any]:
        action = self.schedule[i]
        again = bool(self.table[i, action.layer] == RECOMPUTED)
        self.row.set_data(_picture(self.table[i : i + 1]))
        self.pointer.set_xdata([action.layer])
        self.pointer.set_marker({FORWARD: ">", DROP: "x", BACKWARD: "<", OFFLOAD: "v", FETCH: "^"}[action.kind])
        self.caption.set_text(f"action {i + 1} of {len(self.schedule)}, {caption(action, again)}")
        for steps in (self.area, self.line):
            steps.set_data(self.peaks[: i + 1], self.edges[: i + 2])
        now, most = format_bytes(self.peaks[i]), format_bytes(self.peaks[: i + 1].max())
        self.now.set_text(f"{now} alive; the most so far {most}")
        return [self.row, self.pointer, self.caption, self.area, self.line, self.now]


def save_animation(animation: "FuncAnimation", path: Path | str) -> None:
    """Save what `animate_schedule` gives as a file, by its suffix: ``.gif``, or ``.html`` with buttons to step through.

    All or nothing, as `npnet.files.replacing` does it.

    Raises:
        TypeError: not an animation.
        ValueError: another suffix.
        FileNotFoundError, OSError: the folder is not there, or the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.animation import FuncAnimation

    check_kind(animation, FuncAnimation, "animation", "animate_schedule gives")
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path: expected a file name that ends in .gif or .html, got {type(path).__name__}")
    path = Path(path)
    if not path.parent.is_dir():  # said before all frames are drawn
        raise FileNotFoundError(f"path: there is no folder {path.parent} for {path.name}; make it, or name another")
    if path.suffix.lower() == ".gif":
        with TemporaryDirectory() as folder, replacing(path) as file:
            animation.save(whole := Path(folder) / "a.gif", writer="pillow")
            file.write(whole.read_bytes())
    elif path.suffix.lower() == ".html":
        with rc_context({"animation.embed_limit": 500}):  # MB; beyond, frames would be left out
            page = animation.to_jshtml(default_mode="once")
        write_text(path, f"<!DOCTYPE html>\n<meta charset='utf-8'>\n{page}")
    else:
        raise ValueError(f"path: expected a file name that ends in .gif or .html, got {path.name!r}")
