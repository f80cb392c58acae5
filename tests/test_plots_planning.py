"""Pictures of plans: what is drawn is what the plan says."""

import gc
import itertools
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

import npnet
from npnet import animation, plan_drawing, plan_report, schedules
from npnet.animation import STATES, animate_schedule, plot_schedule, save_animation
from npnet.memory import format_bytes
from npnet.plan_drawing import BYTES, plot_timeline, plot_timelines, plot_tradeoff
from npnet.settings import MODERN

WORDS = {"F": "computed", "R": "recomputed", "o": "held", "B": "used, then freed"}  # of Schedule.diagram


def network(depth: int = 10) -> npnet.Network:
    return npnet.Network([20, *[30] * (depth - 1), 10], rng=0)


@pytest.fixture
def planned() -> npnet.Plan:
    return npnet.plan(network(), 100, every_nth=3, optimizer=npnet.Adam())


def labels(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def animated(*args, **options):
    moving = animate_schedule(*args, **options)
    moving._draw_was_started = True  # else it warns if nobody looks at it
    return moving


def line(ax: Axes, label: str):
    return next(artist for artist in (*ax.lines, *ax.patches) if artist.get_label() == label)


@pytest.mark.parametrize(("depth", "how"), [(2, {}), (10, {"every_nth": 3}), (10, {"optimizer": npnet.Adam()})])
def test_the_areas_have_the_heights_of_the_timeline(depth, how) -> None:
    plan = npnet.plan(network(depth), 100, **how)
    ax = plot_timeline(plan)
    drawn = {patch.get_label(): patch.get_data() for patch in ax.patches}
    for kind in BYTES:
        expected = [getattr(moment, kind) for moment in plan.timeline]
        assert (kind in drawn) == (kind in labels(ax)) == any(expected)
        if kind in drawn:
            upper, edges, lower = drawn[kind]
            assert (upper - lower).tolist() == expected
            assert edges.tolist() == [i + 0.5 for i in range(len(plan.schedule) + 1)]


def test_every_area_is_where_its_bytes_are(planned) -> None:
    ax = plot_timeline(planned)
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[::-1, :, :3] / 255
    for i in {*range(32)} - {15, 16, 17, 19}:  # there are lines, and the arrow of the peak
        below = 0
        for (kind, color), size in zip(BYTES.items(), planned.timeline[i][1:], strict=True):
            x, y = ax.transData.transform((i + 1, below + size / 2)).astype(int)
            assert size < 20_000 or np.allclose(pixels[y, x], to_rgb(color), atol=0.01), (i, kind)
            below += size


def test_the_measured_line_stands_on_parameters_and_optimizer_state(planned) -> None:
    model, loss, optimizer = network(), npnet.Quadratic(), npnet.Adam()
    x, y = np.random.default_rng(0).random((2, 100, 20))
    for measure in (npnet.train_step, npnet.measure_timeline):
        measured = measure(npnet.Sequential(*model.layers), loss, optimizer, planned.schedule, x, y[:, :10])
    ax = plot_timeline(planned, measured)
    values = line(ax, "measured").get_data().values
    assert values.tolist() == [number + planned.chain.fixed for number in measured]
    assert values.max() == pytest.approx(planned.peak_bytes, rel=0.1)
    assert ax.texts[1].get_text().endswith(f"measured {format_bytes(values.max())}")


def test_peak_budget_passes_and_title() -> None:
    plan = npnet.plan(network(), 100, every_nth=3, memory_budget=260_000)
    ax = plot_timeline(plan)
    arrow, peak, forward, backward = ax.texts
    at = [moment.peak_bytes for moment in plan.timeline].index(plan.peak_bytes)
    assert arrow.xy == (at + 1, plan.peak_bytes)
    assert peak.get_text() == "peak 242 kB"
    assert (forward.get_text(), backward.get_text()) == ("forward pass", "backward pass\nwith recomputation")
    assert forward.xy[0] == backward.xy[0] == 16.5  # action 17 is the first backward one
    assert line(ax, "budget 260 kB").get_ydata() == [260_000, 260_000]
    assert ax.get_title() == f"every 3\nextra forwards: 6 ({100 * plan.overhead:.1f} % more flops)"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("action", "bytes alive (kB)")
    assert ax.yaxis.get_major_formatter()(250_000, 0) == "250"
    assert plot_timeline(npnet.plan(network(), 100)).texts[-1].get_text() == "backward pass"


def test_the_y_axis_shows_what_changes() -> None:
    above = plot_timeline(npnet.plan(network(), 100, memory_budget="4 GB"))
    assert above.get_ylim()[1] < 1e6  # the budget is far above
    assert "budget 4.00 GB" in labels(above)
    plan = npnet.plan(network(), 1)  # nearly all are parameters
    assert 0 < plot_timeline(plan).get_ylim()[0] < plan.chain.fixed
    assert "not from 0" in plot_timeline(plan).get_ylabel()


def test_of_many_actions_the_worst_of_every_few_is_drawn(planned, monkeypatch) -> None:
    monkeypatch.setattr(plan_drawing, "MOST_STEPS", 10)
    measured = [1e6 * (i == 21) for i in range(32)]
    ax = plot_timeline(planned, measured, Figure().add_subplot())
    values = line(ax, "workspace").get_data().values
    peaks = [moment.peak_bytes for moment in planned.timeline]
    assert values.tolist() == [max(peaks[i : i + 4]) for i in range(0, 32, 4)]
    assert line(ax, "measured").get_data().values.argmax() == 5


def test_timelines_share_the_axis_and_one_legend(planned) -> None:
    given, plain = Figure().subplots(1, 3), npnet.plan(network(), 100)
    axes = plot_timelines([plain, planned], [None, [1.0] * 32], given[1:])
    assert axes == list(given[1:])
    assert axes[0].get_ylim() == axes[1].get_ylim()
    assert [ax.yaxis.get_visible() for ax in axes] == [True, False]
    assert axes[0].get_legend() is None
    assert labels(axes[1]) == ["measured", *reversed(BYTES)]


def test_tradeoff() -> None:
    curve = npnet.tradeoff(network(20), 100)
    ax = plot_tradeoff(curve, [(500_000, 0.1)], Figure().add_subplot())
    optimal = line(ax, "optimal")
    points = {name: [[plan.peak_bytes, 100 * plan.overhead] for plan in plans] for name, plans in curve.others.items()}
    assert optimal.get_xydata()[:-1].tolist() == [[plan.peak_bytes, 100 * plan.overhead] for plan in curve.optimal]
    assert optimal.get_drawstyle() == "steps-post"  # a budget between two points costs what the left one does
    assert optimal.get_markevery() == list(range(len(curve.optimal)))
    for name, label in (("every nth", "every nth"), ("revolve", "revolve"), ("sqrt", "sqrt (every 4)")):
        assert line(ax, label).get_xydata().tolist() == points[name]
    assert line(ax, "measured").get_xydata().tolist() == [[500_000, 10]]
    assert len({artist.get_marker() for artist in ax.lines}) == len(ax.lines) == 5
    (left, _), (right, _) = ax.transData.inverted().transform(ax.patches[0].get_window_extent())  # what is infeasible
    assert (left, right) == pytest.approx((ax.get_xlim()[0], curve.optimal[0].peak_bytes))
    assert ax.get_ylabel() == "recomputation in % of a plain step's flops"
    assert ax.get_xlabel() == "peak bytes of a training step (kB)"
    assert {"no schedule fits", "slots 15"} <= {text.get_text() for text in ax.texts}
    assert len(ax.texts) <= 9  # not all are named
    one = npnet.tradeoff(npnet.Network([20, 10]), 1)  # a single point
    assert line(plot_tradeoff(one), "optimal").get_xydata()[0].tolist() == [one.optimal[0].peak_bytes, 0]


def in_view(ax: Axes, label: str) -> list[bool]:
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    return [left < x < right and bottom < y < top for x, y in line(ax, label).get_xydata()]


@pytest.mark.parametrize("hidden", [10, 20, 50])
def test_what_the_tradeoff_compares_is_in_view(hidden: int) -> None:
    curve = npnet.tradeoff(npnet.Network([784, *[30] * hidden, 10], rng=0), 100)
    ax = plot_tradeoff(curve, [(curve.optimal[-1].peak_bytes, -0.08)])  # a step measured faster than a plain one
    assert all(in_view(ax, "measured"))
    sqrt = curve.others["sqrt"][0]
    assert all(in_view(ax, f"sqrt ({sqrt.schedule.name})"))
    for name, key in (("every nth", lambda p: (p.peak_bytes, p.overhead)), ("revolve", lambda p: p.overhead)):
        plans = [plan for plan in curve.others[name] if plan.overhead]
        best = min(plans, key=key)
        assert in_view(ax, name)[curve.others[name].index(best)], name
    costs = [100 * plan.overhead for plan in curve.optimal]
    gentle = [cost for cost in costs if cost <= costs[2]]
    assert in_view(ax, "optimal")[len(costs) - len(gentle) : len(costs)] == [True] * len(gentle)
    most = max(sqrt.overhead, max(plan.overhead for plan in curve.others["every nth"]))
    assert ax.get_ylim()[1] < 200 * most  # and not lost in an empty picture
    assert "every 2" in [text.get_text() for text in ax.texts]


@pytest.mark.parametrize(
    ("sizes", "batch"),
    [
        ([784, *[30] * 50, 10], 100),
        ([784, *[128] * 20, 10], 512),
        ([784, 512, 256, 128, 64, 64, 128, 256, 512, 784], 1024),
    ],
)
def test_no_name_of_a_point_lies_on_the_curve(sizes: list[int], batch: int) -> None:
    ax = plot_tradeoff(npnet.tradeoff(npnet.Network(sizes, rng=0), batch), ax=Figure((4.6, 4)).add_subplot())
    FigureCanvasAgg(ax.figure).draw()
    optimal = line(ax, "optimal")
    drawn = optimal.get_transform().transform_path(optimal.get_path())
    names = [text for text in ax.texts if text.get_text() != "no schedule fits"]
    assert names
    for name in names:
        assert not drawn.intersects_bbox(name.get_window_extent(), filled=False), name.get_text()


def test_plans_picture_says_what_its_table_says_and_what_its_crosses_are(monkeypatch, tmp_path: Path) -> None:
    figures, measured = [], []
    monkeypatch.setattr(plan_report, "save_figure", lambda figure, path: figures.append(figure))
    real = plan_report.compare_costs
    monkeypatch.setattr(plan_report, "compare_costs", lambda costs, said: measured.extend(costs) or real(costs, said))
    settings = replace(MODERN, arch=(784, 30, 30, 30, 30, 10), batch_size=64)
    plan_report.plan_report(settings, measure=True, picture=tmp_path / "plan.png", log=False)
    *timelines, tradeoff = figures[0].axes
    for ax, cost in zip(timelines, measured, strict=True):
        assert line(ax, "measured").get_data().values.max() == cost.peak_bytes
        assert ax.texts[1].get_text().endswith(f"measured {format_bytes(cost.peak_bytes)}")
    assert line(tradeoff, "measured").get_xdata()[0] == measured[0].peak_bytes
    assert tradeoff.get_ylabel() == "extra flops (x: time) in % of a plain step"
    assert labels(tradeoff)[-1] == "measured time: the median\nof the rounds' ratios"


def diagram_colors(schedule: npnet.Schedule) -> np.ndarray:
    """The colours that the letters of the diagram stand for, shape (actions, L + 1, 3)."""
    head, *rows = (row + " " for row in schedule.diagram().splitlines())
    ends = [head.index(f"a{i} ") + len(f"a{i}") - 1 for i in range(schedule.depth + 1)]
    words = [[WORDS.get(row.ljust(len(head))[end], "not in memory") for end in ends] for row in rows]
    return np.array([[to_rgb(STATES[word]) for word in row] for row in words])


@pytest.mark.parametrize(
    "schedule", [schedules.none(1), schedules.every_nth(10, 3), schedules.revolve(12, 3), schedules.selective(60, [7])]
)
def test_the_cells_are_those_of_the_diagram(schedule) -> None:
    ax = Figure().add_subplot()
    assert plot_schedule(schedule, ax) is ax
    assert np.allclose(ax.images[0].get_array() / 255, diagram_colors(schedule))
    assert ax.images[0].get_extent() == [-0.5, schedule.depth + 0.5, len(schedule) + 0.5, 0.5]
    assert labels(ax) == ["computed", "recomputed", "used, then freed", "held", "not in memory"]
    letters = [letter.get_text() for letter in ax.texts]
    assert [letters.count(c) for c in "FRB"] == [schedule.diagram().count(c) * (len(schedule) <= 40) for c in "FRB"]


def test_of_cells_finer_than_pixels_the_busiest_is_shown(monkeypatch) -> None:
    monkeypatch.setattr(animation, "MOST_CELLS", 8)
    image = plot_schedule(schedules.every_nth(10, 3)).images[0]
    assert image.get_array().shape == (8, 6, 3)  # of 32 actions and 11 activations
    first = {tuple(pixel) for pixel in image.get_array()[0] / 255}
    assert first == {to_rgb(STATES["computed"]), to_rgb(STATES["not in memory"])}
    assert image.axes.get_xlim() == (-0.5, 10.5)


def test_an_animation_shows_every_action(planned) -> None:
    ax = Figure().add_subplot()
    moving = animated(planned, ax, interval=50)
    row, curve = ax.child_axes
    assert list(moving.new_frame_seq()) == list(range(32))
    colors, checkpoints = diagram_colors(planned.schedule), []
    for i in range(32):
        moving._draw_frame(i)
        shown = row.images[0].get_array()[0] / 255
        kept = (shown == to_rgb(STATES["held as checkpoint"])).all(axis=1)
        assert np.allclose(np.where(kept[:, None], to_rgb(STATES["held"]), shown), colors[i])
        checkpoints.append(set(np.flatnonzero(kept)))
        assert curve.patches[0].get_data().values.tolist() == [m.peak_bytes for m in planned.timeline[: i + 1]]
    assert row.get_title("left") == "action 32 of 32, backward 1: from the gradient at a₁ those of layer 1; free a₁"
    assert curve.get_title("left") == "273 kB alive; the most so far 377 kB"
    assert [len(kept) for kept in checkpoints] == [0] * 4 + [1] * 5 + [2] * 15 + [1] * 5 + [0] * 3
    assert set().union(*checkpoints) == {3, 6}
    moving._draw_frame(17)
    assert row.get_title("left") == "action 18 of 32, forward 7: compute a₇ again from a₆"


def test_an_animation_of_many_actions_is_thinned() -> None:
    plan = npnet.plan(network(200), 1, strategy="sqrt")
    frames = list(animated(plan).new_frame_seq())
    assert (len(frames), frames[0], frames[-1]) == (300, 0, len(plan.schedule) - 1)
    assert set(np.diff(frames)) <= {2, 3}


def test_saved_animations(tmp_path: Path) -> None:
    moving = animated(npnet.plan(network(2), 5, memory_budget="1 MB"), interval=500)
    with pytest.raises(ValueError, match=r"ends in \.gif or \.html, got 'a\.mp4'"):
        save_animation(moving, tmp_path / "a.mp4")
    for name in ("a.gif", "a.html"):
        with pytest.raises(FileNotFoundError, match=f"there is no folder .*nodir for {name}; make it, or name another"):
            save_animation(moving, tmp_path / "nodir" / name)
    save_animation(moving, tmp_path / "a.GIF")
    with Image.open(tmp_path / "a.GIF") as image:
        assert (image.format, image.n_frames, image.info["duration"]) == ("GIF", 4, 500)
    save_animation(moving, str(tmp_path / "a.html"))
    assert (tmp_path / "a.html").read_text(encoding="utf-8").count("data:image/png;base64") == 4


@pytest.mark.parametrize("name", ["a.gif", "a.html"])
def test_an_animation_that_is_made_and_saved_at_once_is_saved_without_a_warning(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save_animation(animate_schedule(npnet.plan(network(2), 5)), tmp_path / name)
        gc.collect()  # where matplotlib says what was thrown away unseen
    assert not said
    assert (tmp_path / name).stat().st_size > 1000


def test_errors(planned) -> None:
    number, axes = "finite numbers of bytes for 32 actions, got", Figure().add_subplot()
    for error, match, call in (
        (TypeError, r"plan: expected a Plan, such as .*got \(Action", lambda: plot_timeline(planned.schedule)),
        (TypeError, r"plans\[1\]: expected a Plan", lambda: plot_timelines([planned, 3])),
        (ValueError, "at least one plan", lambda: plot_timelines([])),
        (ValueError, number, lambda: plot_timeline(planned, [1.0] * 5)),
        (ValueError, number, lambda: plot_timeline(planned, [np.nan] * 32)),
        (ValueError, "measured: expected a list of 2, one", lambda: plot_timelines([planned] * 2, [None])),
        (ValueError, "axes: expected a list of 1, .* got Axes", lambda: plot_timelines([planned], None, axes)),
        (TypeError, "ax: expected an Axes", lambda: plot_timeline(planned, ax=Figure())),
        (TypeError, r"tradeoff: expected a Tradeoff, .*got \[Plan", lambda: plot_tradeoff([planned])),
        (ValueError, "pairs", lambda: plot_tradeoff(npnet.tradeoff(network(3), 5), [(1, 2, 3), (4, 5, 6)])),
        (TypeError, r"schedule: expected a Schedule, .*plan\.schedule.*got Plan", lambda: plot_schedule(planned)),
        (ValueError, "interval", lambda: animate_schedule(planned, interval=0)),
        (TypeError, "animation: expected a FuncAnimation", lambda: save_animation(planned, "a.gif")),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("palette", [BYTES, STATES])
def test_colours_are_told_apart_with_every_kind_of_colour_blindness(palette) -> None:
    """With the matrices of Machado, Oliveira & Fernandes, 2009: full, then missing red, green, blue."""
    red = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
    green = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    blue = [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]
    for kind in (np.eye(3), red, green, blue):
        seen = [np.dot(kind, np.power(to_rgb(color), 2.2)).clip(0, 1) ** (1 / 2.2) for color in palette.values()]
        assert min(np.abs(one - other).sum() for one, other in itertools.combinations(seen, 2)) > 0.2
