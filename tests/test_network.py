"""The networks by themselves: arrays handed out and put in, checkpointing and its schedules, randomness, precision."""

import copy
import pickle

import numpy as np
import pytest

from npnet import Network, NetworkWithCheckpointing, network_with_checkpointing
from npnet.schedules import every_nth, none, sqrt

SIZES = [4, 5, 6, 5, 3]
X = np.random.default_rng(0).random((12, 4))
Y = np.eye(3)[np.arange(12) % 3]
KINDS = [{}, {"checkpoint_every_nth_layer": 2}, {"dtype": np.float32}, {"dtype": "f4", "checkpoint_every_nth_layer": 3}]


def make(sizes=SIZES, rng=1, **options):
    checkpointing = {"checkpoint_every_nth_layer", "schedule"} & set(options)
    return (NetworkWithCheckpointing if checkpointing else Network)(sizes, rng=rng, **options)


def arrays_of(network):
    return [*network.weights, *network.biases]


def copies(arrays):
    return [array.copy() for array in arrays]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))


UPDATES = {
    "SGD": lambda network: network.SGD((X, Y), 2, 4, 3.0, log=False),
    "update_mini_batch": lambda network: network.update_mini_batch((X, Y), 3.0),
}


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_arrays_handed_out_are_never_changed_by_later_updates(update, options):
    network = make(**options)
    moments = []
    for _ in range(3):
        moments.append((arrays_of(network), copies(arrays_of(network)), network.weights))
        update(network)
        assert not any(map(np.array_equal, arrays_of(network), moments[-1][0]))  # it did learn
    outside = network.weights  # put in from outside, then trained on
    other = make(rng=9, **options)
    other.weights, other.biases[0] = outside, network.biases[0]
    moments.append((arrays_of(network), copies(arrays_of(network)), network.weights))
    update(other)
    for handed_out, before, _ in moments:
        assert same(handed_out, before)
    now = network.feedforward(X)
    for _, _, kept in moments[:-1]:
        kept[1] = kept[1] * 2  # a list from before an update is its holder's alone
        kept[0][0, 0] = 7
    assert np.array_equal(network.feedforward(X), now)


@pytest.mark.parametrize("name", ["weights", "biases"])
@pytest.mark.parametrize("updates", [0, 2])
def test_finite_differences_through_the_arrays_handed_out_give_the_gradient(name, updates):
    network, h = make([3, 4, 2], checkpoint_every_nth_layer=2), 1e-5
    x, y = X[:, :3], Y[:, :2]
    for _ in range(updates):
        network.update_mini_batch((x, y), 3.0)
    nablas = dict(zip(("biases", "weights"), network.backprop(x.T, y.T), strict=True))[name]
    kept, costs = getattr(network, name), []
    before = copies(kept)
    for index, nabla in enumerate(nablas):
        for i, j in np.ndindex(nabla.shape):
            for step in (h, -2 * h, h):
                getattr(network, name)[index][i, j] += step
                costs.append(((network.feedforward(x) - y.T) ** 2).sum() / 2)
            np.testing.assert_allclose((costs[-3] - costs[-2]) / (2 * h), nabla[i, j], rtol=1e-6, atol=1e-9)
    assert getattr(network, name) is kept
    np.testing.assert_allclose(np.concatenate(kept, None), np.concatenate(before, None), rtol=1e-12)
    before = copies(kept)
    network.update_mini_batch((x, y), 3.0)  # and both promises hold at once
    assert same(kept, before)


@pytest.mark.parametrize("name", ["weights", "biases"])
@pytest.mark.parametrize("index", [1, -3, np.int64(1)])
def test_an_array_put_in_a_place_is_the_networks(name, index):
    network = make()
    getattr(network, name)[0]  # lent before
    new = np.asfortranarray(np.random.default_rng(5).random(getattr(network, name)[1].shape))
    getattr(network, name)[index] = new
    assert getattr(network, name)[1] is new
    expected = make()
    setattr(expected, name, [new if i == 1 else a for i, a in enumerate(getattr(expected, name))])
    assert np.array_equal(network.feedforward(X), expected.feedforward(X))
    new += 1  # itself, not a copy
    assert np.array_equal(network.feedforward(X), expected.feedforward(X))
    assert not np.array_equal(network.feedforward(X), make().feedforward(X))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_networks_share_arrays_that_were_assigned_until_one_is_updated(options):
    network, other = make(**options), make(rng=2, **options)
    other.weights, other.biases = network.weights, network.biases
    other.weights[0][0, 0] += 1
    assert np.array_equal(network.feedforward(X), other.feedforward(X))
    before = network.feedforward(X)
    other.update_mini_batch((X, Y), 3.0)
    assert np.array_equal(network.feedforward(X), before)


@pytest.mark.parametrize("options", [{}, {"checkpoint_every_nth_layer": 2}], ids=str)
def test_reading_the_weights_within_a_step_leaves_them_true_afterwards(options):
    network, expected = make(**options), make(**options)
    network.cost_derivative = lambda a, y: (a - y, network.weights, network.biases)[0]
    for _ in range(2):
        network.update_mini_batch((X, Y), 3.0)
        expected.update_mini_batch((X, Y), 3.0)
        assert same(arrays_of(network), arrays_of(expected))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_a_copy_of_a_network_is_another_network(duplicate):
    network = make(checkpoint_every_nth_layer=2)
    arrays_of(network)
    other, before = duplicate(network), network.feedforward(X)
    assert np.array_equal(other.feedforward(X), before)
    other.update_mini_batch((X, Y), 3.0)
    other.biases[0][0] += 1
    assert np.array_equal(network.feedforward(X), before)
    assert not np.array_equal(other.feedforward(X), before)


def gradients(network, x=X, y=Y):
    nabla_b, nabla_w = network.backprop(x.T, y.T)
    return [*nabla_b, *nabla_w]


@pytest.mark.parametrize("depth", range(1, 13))
def test_checkpointing_never_changes_a_gradient(depth):
    sizes = [4, *np.random.default_rng(depth).integers(1, 7, depth - 1).tolist(), 3]
    plain = make(sizes)
    columns_first = np.asfortranarray(X)
    for nth in range(16):
        network = make(sizes, checkpoint_every_nth_layer=nth)
        for rows in (slice(1), slice(None)):
            assert same(gradients(network, X[rows], Y[rows]), gradients(plain, X[rows], Y[rows])), nth
        assert same(gradients(network, columns_first), gradients(plain, columns_first)), nth


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("nth", range(6))
def test_checkpointing_never_changes_what_is_learned(nth, dtype):
    plain, network = make(dtype=dtype), make(dtype=dtype, checkpoint_every_nth_layer=nth)
    for _ in range(3):
        for update in UPDATES.values():
            update(plain)
            update(network)
            assert same(arrays_of(network), arrays_of(plain))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("none", none(4)),
        ("sqrt", sqrt(4)),
        (every_nth(4, 3), every_nth(4, 3)),
        (list(every_nth(4, 3)), every_nth(4, 3)),
        (lambda depth: every_nth(depth, 3), every_nth(4, 3)),
    ],
)
def test_schedule_is_a_name_or_a_schedule_or_actions_or_a_function_of_the_depth(schedule, expected):
    network = make(schedule=schedule)
    assert network.schedule == expected
    assert same(gradients(network), gradients(make()))


class Watched(NetworkWithCheckpointing):
    """Notes each call of forward_between_checkpoints and can change what it gives."""

    def __init__(self, sizes, nth, answer=lambda activations: activations):
        super().__init__(sizes, nth, rng=0)
        self.calls, self.answer = [], answer

    def forward_between_checkpoints(self, a, checkpoint_idx_start, layer_idx_end):
        self.calls.append((a, checkpoint_idx_start, layer_idx_end))
        return self.answer(super().forward_between_checkpoints(a, checkpoint_idx_start, layer_idx_end))


@pytest.mark.parametrize("depth", [1, 2, 4, 5, 9])
def test_each_restored_segment_goes_once_through_forward_between_checkpoints(depth):
    network = Watched([4, *[5] * (depth - 1), 3], 0)
    activations = NetworkWithCheckpointing.forward_between_checkpoints(network, X.T, 0, depth)
    for nth in (0, 1, 2, 4, 3, 9, 0):
        network.checkpoint_every_nth_layer = nth  # takes effect from the next step on
        assert network.schedule == every_nth(depth, nth)
        starts = range(0, depth, nth)[:-1] if nth > 1 else ()  # the last segment is still there
        network.calls.clear()
        network.backprop(X.T, Y.T)
        assert [call[1:] for call in network.calls] == [(start, start + nth - 1) for start in reversed(starts)]
        assert same([call[0] for call in network.calls], [activations[start] for start in reversed(starts)])
    network.checkpoint_every_nth_layer = 2
    UPDATES["SGD"](network)
    assert len(network.calls) == 2 * 3 * ((depth - 1) // 2)


def test_what_forward_between_checkpoints_returns_is_what_backprop_uses():
    sizes = [4] * 7 + [3]
    right_b, right_w = Watched(sizes, 3).backprop(X.T, Y.T)
    nabla_b, nabla_w = Watched(sizes, 3, lambda activations: [0 * a for a in activations]).backprop(X.T, Y.T)
    assert same(nabla_b[5:] + nabla_w[6:], right_b[5:] + right_w[6:])  # above the restored a_5 = 0
    assert not any(map(np.any, nabla_b[:5] + nabla_w[:6]))  # where a = 0, the sigmoid has no slope


@pytest.mark.parametrize("place", [NetworkWithCheckpointing, "the network"])
def test_a_forward_between_checkpoints_put_in_the_place_of_npnets_takes_effect(place, monkeypatch):
    network = NetworkWithCheckpointing([4] * 7 + [3], 3, rng=0)
    own, calls = network.forward_between_checkpoints, []

    def zeros(*arguments):
        calls.append(arguments[-2:])
        return [0 * a for a in own(*arguments[-3:])]

    monkeypatch.setattr(network if place == "the network" else place, "forward_between_checkpoints", zeros)
    nabla_b, nabla_w = network.backprop(X.T, Y.T)
    assert calls == [(3, 5), (0, 2)]
    assert not any(map(np.any, nabla_b[:5] + nabla_w[:6]))  # where a = 0, the sigmoid has no slope
    monkeypatch.undo()
    nabla_b, nabla_w = network.backprop(X.T, Y.T)
    assert all(map(np.any, nabla_b + nabla_w))
    assert len(calls) == 2


@pytest.mark.parametrize("rng", [3, np.int64(3), lambda: np.random.default_rng(3)])
def test_rng_alone_decides_the_network(rng):
    networks = []
    for seed in (0, 1):
        np.random.seed(seed)
        networks.append(make(rng=rng() if callable(rng) else rng, checkpoint_every_nth_layer=seed))
        position = np.random.rand()
        np.random.seed(seed)
        assert np.random.rand() == position  # the global stream is left alone
    assert same(*map(arrays_of, networks))
    assert same(arrays_of(networks[0]), arrays_of(make(rng=3)))
    generator = np.random.default_rng(3)  # which moves on from network to network
    assert not any(map(np.array_equal, arrays_of(make(rng=generator)), arrays_of(make(rng=generator))))


@pytest.mark.parametrize("options", KINDS[2:], ids=str)
@pytest.mark.parametrize("cost_derivative", [None, lambda a, y: a - y.astype(float), lambda a, y: (a > y) * 2 - 1])
def test_float32_stays_float32_everywhere(options, cost_derivative):
    network = make(**options)
    if cost_derivative:
        network.cost_derivative = cost_derivative
    for update in UPDATES.values():
        assert {array.dtype for array in [*arrays_of(network), *gradients(network), network.feedforward(X)]} == {
            np.dtype("f4")
        }
        update(network)
    network.weights = [weight.astype(float) for weight in network.weights]
    assert {array.dtype for array in [*arrays_of(network), network.feedforward(X)]} == {np.dtype("f4")}


def test_float32_gradients_are_float64_gradients_rounded():
    for narrow, wide in zip(gradients(make(dtype=np.float32)), gradients(make()), strict=True):
        np.testing.assert_allclose(narrow, wide, rtol=1e-4, atol=1e-6)


def test_a_batch_size_is_planned_for_once(monkeypatch):
    planned = []
    right = network_with_checkpointing.plan
    monkeypatch.setattr(
        network_with_checkpointing, "plan", lambda net, size, **o: planned.append(size) or right(net, size, **o)
    )
    network = NetworkWithCheckpointing([3, 8, 8, 8, 2], memory_budget="20 kB")
    batch = lambda size: (np.ones((size, 3)), np.ones((size, 2)))  # noqa: E731 - twice
    schedules = {}
    for size in (30, 7, 30, 7, 30):
        network.update_mini_batch(batch(size), 0.1)
        assert network.plan.batch_size == size
        assert network.schedule is network.plan.schedule is schedules.setdefault(size, network.schedule)
    assert planned == [30, 7]
    network.memory_budget = "30 kB"
    network.update_mini_batch(batch(30), 0.1)
    assert (planned, network.plan.memory_budget) == ([30, 7, 30], 30_000)
    for size in range(1, 40):  # it does not remember more and more
        network.update_mini_batch(batch(size), 0.1)
    assert len(network._npnet.plans) <= network_with_checkpointing.MOST_PLANS
