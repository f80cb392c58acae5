"""All pictures in one place: every function draws on ``ax`` (a new figure's, if None) and returns it.

Training is drawn in `npnet.drawing`, plans in `npnet.plan_drawing`, the network as a row of layers through time in
`npnet.animation`. A new figure is not pyplot's: ``ax.figure.savefig("a.png")`` writes it. For a window, and in a
notebook, give axes of pyplot's: ``plot_history(history, plt.subplots()[1])``, then ``plt.show()``.
"""

from npnet.animation import animate_schedule, plot_schedule, save_animation
from npnet.drawing import plot_accuracies, plot_bars, plot_costs, plot_history
from npnet.plan_drawing import plot_timeline, plot_timelines, plot_tradeoff

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
