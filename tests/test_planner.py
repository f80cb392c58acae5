"""Planning: what can be asked for, what is refused and why, what a plan says of itself, and the trade-off curve."""

import pickle

import numpy as np
import pytest

import npnet
from npnet import planner, schedules
from npnet.layers import Dense, Sequential, mlp
from npnet.optimal import smallest_budget
from npnet.planner import plan, tradeoff
from npnet.plans import MOST_LAYERS, InfeasibleBudget

UNIFORM = mlp([30] * 51, "sigmoid", rng=0)  # activations of 12 kB for 100 samples
MIXED = mlp([20, 37, 11, 64, 5, 23, 48, 9, 31, 17, 10], rng=0)
NESTED = Sequential(Dense(9, 9, rng=0), *(Sequential(Dense(9, 9, rng=i), Dense(9, 9, rng=i)) for i in range(9)))
MANY = mlp([2] * (MOST_LAYERS + 2), rng=0)


def ask(budget, **options):
    return plan(MIXED, 100, memory_budget=budget, **options)


@pytest.mark.parametrize(("n", "extra"), [(7, 42), (2, 24), (50, 0), (51, 0), (1000, 0), (0, 0), (1, 0)])
def test_every_nth_of_fifty_layers_and_its_figures(n, extra):
    for options in ({}, {"strategy": "every_nth"}):
        found, one = plan(UNIFORM, 100, every_nth=n, **options), 100 * 30 * (2 * 30 + 1 + 4)  # product, bias, sigmoid
        assert found.schedule == schedules.every_nth(50, n)
        assert found.overhead == extra * one / found.chain.step_flops
        figures = max(moment.peak_bytes for moment in found.timeline), extra, extra * one, round(found.overhead, 4)
        assert [*found.row().values()] == [found.schedule.name, *figures, False]


def test_a_strategy_is_a_name_or_a_schedule_and_revolve_with_seven_slots_recomputes_105_layers():
    for strategy in (schedules.revolve(50, 7), lambda depth: schedules.revolve(depth, 7), [*schedules.revolve(50, 7)]):
        assert plan(UNIFORM, 100, strategy=strategy).extra_forwards == 105
    for name in (None, "none", "sqrt", "revolve"):
        assert plan(UNIFORM, 100, strategy=name).schedule == schedules.MAKERS[name or "none"](50)
    assert plan(NESTED, 5, strategy="sqrt").schedule.needs_saved == {*range(2, 11)}


@pytest.mark.parametrize("name", ["every_nth", "revolve"])
def test_with_a_budget_the_cheapest_of_a_kind_that_fits_is_taken(name):
    kind = [plan(MIXED, 100, strategy=getattr(schedules, name)(10, n)) for n in range(2, 11)]
    least = min(each.peak_bytes for each in kind)
    for budget in np.linspace(least, plan(MIXED, 100).peak_bytes, 9):
        found = ask(budget, strategy=name)
        assert found.recompute_flops == min(each.recompute_flops for each in kind if each.peak_bytes <= budget)
        assert found.peak_bytes <= budget


def test_one_layer_can_be_planned_with_every_nth_and_a_budget():
    assert plan(mlp([3, 2]), 5, memory_budget="1 MB", strategy="every_nth").extra_forwards == 0


SIZES = ["20 MB", "20MB", " 20  mb ", "0.02 GB", "20000 kB", "20000000", "2e7", "2e7 B", 2e7, 20_000_000, np.int64(2e7)]
BINARY = ["20MiB", "20 mib", "20480 KiB", "0.01953125 GiB", np.float32(20 * 2**20)]
NO_SIZES = ["", " ", "MB", "20 XB", "20 TB", "20 MB 3", "1,5 MB", "None", "None MB", "nan", "inf MB", "-1", "-2 MB"]
NO_NUMBERS = [-1, 0, 0.5, float("nan"), float("inf"), -float("inf"), True, np.True_, [1], b"20 MB", 2j, {}]


@pytest.mark.parametrize("size", [*SIZES, *BINARY])
def test_a_budget_may_be_written_in_many_ways(size):
    count = 20_000_000 if size in SIZES else 20 * 2**20
    assert (ask(size).memory_budget, type(ask(size).memory_budget)) == (count, int)
    assert npnet.NetworkWithCheckpointing([3, 2], memory_budget=size).memory_budget == count


@pytest.mark.parametrize("size", [*NO_SIZES, *NO_NUMBERS], ids=repr)
def test_a_bad_budget_is_refused(size):
    kind = ValueError if type(size) in (str, int, float) else TypeError
    for call in (ask, lambda size: npnet.NetworkWithCheckpointing([3, 2], memory_budget=size)):
        with pytest.raises(kind, match=r'^memory_budget: expected bytes, or .* "20 MB" or "20 MiB".*, got ') as error:
            call(size)
        assert str(error.value).endswith(repr(size))


class Square(npnet.Layer):
    """By a student, who says nothing of costs."""


SILENT = Sequential(npnet.Tanh(), npnet.ReLU())  # no layer tells how many features the input has
NO_NETWORKS = [None, "x", [], UNIFORM.layers, 5, Dense(3, 2), Sequential, {"layers": 1}]
UNPRICED = [Sequential(Dense(3, 2), Square()), Sequential(Dense(3, 2), Sequential(Square()))]
BAD_NETWORKS = {
    "^network: expected a Network or a Sequential, got ": [{"network": network} for network in NO_NETWORKS],
    r"give Square a method cost\(self, shape, dtype, needs_dx=True\)": [{"network": network} for network in UNPRICED],
    "^features: no layer tells .*; give features=": [{"network": SILENT}],
    r"Dense\(5, 2, relu\): expected rows of 5 features, got 4$": [{"network": Sequential(Dense(3, 4), Dense(5, 2))}],
    "^batch_size: expected a whole number, at least 1": [{"batch_size": n} for n in (0, -1, 1.5, True, "5", None)],
}
BAD = BAD_NETWORKS | {
    "give every_nth or strategy='sqrt', not both": [{"every_nth": 3, "strategy": "sqrt"}],
    "give every_nth or strategy='optimal', not both": [{"every_nth": 3, "strategy": "optimal", "memory_budget": 1e9}],
    "strategy 'optimal' needs memory_budget: bytes, or a size": [{"strategy": "optimal"}],
    "strategy 'every_nth' needs every_nth=n, or a memory_budget": [{"strategy": "every_nth"}],
    "unknown schedule '.*'; choose one of 'none'": [{"strategy": "OPTIMAL", "memory_budget": 1e9}, {"strategy": "b"}],
    "schedule: expected a Schedule .*, got 7": [{"strategy": 7}],
    "the schedule 'plain' is for 3 layers, the network has 50": [{"strategy": schedules.none(3)}],
    "^n: expected a whole number, at least 0, got": [{"every_nth": n} for n in (-1, 2.5, True, "2")],
}


@pytest.mark.parametrize(("message", "options"), [(m, o) for m, some in BAD.items() for o in some])
def test_bad_arguments_are_refused(message, options):
    for call in (plan, tradeoff) if message in BAD_NETWORKS else (plan,):
        with pytest.raises((TypeError, ValueError, NotImplementedError), match=message):
            call(**{"network": UNIFORM, "batch_size": 100} | options)


def test_features_loss_optimizer_and_streaming_are_taken_into_account():
    assert plan(SILENT, 100, features=7).chain.activation == [0, 2800, 2800]
    assert plan(Sequential(npnet.Tanh(), Dense(7, 2)), 100).chain.activation == [0, 2800, 800]
    assert plan(Sequential(Sequential(Dense(4, 6)), Dense(6, 2)), 5).chain.activation == [0, 120, 40]
    plain, weights = plan(UNIFORM, 100), 4 * 50 * 930
    assert plain.chain.parameters == plain.chain.fixed == weights
    moment = plan(UNIFORM, 100, every_nth=7).timeline[50 + 42]  # 50 forward, 42 drops, and backward 50
    assert moment[1:-1] == (weights, 0, 12_000, 6 * 12_000, 12_000)  # a_49 is no checkpoint: a_50 was kept
    for optimizer, arrays in ((npnet.SGD(1), 0), (npnet.SGD(1, 0.5), 1), (npnet.Adam(), 2)):
        assert plan(UNIFORM, 100, optimizer=optimizer).peak_bytes == plain.peak_bytes + arrays * weights
    wide, output = mlp([2, 500]), 100 * 500 * 4
    for loss, arrays in ((None, 1), (npnet.Quadratic(), 1), (npnet.SoftmaxCrossEntropy(), 2)):
        assert plan(wide, 100, loss=loss).chain.loss_bytes == arrays * output
    assert plan(npnet.Network([2, 500]), 100).chain.loss_bytes == 2 * 2 * output  # float64; and its multiple
    assert plan(wide, 100, streaming=False).timeline[-1].gradients == 1500 * 4


NTH = [{"every_nth": n} for n in (1, 7)]
OTHERS = [{"strategy": name} for name in ("revolve", "sqrt", "every_nth", "none")]


@pytest.mark.parametrize("options", [{}, {"strategy": "optimal"}, *NTH, *OTHERS], ids=str)
@pytest.mark.parametrize("streaming", [True, False])
def test_an_infeasible_budget_tells_the_smallest_that_is_feasible(options, streaming):
    with pytest.raises(InfeasibleBudget, match="kB is too little for a training step with batch size 100;") as caught:
        ask("2 kB", streaming=streaming, **options)
    error, text = caught.value, str(caught.value)
    least, action = error.smallest_bytes, error.moment.action
    assert {ValueError, MemoryError} < {*type(error).__mro__}
    assert ask(least, streaming=streaming, **options).peak_bytes == least == error.moment.peak_bytes
    with pytest.raises(InfeasibleBudget):
        ask(least - 1, streaming=streaming, **options)
    assert error.budget_bytes == 2000
    assert f" is {least} bytes (" in text
    assert f"What binds it is {action}, layer {MIXED.layers[action.layer - 1]}: 20.2 kB parameters + " in text
    restricted = "the smallest budget of this strategy (" in text, "What helps: strategy='optimal', " in text
    assert restricted == (options in OTHERS,) * 2 or options in NTH  # for which see below
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), text, vars(error))


def test_an_infeasible_budget_for_every_nth_says_that_another_strategy_would_do():
    with pytest.raises(InfeasibleBudget, match=r"smallest budget of this strategy \(every 7\).* strategy='optimal'"):
        ask("2 kB", every_nth=7)


def test_a_plan_describes_itself_and_says_where_checkpointing_cannot_help_and_what_does():
    found, nine = plan(UNIFORM, 100, memory_budget="400 kB"), plan(mlp([30] * 10), 100, every_nth=3).describe()
    peak, kept, more = f"{found.peak_bytes / 1000:.0f} kB", "kept on the way up: the outputs of", 100 * found.overhead
    lines = [
        f"schedule 'optimal': 50 layers, batch size 100, budget 400 kB\npeak: {peak} (0.48 of plain's 814 kB)\n",
        f": {found.extra_forwards} layer-forwards more than plain's 50, {more:.1f} % more flops a step\nproven: ",
        f"no memory-persistent schedule within the budget recomputes less\n{kept} layers ",
        f"\nthe peak is at {found.binding.action}, Dense(30, 30, ",
        "(workspace: 3.72 kB gradients of this layer's parameters, freed by their update)",
    ]
    assert [line for line in lines if line not in found.describe()] == []
    assert f"{kept} layers 3, 6-9\n  a_3 is a checkpoint, layers 4-5 run again from it\n  a_0, the input, is" in nine
    assert " layers 1-2 run again from it\nrun forward 1 time: layers 3, 6-9\nrun forward 2 times: layers 1-2" in nine
    assert "proven" not in nine
    assert "freed by their update" not in plan(UNIFORM, 100, streaming=False).describe()
    assert "\nkept: every activation, until its backward pass\n" in plan(UNIFORM, 100).describe()
    assert "\nnot proven optimal: strategies" in plan(UNIFORM, 100, memory_budget=1e6, strategy="sqrt").describe()
    assert "cannot help this network: no schedule takes less" in plan(mlp([784, *[30] * 5, 10]), 100).describe()
    assert "cannot help" not in plan(mlp([784, *[30] * 50, 10]), 100).describe() + plan(MANY, 100).describe()
    for batch, message in ((2, "helps: fewer parameters, half precision"), (20_000, "helps: a smaller batch")):
        with pytest.raises(InfeasibleBudget, match=message):
            plan(mlp([500] * 4), batch, memory_budget=1)


@pytest.mark.parametrize(("limit", "most"), [("MOST_CELLS", 2000), ("MOST_CELLS", 300), ("MOST_LAYERS", 5)])
def test_a_plan_fits_and_is_proven_or_claims_no_more_than_is_true(monkeypatch, limit, most):
    plain = plan(MIXED, 100)
    least = smallest_budget(plain.chain)[0] + plain.chain.fixed
    exact = [ask(int(budget)) for budget in np.linspace(least, plain.peak_bytes, 25)]
    assert all(best.proven and best.bound == best.recompute_flops for best in exact)
    monkeypatch.setattr(planner, limit, most)
    unproven = 0
    for best in exact[8 * (limit == "MOST_LAYERS") :]:  # strategies alone do not keep to the smallest budgets
        found = ask(best.memory_budget)
        assert found.peak_bytes <= best.memory_budget
        assert found.recompute_flops >= best.recompute_flops >= (found.bound or 0)
        assert found.proven == (found.recompute_flops == found.bound) == ("not proven" not in found.describe())
        unproven += not found.proven
    assert unproven >= 10
    assert found.proven  # plain fits


CURVES = pytest.mark.parametrize("network", [UNIFORM, MIXED, NESTED, mlp([3, 2])], ids=lambda n: str(len(n.layers)))


@CURVES
@pytest.mark.parametrize("streaming", [True, False])
def test_the_curve_falls_from_the_smallest_budget_to_the_plain_one(network, streaming):
    options = {"loss": npnet.SoftmaxCrossEntropy(), "optimizer": npnet.Adam(), "streaming": streaming}
    curve, plain = tradeoff(network, 40, **options).optimal, plan(network, 40, **options)
    peaks, flops = [each.peak_bytes for each in curve], [each.recompute_flops for each in curve]
    assert peaks == sorted(set(peaks))
    assert flops == sorted(set(flops), reverse=True)
    assert peaks[0] == smallest_budget(plain.chain)[0] + plain.chain.fixed
    assert (peaks[-1], flops[-1], curve[-1].schedule) == (plain.peak_bytes, 0, plain.schedule)
    for each in curve:
        best = plan(network, 40, memory_budget=each.peak_bytes, **options)
        assert (each.proven, each.bound) == (True, best.recompute_flops)


def below(curve, other):
    """Whether it recomputes less than any of the curve that takes no more."""
    return other.recompute_flops < min(each.recompute_flops for each in curve if each.peak_bytes <= other.peak_bytes)


@CURVES
def test_no_other_strategy_is_below_the_curve_and_rows_has_them_all(network):
    found, depth = tradeoff(network, 40), len(network.layers)
    counts = {"every nth": max(depth - 1, 1), "sqrt": 1, "revolve": max(depth - 1, 1)}
    assert {name: len(plans) for name, plans in found.others.items()} == counts
    assert not any(below(found.optimal, other) for plans in found.others.values() for other in plans)
    curves = {"optimal": found.optimal} | found.others
    assert found.rows() == [{"curve": name, **each.row()} for name, plans in curves.items() for each in plans]


def test_no_plan_is_below_the_curve_of_layers_of_any_size():
    for sizes, batch, streaming in (([2, 1, 6, 2, 4], 4, True), ([25, 14, 21, 28, 23], 23, True)):
        found = tradeoff(mlp(sizes), batch, streaming=streaming)
        peaks = np.linspace(found.optimal[0].peak_bytes, found.optimal[-1].peak_bytes, 99)
        plans = [plan(mlp(sizes), batch, streaming=streaming, memory_budget=peak) for peak in peaks]
        assert not any(below(found.optimal, other) for other in [*plans, *found.others["every nth"]])


def test_a_curve_from_rounded_sizes_claims_no_more_than_is_true_and_one_of_too_many_layers_is_refused(monkeypatch):
    monkeypatch.setattr(planner, "MOST_CELLS", 2000)
    curve = tradeoff(MIXED, 100).optimal
    monkeypatch.undo()
    for each in curve:
        assert each.recompute_flops >= ask(each.peak_bytes).recompute_flops >= (each.bound or 0)
    assert [each.proven for each in curve] == [False] * (len(curve) - 1) + [True]
    with pytest.raises(ValueError, match=f"^tradeoff: {MOST_LAYERS + 1} layers are more than the {MOST_LAYERS} that"):
        tradeoff(MANY, 500)


def test_plans_and_curves_are_printed_in_a_line():
    network = npnet.Network([784, *[30] * 50, 10], rng=0)
    planned, curve = plan(network, 100, every_nth=7), tradeoff(network, 100)
    assert str(planned) == "Plan('every 7', 51 layers, batch size 100, peak 923 kB, 33.9 % more flops)"
    assert str(curve) == f"Tradeoff({len(curve.optimal)} optimal, 50 every nth, 1 sqrt, 50 revolve)"
