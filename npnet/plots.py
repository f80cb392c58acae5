"""All pictures in one place: every function draws on ``ax`` (a new figure's, if None) and returns it.

Curves and bars are in `npnet.drawing`, the network as a row of layers through time in `npnet.animation`.
"""

from npnet.animation import animate_schedule, plot_schedule, save_animation
from npnet.drawing import (
    plot_accuracies,
    plot_bars,
    plot_costs,
    plot_history,
    plot_timeline,
    plot_timelines,
    plot_tradeoff,
)

__all__ = [
    "animate_schedule",
    "plot_accuracies",
    "plot_bars",
    "plot_costs",
    "plot_history",
    "plot_schedule",
    "plot_timeline",
    "plot_timelines",
    "plot_tradeoff",
    "save_animation",
]
