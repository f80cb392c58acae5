"""Checkpointing: whatever the schedule, the same gradients bit for bit, in the memory that the schedule says."""

import pickle
import weakref
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npnet.checkpoint import NondeterministicLayer, backpropagate
from npnet.layer import Layer
from npnet.layers import Dense, Sequential
from npnet.schedule import BACKWARD, DROP, FORWARD, Schedule
from npnet.schedules import every_nth, none, revolve
from tests.test_schedules import offloaded, valid_actions

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in dot:RuntimeWarning")  # see test_layers


class Swish(Layer):
    """y = x / (1 + e^-x). Its output does not suffice; it has forward and backward only, and saves an extra tensor."""

    def forward(self, x):
        gate = 1 / (1 + np.exp(-x))
        return x * gate, (x, gate)

    def backward(self, dy, saved):
        return dy * (saved[1] + saved[0] * saved[1] * (1 - saved[1]))


class Noise(Layer):
    """y = x + noise from a stream, `random`, that runs on: computed again, it is another y."""

    output_suffices = True

    def forward(self, x):
        y = x + self.random.standard_normal(x.shape)
        return y, (x, y)

    def backward(self, dy, saved):
        return dy.copy()


class Watched(Layer):
    """A layer that tells the watch when it runs, and what it made."""

    def __init__(self, layer, number, watch):
        self.layer, self.number, self.watch, self.output_suffices = layer, number, watch, layer.output_suffices

    def forward(self, x):
        self.watch.note(FORWARD, self.number)
        y, saved = self.layer.forward(x)
        self.watch.activations.append((self.number, weakref.ref(y)))
        if not self.output_suffices:
            self.watch.extras.append((self.number, weakref.ref(saved[1])))
        return y, saved

    def backward_(self, dy, saved, needs_dx=True):
        self.watch.note(BACKWARD, self.number)
        assert needs_dx == (self.number > 1)
        return self.layer.backward_(dy, saved, needs_dx)


class Watch:
    """What the layers of a chain did, and which activations and saved extra tensors were alive at each moment."""

    def __init__(self, layers):
        self.activations, self.extras, self.log = [], [], []
        self.layers = [Watched(layer, number, self) for number, layer in enumerate(layers, 1)]

    def note(self, *event):
        alive = (
            sorted(number for number, ref in refs if ref() is not None) for refs in (self.activations, self.extras)
        )
        self.log.append((*event, *alive))

    def run(self, schedule):
        def after(layer):
            self.note("after", layer.number)

        backpropagate(self.layers, schedule, batch_of(2), np.cos, after_backward=after)


def chain(depth, dtype=np.float64, swishes=(), seed=0):
    """Dense layers of mixed widths and activations, with swishes in between at the numbers given."""
    random, layers, width = np.random.default_rng([depth, seed]), [], 3
    names = ["identity", "relu", "sigmoid", "tanh"]
    for number in range(1, depth + 1):
        if number in swishes:
            layers.append(Swish())
        else:
            out = int(random.integers(2, 9))
            layers.append(Dense(width, out, names[(number + seed) % 4], dtype=dtype, rng=random))
            width = out
    return layers


def batch_of(size, dtype=np.float64):
    return np.random.default_rng(size).standard_normal((size, 3)).astype(dtype)


def taken(layers):
    """The gradients; the layers have none then."""
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    result = [parameter.gradient for parameter in parameters]
    for parameter in parameters:
        parameter.gradient = None
    return result


def cotangent(y):
    return np.cos(y) + y.dtype.type(0.5)


def gradients(layers, schedule, x, **options):
    backpropagate(layers, schedule, x, cotangent, **options)
    return taken(layers)


def plain(layers, x):
    """The gradients by the layers' own forward and public backward, with no engine at all."""
    model = Sequential(*layers)
    y, saved = model.forward(x)
    model.backward(cotangent(y), saved)
    return taken(layers)


def equal(ours, theirs):
    assert len(ours) == len(theirs) > 0
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("depth", range(1, 13))
def test_every_nth_gives_the_gradients_of_plain_backpropagation_bit_for_bit(depth, batch, dtype):
    layers, x = chain(depth, dtype), batch_of(batch, dtype)
    before, expected = x.copy(), plain(layers, x)
    assert all(gradient.any() and gradient.dtype == dtype for gradient in expected)
    for n in range(16):
        assert equal(gradients(layers, every_nth(depth, n), x), expected)
    assert np.array_equal(x, before)


def test_wide_layers_and_large_batches_too():
    layers, x = [Dense(3, 257, "tanh", rng=0), *(Dense(257, 257, rng=i) for i in range(8))], batch_of(301, np.float32)
    assert equal(gradients(layers, every_nth(9, 4), x), gradients(layers, none(9), x))


@given(valid_actions(), st.integers(1, 5), st.integers(0, 9), st.data())
@settings(deadline=None)
def test_any_valid_schedule_gives_the_gradients_of_plain_backpropagation_bit_for_bit(given_list, batch, seed, data):
    actions, depth = given_list
    swishes = data.draw(st.sets(st.integers(2, depth))) - offloaded(actions) if depth > 1 else set()
    layers, x = chain(depth, swishes=swishes, seed=seed), batch_of(batch)
    assert equal(gradients(layers, Schedule(actions, depth, needs_saved=swishes), x), plain(layers, x))


@given(valid_actions(offloads=False), st.data())
@settings(deadline=None)
def test_what_runs_and_what_is_alive_is_what_the_schedule_says(given_list, data):
    actions, depth = given_list
    needs_saved = data.draw(st.sets(st.integers(1, depth)))
    watch = Watch(chain(depth, swishes=needs_saved))
    watch.run(Schedule(actions, depth, needs_saved=needs_saved))
    expected, held, saved = [], set(), set()
    for i, (kind, layer) in enumerate(actions):
        if kind is not DROP:
            expected.append((kind, layer, held, saved))
        held = held | {layer} if kind is FORWARD else held - {layer}
        if kind is BACKWARD:
            saved = saved - {layer}
            expected.append(("after", layer, held, saved))
        elif kind is FORWARD and layer in needs_saved and (FORWARD, layer) not in actions[i + 1 :]:
            saved = saved | {layer}
    for (*event, alive, extras), (*should, held, saved) in zip(watch.log, expected, strict=True):
        assert (event, extras) == (should, sorted(saved))
        assert set(alive) == held | {layer - 1 for layer in saved} - {0}  # a swish saves its input
        assert needs_saved or len(alive) == len(held)  # and no second copy


@pytest.mark.parametrize(("n", "most"), [(0, 50), (1, 50), (2, 26), (7, 13), (25, 26), (49, 49), (50, 50)])
def test_every_nth_runs_each_layer_as_often_and_holds_as_much_as_it_should(n, most):
    watch, schedule = Watch(chain(50)), every_nth(50, n)
    watch.run(schedule)
    assert Counter(number for kind, number, *_ in watch.log if kind is FORWARD) == schedule.forwards
    assert max(len(alive) for *_, alive, _ in watch.log) == most  # checkpoints below, and one segment


def test_a_schedule_made_without_the_model_takes_from_it_which_layers_need_what_they_save():
    layers, x = chain(4, swishes=[2]), batch_of(2)
    by_hand = Schedule(every_nth(4, 2), 4)
    for schedule in (none(4), every_nth(4, 2), every_nth(4, 2, needs_saved=[3]), revolve(4, 2), by_hand):
        assert equal(gradients(layers, schedule, x), plain(layers, x))
        assert pickle.loads(pickle.dumps(schedule)) == schedule
    made = every_nth(4, 2).for_layers(frozenset({2}))
    assert made == every_nth(4, 2, needs_saved=[2]) != every_nth(4, 2)
    assert (made.needs_saved, made.name) == ({2}, "every 2")


def test_a_sequential_may_be_a_layer_of_the_chain():
    layers, x = chain(6), batch_of(3)
    nested = [layers[0], Sequential(*layers[1:4]), *layers[4:]]
    assert equal(gradients(nested, every_nth(4, 2, needs_saved=[2]), x), plain(layers, x))


def test_a_second_pass_adds_to_the_gradients_of_the_first():
    layers, x, schedule = chain(7), batch_of(4), every_nth(7, 3)
    parts = [plain(layers, x[:2]), plain(layers, x[2:])]
    backpropagate(layers, schedule, x[:2], cotangent)
    assert equal(gradients(layers, schedule, x[2:]), [a + b for a, b in zip(*parts, strict=True)])


def test_after_backward_is_called_once_a_layer_from_last_to_first_when_its_gradients_are_complete():
    layers, x, calls, complete = chain(7), batch_of(3), [], []

    def after_backward(layer):
        calls.append(layer)
        complete[:0] = [parameter.gradient.copy() for parameter in layer.parameters()]

    gradients(layers, every_nth(7, 3), x, after_backward=after_backward)
    assert calls == layers[::-1]
    assert equal(complete, plain(layers, x))


def test_restore_does_all_the_recomputing_and_nothing_else():
    layers, x, asked = chain(7), batch_of(3), []

    def restore(a, first, last):
        asked.append((first, last))
        return [a := layer.forward(a)[0] for layer in layers[first - 1 : last]]

    assert equal(gradients(layers, every_nth(7, 3), x, restore=restore), plain(layers, x))
    assert asked == [(4, 5), (1, 2)]


def test_the_determinism_check_sees_what_restore_gives():
    layers, x = chain(7), batch_of(3)

    def restore(a, first, last, error=0.0):
        return [a := layer.forward(a)[0] + error for layer in layers[first - 1 : last]]

    right = gradients(layers, every_nth(7, 3), x, restore=restore, determinism_check=True)
    assert equal(right, plain(layers, x))
    with pytest.raises(NondeterministicLayer, match="layer 3"):
        gradients(layers, every_nth(7, 3), x, restore=lambda *given: restore(*given, 1e-9), determinism_check=True)


def test_restore_is_refused_where_layers_need_what_they_saved():
    with pytest.raises(ValueError, match=r"restore: layers \[2\] need what they saved"):
        gradients(chain(4, swishes=[2]), every_nth(4, 2, [2]), batch_of(2), restore=lambda a, first, last: [])


def test_a_schedule_of_another_depth_is_refused():
    with pytest.raises(ValueError, match="a schedule for 4 layers cannot run a chain of 3"):
        gradients(chain(3), none(4), batch_of(2))


def test_overflow_inside_a_sigmoid_is_no_warning_and_outside_the_engine_stays_one():
    dense = Dense(3, 2, "sigmoid", initializer=lambda shape, _: np.full(shape, -1e4), dtype=np.float64)
    assert all(np.isfinite(gradient).all() for gradient in gradients([dense], none(1), np.ones((2, 3))))
    with pytest.warns(RuntimeWarning, match="overflow"):
        dense.forward(np.ones((2, 3)))


def test_control_noise_from_no_seed_makes_the_gradients_differ_so_the_comparison_can_fail():
    layers, x, results = [Noise(), *chain(5)], batch_of(4), []
    for schedule in (none(6), none(6), every_nth(6, 3)):
        Noise.random = np.random.default_rng(0)
        results.append(gradients(layers, schedule, x))
    assert [equal(result, results[0]) for result in results] == [True, True, False]
