"""Several batches as one large one: the same gradient, in the memory of the small one, by hand and in training."""

import numpy as np
import pytest

import npnet
from npnet import mlp, schedules
from npnet.layer import needs_saved
from npnet.losses import LOSSES
from npnet.step import accumulated_step, add_gradients, value_and_grad
from tests.test_step import batch_of, close, cut, gradients, model, none, same, weights

KIB = 1024
CUTS = {"equal": [0, 8, 16, 24], "unequal": [0, 1, 12, 24], "one": [0, 24], "single rows": range(25)}
SCHEDULES = {
    "plain": lambda depth, saving: schedules.none(depth, saving),
    "every 2": lambda depth, saving: schedules.every_nth(depth, 2, saving),
    "revolve": lambda depth, saving: schedules.revolve(depth, 3, saving),
    "selective": lambda depth, saving: schedules.selective(depth, [2], saving),
}


pytestmark = pytest.mark.usefixtures("fast_collection")


class Kept(npnet.Optimizer):
    """Keeps the gradients instead of taking a step."""

    def __init__(self):
        super().__init__(0.1)
        self.seen, self.updates = {}, 0

    def _update(self, parameter, gradient):
        self.seen[parameter] = gradient.copy()
        self.updates += 1


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_several_batches_is_that_of_the_large_one(name, schedule):
    each, loss, (x, y) = model(), LOSSES[name](), batch_of(24, name)
    chosen = schedule(5, needs_saved(each.layers))
    value, expected = value_and_grad(each, loss, x, y)
    assert list(expected) == list(each.named_parameters())
    assert gradients(each) == [None] * len(expected)
    assert same(value_and_grad(each, loss, x, y, schedule=chosen)[1].values(), expected.values())
    for cuts in CUTS.values():
        parts = cut(x, y, cuts)
        total = sum(add_gradients(each, loss, *part, weight=len(part[0]) / 24, schedule=chosen) for part in parts)
        assert total == pytest.approx(value, rel=1e-12)
        close(gradients(each), expected.values())
        optimizer = Kept()  # which starts from no gradients, and leaves none
        for clip_norm in (None, 1e9):
            assert accumulated_step(each, loss, optimizer, chosen, iter(parts), 24, clip_norm=clip_norm) == total
            close([optimizer.seen[p] for p in each.parameters()], expected.values())
            assert gradients(each) == [None] * len(expected)
        assert optimizer.updates == 2 * len(expected)


@pytest.mark.parametrize(("samples", "rows"), [(23, 24), (25, 24), (12, 16), (0, 8)])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_wrong_number_of_samples_is_refused_and_leaves_no_gradients(samples, rows, clip_norm):
    each = model()
    before = [array.copy() for array in weights(each)]
    parts = cut(*batch_of(24), CUTS["equal"])
    with pytest.raises(ValueError, match=rf"samples: the micro-batches have {rows} rows or more, expected {samples}"):
        accumulated_step(each, npnet.Quadratic(), npnet.SGD(0.1), none(each), parts, samples, clip_norm=clip_norm)
    assert gradients(each) == [None] * len(before)
    assert same(weights(each), before)


def test_a_batch_that_goes_beyond_the_samples_is_refused_before_anything_is_updated():
    each = model()
    before = [array.copy() for array in weights(each)]
    with pytest.raises(ValueError, match="samples: "):
        accumulated_step(each, npnet.Quadratic(), npnet.SGD(0.1), none(each), cut(*batch_of(24), CUTS["equal"]), 20)
    assert same(weights(each), before)


# Memory.


def wide(streaming=True, batch=1000):
    each, optimizer, rng = mlp([64, *[256] * 9, 10], "tanh", rng=0), npnet.SGD(0.0, 0.9), np.random.default_rng(0)
    x, y = rng.standard_normal((4 * batch, 64)).astype(np.float32), np.full((4 * batch, 10), 0.1, np.float32)
    clip_norm = None if streaming else 1.0

    def step(count, schedule):
        rows = range(0, 4 * batch + 1, 4 * batch // count)
        loss = npnet.SoftmaxCrossEntropy()
        return accumulated_step(each, loss, optimizer, schedule, cut(x, y, rows), len(x), clip_norm=clip_norm)

    step(4, none(each))  # the optimizer's state is there then
    return each, optimizer, step


@pytest.mark.parametrize(("streaming", "batch"), [(True, 1000), (False, 1000), (True, 40), (False, 40)])
def test_the_peak_of_several_batches_is_that_of_one_and_as_planned(streaming, batch):
    each, optimizer, step = wide(streaming, batch)
    settings = {"loss": npnet.SoftmaxCrossEntropy(), "optimizer": optimizer, "streaming": streaming}
    for options in ({}, {"every_nth": 3}):
        plan = npnet.plan(each, batch, accumulation_steps=4, **settings, **options)
        traced = npnet.measure_peak(step, 4, plan.schedule).increase_bytes
        alone = npnet.measure_peak(step, 1, plan.schedule).increase_bytes
        assert batch < 1000 or traced < 0.45 * alone
        fixed = plan.chain.parameters + plan.chain.optimizer
        assert plan.peak_bytes - fixed == pytest.approx(traced, abs=0.01 * plan.peak_bytes + 128 * KIB)


# The training loop.


def fitted(batch_size, **options):
    each, optimizer = model(), npnet.SGD(0.1, 0.9)
    x, y = batch_of(100)
    settings = {"loss": npnet.Quadratic(), "optimizer": optimizer, "epochs": 3, "rng": 5, "log": False}
    history = npnet.fit(each, (x, y), batch_size=batch_size, **settings, **options)
    return weights(each), history


@pytest.mark.parametrize(("batch_size", "count"), [(10, 2), (10, 3), (5, 20), (30, 4), (7, 5), (100, 1)])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.3}, {"schedule": "sqrt"}, {"decay": True}], ids=str)
def test_fit_with_several_batches_an_update_is_fit_with_large_batches(batch_size, count, options):
    ours, history = fitted(batch_size, accumulation_steps=count, **options)
    theirs, expected = fitted(min(batch_size * count, 100), **options)
    close(ours, theirs, 1e-10)
    for epoch, other in zip(history.epochs, expected.epochs, strict=True):
        assert (epoch.steps, epoch.loss) == (other.steps, pytest.approx(other.loss, rel=1e-10))


def test_768_rows_by_128_and_4_are_a_full_window_and_half_a_one():
    each, other, optimizer, (x, y) = model(), model(), Kept(), batch_of(768)
    settings = {"loss": npnet.Quadratic(), "epochs": 1, "batch_size": 128, "accumulation_steps": 4, "shuffle": False}
    history = npnet.fit(each, (x, y), optimizer=optimizer, log=False, **settings)
    assert (history.epochs[0].steps, optimizer.updates) == (2, 2 * len(weights(each)))
    last = value_and_grad(other, npnet.Quadratic(), x[512:], y[512:])
    close([optimizer.seen[p] for p in each.parameters()], last[1].values())
    first = value_and_grad(other, npnet.Quadratic(), x[:512], y[:512])
    assert history.epochs[0].loss == pytest.approx((512 * first[0] + 256 * last[0]) / 768, rel=1e-12)


@pytest.mark.parametrize("count", [1, 3])
def test_fit_with_a_clip_norm_takes_steps_of_that_length(count):
    each, (x, y) = model(), batch_of(60)
    before = [array.copy() for array in weights(each)]
    settings = {"loss": npnet.Quadratic(), "epochs": 1, "batch_size": 60 // count, "accumulation_steps": count}
    npnet.fit(each, (x, y), optimizer=npnet.SGD(0.5), clip_norm=0.01, log=False, **settings)
    moved = sum(((a - b) ** 2).sum() for a, b in zip(weights(each), before, strict=True)) ** 0.5
    assert moved == pytest.approx(0.5 * 0.01, rel=1e-12)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "2"])
def test_accumulation_steps_are_whole_numbers_from_1(steps):
    with pytest.raises((TypeError, ValueError), match="accumulation_steps: expected a whole number, at least 1, got"):
        fitted(10, accumulation_steps=steps)
