"""Pictures of training: what is drawn is what was measured, and nothing is drawn of nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

import npnet
from npnet import compare, plots
from npnet.report import TIMES, Table


@pytest.mark.parametrize("draw", [plots.plot_bars, plots.plot_accuracies])
def test_a_picture_of_nothing_is_refused(draw: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"(values|accuracies): expected at least one, by name, such as .*, got none"):
        draw({})


def test_epochs_are_counted_from_0_in_the_picture_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(compare, "save_figure", lambda drawing, path: drawn.append(drawing))
    rows = [{"epoch": i, "plain": 0.1 * i, "every 2": 0.1 * i, "equal": True} for i in range(5)]
    compare._draw_accuracy(rows, tmp_path / "accuracy.png")
    lines = drawn[0].axes[0].lines
    assert [line.get_label() for line in lines] == ["plain", "every 2"]
    for line in lines:
        assert line.get_xdata().tolist() == [row["epoch"] for row in rows]
        assert line.get_ydata().tolist() == [100 * row["plain"] for row in rows]


def test_why_times_and_ratios_may_contradict_each_other_is_said_where_both_stand() -> None:
    assert str(Table("costs", "Costs", [{"ms a step": 2.0, "ratio": 1.3}])).endswith(f"\n\n{TIMES}")
    assert TIMES not in str(Table("memory", "Memory", [{"peak bytes": 2, "ratio": 1.3}]))
    costs = [npnet.measuring.StepCost(name, 0.001, 1.0, 1000, 0, 9) for name in ("plain", "sqrt")]
    axes = list(Figure().subplots(1, 2))
    plots.plot_costs(costs, axes)
    assert axes[0].get_ylabel() == "ms (x: median of the rounds' ratios)"
