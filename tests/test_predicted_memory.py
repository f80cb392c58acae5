"""What a plan predicts is what is traced: its peak, action by action, and that a budget is kept."""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

import npnet
from npnet import planner, schedules
from npnet.checkpoint import backpropagate, clear_gradients
from npnet.layer import needs_saved
from npnet.layers import Dense, Sequential, mlp
from npnet.optimal import smallest_budget
from npnet.schedule import BACKWARD
from npnet.step import accumulated_step

KIB = 1024
ACTIVATIONS = ["relu", "sigmoid", "tanh", "identity"]
ALONE = [npnet.ReLU, npnet.Sigmoid, npnet.Tanh, npnet.Identity]
LOSSES = [npnet.Quadratic, npnet.SoftmaxCrossEntropy, npnet.MeanSquaredError]
OPTIMIZERS = [  # of which none diverges
    lambda: npnet.SGD(0.0),
    lambda: npnet.SGD(0.0, momentum=0.9),
    lambda: npnet.Adam(0.0),
    lambda: npnet.SGD(0.0, weight_decay=0.1),
    lambda: npnet.Adam(0.0, weight_decay=0.1),
]
DEEP, WIDE, MIXED = range(3)
EXTREMES = {  # sizes, batch
    "one layer": ([512, 512], 2048),
    "one neuron": ([1, 1], 1),
    "a row": ([1] * 61, 2048),
    "sixty layers, wide and thin": ([512, 64] * 30 + [512], 30),
    "sixty layers, large batch": ([24] * 61, 2048),
    "an hourglass": ([512, 256, 32, 1, 32, 256, 512], 1024),
}


pytestmark = pytest.mark.usefixtures("fast_collection")


class Case(NamedTuple):
    """A network, and all that it takes to train it for a step."""

    model: Sequential
    loss: npnet.Loss
    optimizer: npnet.Optimizer
    x: np.ndarray
    y: np.ndarray

    def plan(self, streaming=True, **options):
        """Not streaming: of the gradients alone, without an update."""
        optimizer = self.optimizer if streaming else None
        settings = {"loss": self.loss, "optimizer": optimizer, "streaming": streaming, "features": self.x.shape[1]}
        return npnet.plan(self.model, len(self.x), **settings, **options)

    def budgets(self, streaming=True):
        """The smallest that is feasible, and that of the plain schedule."""
        plain = self.plan(streaming)
        return smallest_budget(plain.chain)[0] + plain.chain.fixed, plain.peak_bytes

    def plans(self, rng, streaming):
        """One of every strategy."""
        depth = len(self.model.layers)
        chosen = rng.choice(np.arange(1, depth + 1), int(rng.integers(0, depth + 1)), replace=False)
        least, most = self.budgets(streaming)
        yield self.plan(streaming)
        yield self.plan(streaming, strategy="sqrt")
        yield self.plan(streaming, strategy="revolve")
        yield self.plan(streaming, every_nth=int(rng.integers(2, 9)))
        saving = needs_saved(self.model.layers)
        yield self.plan(streaming, strategy=schedules.selective(depth, chosen, saving))
        yield self.plan(streaming, memory_budget=int(rng.integers(least, most + 1)))

    def traced(self, schedule, streaming=True):
        """The most bytes that a step takes, above parameters and optimizer state."""
        if streaming:
            step = npnet.train_step, self.model, self.loss, self.optimizer, schedule, self.x, self.y
        else:
            step = backpropagate, self.model.layers, schedule, self.x, self.output_gradient
        peak = npnet.measure_peak(*step).increase_bytes
        clear_gradients(self.model.layers)
        return peak

    def output_gradient(self, output):
        return self.loss.value_and_gradient(output, self.y)[1]

    def timeline(self, schedule):
        return npnet.measure_timeline(self.model, self.loss, self.optimizer, schedule, self.x, self.y)


def case_of(model, batch, outputs, rng, loss=npnet.Quadratic, optimizer=OPTIMIZERS[0]):
    """A case that has taken a step, in which the optimizer made its state."""
    first = model.parameters()[0].value
    x = rng.standard_normal((batch, first.shape[1])).astype(first.dtype)
    case = Case(model, loss(), optimizer(), x, np.full((batch, outputs), 1 / outputs, first.dtype))
    case.traced(schedules.none(len(model.layers), needs_saved(model.layers)))
    return case


def random_sizes(rng, kind):
    """Sizes and a batch; what is large in one is small in the other, for the tests' time."""
    if kind == DEEP:
        return rng.integers(1, 49, int(rng.integers(21, 62))).tolist(), int(rng.integers(256, 1025))
    if kind == WIDE:
        return rng.integers(64, 513, int(rng.integers(2, 8))).tolist(), int(rng.integers(1, 700))
    return rng.choice([1, 3, 10, 32, 100, 257, 512], int(rng.integers(2, 40))).tolist(), int(rng.integers(1, 257))


def random_case(seed, outputs=None):
    rng = np.random.default_rng(seed)
    sizes, batch = random_sizes(rng, seed % 3)
    sizes[-1] = outputs or sizes[-1]
    return built(rng, sizes, batch, seed // 3 % 2), rng


def built(rng, sizes, batch, nested):
    """Dense layers; ``nested``: some of them in `Sequential`s, with activations that are layers of their own."""
    dtype, layers = rng.choice([np.float32, np.float64]), []
    for inputs, outputs in pairwise(sizes):
        layers.append(Dense(inputs, outputs, rng.choice(ACTIVATIONS), dtype=dtype, rng=rng))
        if nested and rng.random() < 0.3:
            layers.append(rng.choice(ALONE)())
    while nested and len(layers) > 1 and rng.random() < 0.8:
        start = int(rng.integers(0, len(layers)))
        inside = layers[start : start + int(rng.integers(1, 5))]
        layers[start : start + len(inside)] = [Sequential(*inside)]
    return case_of(Sequential(*layers), batch, sizes[-1], rng, rng.choice(LOSSES), rng.choice(OPTIMIZERS))


def tolerance(plan):
    """1 % of the peak, and twice what NumPy takes to broadcast a bias (8192 numbers at a time)."""
    return 0.01 * plan.peak_bytes + 128 * KIB


def apart(plan, traced, peak=None):
    """By how much prediction and tracing differ, in units of what is tolerated."""
    return abs((peak or plan.peak_bytes) - plan.chain.fixed - traced) / tolerance(plan)


def check_every_strategy(case, rng):
    for streaming in (True, False):
        for plan in case.plans(rng, streaming):
            traced = case.traced(plan.schedule, streaming)
            assert apart(plan, traced) < 1, (plan.row(), streaming, plan.peak_bytes - plan.chain.fixed, traced)


@pytest.fixture
def coarse(monkeypatch):
    """Optimal schedules from rounded sizes: what they predict is not rounded, and they are found soon."""
    monkeypatch.setattr(planner, "MOST_CELLS", 2_000_000)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.usefixtures("coarse")
def test_the_predicted_peak_is_the_traced_one_whatever_network_and_strategy(seed):
    check_every_strategy(*random_case(seed))


@pytest.mark.parametrize(("sizes", "batch"), EXTREMES.values(), ids=EXTREMES)
@pytest.mark.usefixtures("coarse")
def test_the_predicted_peak_is_the_traced_one_at_the_extremes(sizes, batch):
    rng = np.random.default_rng(0)
    check_every_strategy(built(rng, sizes, batch, nested=False), rng)


def nested_case():
    """The peak is in the backward pass of a nested chain with an activation at its end."""
    layers = Dense(4, 500, rng=0), Sequential(Dense(500, 500, "identity", rng=1), npnet.ReLU()), Dense(500, 2, rng=2)
    return case_of(Sequential(*layers), 2000, 2, np.random.default_rng(0))


def test_the_predicted_peak_is_the_traced_one_where_a_nested_chain_ends_in_an_activation():
    case = nested_case()
    assert apart(case.plan(), case.traced(case.plan().schedule)) < 1


def test_gradients_of_the_batches_before_are_counted():
    case = case_of(mlp([300, 200, 200, 10], rng=0), 500, 10, np.random.default_rng(0), optimizer=OPTIMIZERS[1])
    plan = case.plan(accumulation_steps=3)
    step = case.model, case.loss, case.optimizer, plan.schedule
    traced = npnet.measure_peak(lambda: accumulated_step(*step, [(case.x, case.y)] * 3, 1500)).increase_bytes
    there_before = plan.chain.parameters + plan.chain.optimizer
    assert abs(plan.peak_bytes - there_before - traced) < tolerance(plan)
    assert abs(case.plan().peak_bytes - there_before - traced) > tolerance(plan)


# Action by action.


def check_timeline(case, plan):
    for moment, traced in zip(plan.timeline, case.timeline(plan.schedule), strict=True):
        assert apart(plan, traced, moment.peak_bytes) < 1, (plan.row(), moment, traced)


@pytest.mark.parametrize("seed", range(18))
@pytest.mark.usefixtures("coarse")
def test_the_predicted_timeline_is_the_traced_one(seed):
    case, rng = random_case(1000 + seed, outputs=5)
    for plan in case.plans(rng, streaming=True):
        check_timeline(case, plan)


def test_the_predicted_timeline_is_the_traced_one_where_the_loss_takes_most():
    case = case_of(mlp([10, 10, 500], rng=0), 2000, 500, np.random.default_rng(0), npnet.SoftmaxCrossEntropy)
    check_timeline(case, case.plan())


# Budgets.


SWEPT = {
    "uniform": lambda: (mlp([64] * 31, "sigmoid", rng=0), 1000, 64),
    "uniform, not exactly solved": lambda: (mlp([61] * 41, "tanh", rng=0), 1000, 61),
    "an hourglass": lambda: (mlp([256, 128, 64, 32, 16, 16, 32, 64, 128, 256], "relu", rng=0), 1000, 256),
    "nested": lambda: (
        Sequential(*(Sequential(Dense(64, 64, "identity", rng=i), npnet.Tanh(), Dense(64, 64)) for i in range(9))),
        1000,
        64,
    ),
}


@pytest.mark.parametrize("name", SWEPT)
@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "at the end"])
def test_a_budget_is_kept_and_a_larger_one_never_costs_more(name, streaming):
    rng = np.random.default_rng(0)
    case = case_of(*SWEPT[name](), rng, npnet.SoftmaxCrossEntropy, OPTIMIZERS[1])
    flops, extra = [], []
    for budget in np.linspace(*case.budgets(streaming), 10):
        plan = case.plan(streaming, memory_budget=budget)
        assert plan.peak_bytes <= budget
        assert case.traced(plan.schedule, streaming) <= budget - plan.chain.fixed + tolerance(plan)
        flops.append(plan.recompute_flops)
        extra.append(plan.extra_forwards)
    assert flops == sorted(flops, reverse=True)
    assert flops[0] > flops[4] > flops[-1] == 0
    if "uniform" in name:
        assert extra == sorted(extra, reverse=True)


# The lab's network.


SIZES = [784, *[30] * 20, 10]
X = np.random.default_rng(0).random((300, 784))
Y = np.eye(10)[np.arange(300) % 10]


def lab(budget=None, batch=300, **options):
    """The network, after a step of no length."""
    network = npnet.NetworkWithCheckpointing(SIZES, memory_budget=budget, rng=0, **options)
    network.update_mini_batch((X[:batch], Y[:batch]), 0.0)
    return network


def lab_budgets(streaming):
    plain = npnet.plan(npnet.Network(SIZES, rng=0), 300, streaming=streaming)
    return np.linspace(smallest_budget(plain.chain)[0] + plain.chain.fixed, plain.peak_bytes, 10)


@pytest.mark.parametrize("budget", lab_budgets(streaming=True)[::3].astype(int))
def test_the_labs_training_step_keeps_to_its_budget(budget):
    network = lab(int(budget))
    traced = npnet.measure_peak(network.update_mini_batch, (X, Y), 3.0).increase_bytes
    assert network.plan.peak_bytes <= network.memory_budget == budget
    assert apart(network.plan, traced) < 1
    assert network.schedule == network.plan.schedule
    assert (network.schedule.extra_forwards == 0) == (budget == int(lab_budgets(streaming=True)[-1]))


@pytest.mark.parametrize("budget", lab_budgets(streaming=False)[::3].astype(int))
def test_the_labs_backprop_keeps_to_its_budget_and_gives_the_gradients_of_the_network_without(budget):
    network, plain = lab(int(budget)), npnet.Network(SIZES, rng=0)
    network.backprop(X.T, Y.T)  # plans, which takes memory, too
    report = npnet.measure_peak(network.backprop, X.T, Y.T)
    assert network.plan.peak_bytes <= budget
    assert not network.plan.chain.streaming
    assert apart(network.plan, report.increase_bytes) < 1
    for ours, theirs in zip(report.result, plain.backprop(X.T, Y.T), strict=True):
        assert all(map(np.array_equal, ours, theirs))


def test_a_plan_is_made_anew_for_another_batch_size_or_use_and_only_then():
    network = lab(1_500_000)
    first = network.plan
    network.update_mini_batch((X, Y), 3.0)
    assert network.plan is first
    network.update_mini_batch((X[:99], Y[:99]), 3.0)
    assert (network.plan.batch_size, network.plan.chain.streaming) == (99, True)
    assert network.plan.extra_forwards < first.extra_forwards
    network.backprop(X[:99].T, Y[:99].T)
    assert (network.plan.batch_size, network.plan.chain.streaming) == (99, False)
    network.checkpoint_every_nth_layer = 4
    network.update_mini_batch((X, Y), 3.0)
    assert (network.plan, network.memory_budget) == (None, None)
    assert network.schedule == schedules.every_nth(21, 4)


def test_the_lab_trains_the_same_network_with_a_budget_as_without():
    network, plain = lab(1_500_000), npnet.Network(SIZES, rng=0)
    for each in (network, plain):
        each.SGD((X, Y), 2, 100, 3.0, log=False)
    assert all(map(np.array_equal, network.weights + network.biases, plain.weights + plain.biases))


STEPS = {
    "update_mini_batch": lambda network: network.update_mini_batch((X, Y), 3.0),
    "SGD": lambda network: network.SGD((X, Y), 1, 300, 3.0, log=False),
    "backprop": lambda network: network.backprop(X.T, Y.T),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_an_infeasible_budget_computes_nothing(step, monkeypatch):
    network = lab(600_000, batch=20)  # enough for a small batch
    weights, forward = [*network.weights, *network.biases], Dense.forward
    before = [array.copy() for array in weights]
    monkeypatch.setattr(Dense, "forward", lambda *_: pytest.fail("a layer was run"))
    with pytest.raises(npnet.InfeasibleBudget, match="600 kB is too little for a training step with batch size 300"):
        step(network)
    assert all(map(np.array_equal, [*network.weights, *network.biases], before))
    monkeypatch.setattr(Dense, "forward", forward)
    network.update_mini_batch((X[:20], Y[:20]), 3.0)  # and it goes on as before
    assert network.plan.batch_size == 20


# The training loop.


def fitted(**options):
    model, optimizer = mlp([20, *[32] * 15, 10], "tanh", rng=0), npnet.Adam(1e-3)
    data = X[:, :20].astype(np.float32), Y.astype(np.float32)
    settings = {"loss": npnet.SoftmaxCrossEntropy(), "optimizer": optimizer, "epochs": 3, "batch_size": 128, "rng": 1}
    npnet.fit(model, data, log=False, **settings, **options)
    return [parameter.value for parameter in model.parameters()]


def test_fit_with_a_budget_trains_the_same_network_with_recomputation(monkeypatch):
    runs, forward = [], Dense.forward
    monkeypatch.setattr(Dense, "forward", lambda *args: runs.append(args[0]) or forward(*args))
    plain, count = fitted(schedule="none"), len(runs)
    budgeted = fitted(memory_budget="400 kB")
    assert all(map(np.array_equal, budgeted, plain))
    assert len(runs) > 2.2 * count


def test_the_budget_of_fit_counts_what_its_optimizer_keeps_and_all_gradients_where_they_are_clipped():
    fitted(memory_budget="270 kB")
    for options in ({"memory_budget": "200 kB"}, {"memory_budget": "270 kB", "clip_norm": 1.0}):
        with pytest.raises(npnet.InfeasibleBudget, match="kB optimizer"):
            fitted(**options)


# Control.


class Liar(Dense):
    """Says that an array is not there."""

    def cost(self, shape, dtype, needs_dx=True):
        cost = super().cost(shape, dtype, needs_dx)
        return cost._replace(**{self.about: getattr(cost, self.about) - cost.output_bytes})


@pytest.mark.parametrize(("about", "caught"), [("output_bytes", True), ("backward_bytes", True), (None, False)])
def test_control_a_layer_that_lies_about_an_array_is_caught(about, caught):
    layers = [Dense(4, 200, rng=0), (Liar if about else Dense)(200, 200, rng=1), Dense(200, 20, rng=2)]
    layers[1].about = about
    case = case_of(Sequential(*layers), 1000, 20, np.random.default_rng(0))
    plan = case.plan()
    assert about or plan.binding.action == (BACKWARD, 2)  # where the lie tells
    assert (apart(plan, case.traced(plan.schedule)) > 1) == caught


@pytest.mark.parametrize("counted", [True, False])
def test_an_input_that_a_layer_saved_stays_though_the_schedule_drops_it(monkeypatch, counted):
    """Layer 2 holds a_1 in what it saved: to drop it, and to run layer 1 again, saves nothing."""
    wide, dense = 400, npnet.Linear
    layers = [dense(10, wide, rng=0), npnet.LayerNorm(wide), dense(wide, 10, rng=0), dense(10, wide, rng=0)]
    model = Sequential(*layers, dense(wide, wide, rng=0), dense(wide, 10, rng=0))
    case = case_of(model, 2000, 10, np.random.default_rng(0))
    up, down = [("forward", 1), ("forward", 2), ("drop", 1)], [("forward", 1), ("backward", 2), ("backward", 1)]
    up += [("forward", number) for number in range(3, 7)]
    schedule = npnet.Schedule([*up, *(("backward", n) for n in range(6, 2, -1)), *down], 6, "custom", {2})
    if not counted:
        chain_of = planner.chain_of
        monkeypatch.setattr(
            planner, "chain_of", lambda *given, **options: replace(chain_of(*given, **options), saves_input=frozenset())
        )
    plan, traced = case.plan(strategy=schedule), case.traced(schedule)
    assert (abs(plan.peak_bytes - plan.chain.fixed - traced) < 0.01 * traced) == counted
