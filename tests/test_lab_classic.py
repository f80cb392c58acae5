"""The lab's API beside the classic exercise's own code: the same names, the same numbers, the same printed lines."""

import inspect
import tracemalloc

import numpy as np
import pytest

import npnet
from npnet import Network, NetworkWithCheckpointing

ARCHITECTURES = ([784, 10], [784, 30, 10], [784, 20, 30, 20, 10], [784, 30, 30, 30, 30, 10])
SMALL = ([4, 3], [4, 5, 3], [4, 6, 5, 6, 3], [5] * 10)
NTHS = (None, 0, 1, 2, 3, 4, 5, 9)  # None: the plain network
METHODS = ("SGD", "evaluate", "feedforward", "update_mini_batch", "backprop", "cost_derivative")


def build(source, sizes, nth=None, seed=0):
    """The network that ``source``, a class or a module with both classes, makes after np.random.seed(seed)."""
    if not isinstance(source, type):
        source = source.Network if nth is None else source.NetworkWithCheckpointing
    np.random.seed(seed)
    return source(sizes) if nth is None else source(sizes, checkpoint_every_nth_layer=nth)


def columns(sizes, batch, seed=0):
    """x and y as `Network.backprop` takes them: (features, batch)."""
    rng = np.random.default_rng(seed)
    return rng.random((sizes[0], batch)), np.eye(sizes[-1])[:, rng.integers(0, sizes[-1], batch)]


def assert_close(ours, theirs):
    """Nested lists of arrays of the same shapes, equal within rounding."""
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        if isinstance(our, list):
            assert_close(our, their)
        else:
            np.testing.assert_allclose(our, their, rtol=1e-9, atol=1e-12, strict=True)


def assert_trained_alike(ours, theirs, batch=4):
    """The same gradients, updates and outputs; and the arrays that ours hands out are never changed."""
    x, y = (array.T for array in columns(ours.sizes, 11))
    handed_out = [*ours.weights, *ours.biases]
    before = [array.copy() for array in handed_out]
    for _ in range(2):
        assert_close(ours.backprop(x.T, y.T), theirs.backprop(x.T, y.T))
        for network in (ours, theirs):
            network.update_mini_batch((x, y), 2.0)
        assert_close([ours.weights, ours.biases], [theirs.weights, theirs.biases])
        for network in (ours, theirs):
            network.SGD((x, y), 2, batch, 3.0, log=False)  # in order; the last rows make no whole batch
        assert_close([ours.weights, ours.biases], [theirs.weights, theirs.biases])
        assert_close([ours.feedforward(x)], [theirs.feedforward(x)])
    assert all(map(np.array_equal, handed_out, before))


def notebook_cells(module, train, test, architecture, epochs):
    """The exercise's comparison: one initial set of weights, handed from network to network."""
    network = module.Network(architecture)
    weights = network.weights
    biases = network.biases
    network.SGD(train, epochs=epochs, mini_batch_size=100, eta=3.0, test_data=test)
    for nth in (1, 2, 4):
        network = module.NetworkWithCheckpointing(architecture, checkpoint_every_nth_layer=nth)
        network.weights = weights
        network.biases = biases
        network.SGD(train, epochs=epochs, mini_batch_size=100, eta=3.0, test_data=test)


@pytest.fixture(scope="module")
def few(mnist):
    return tuple((x[:rows], y[:rows]) for (x, y), rows in zip(mnist, (1000, 1500), strict=True))


WHOLE = pytest.param("mnist", ARCHITECTURES[-1], 2, marks=pytest.mark.slow)


@pytest.mark.parametrize(("data", "architecture", "epochs"), [("few", sizes, 3) for sizes in ARCHITECTURES] + [WHOLE])
def test_notebook_cells_run_unchanged_and_print_the_same(classic, data, architecture, epochs, request, capsys):
    printed = []
    for module in (classic, npnet):
        np.random.seed(1)
        notebook_cells(module, *request.getfixturevalue(data), architecture, epochs)
        printed.append(capsys.readouterr().out)
    assert printed[1] == printed[0]
    lines = printed[1].splitlines()
    assert lines == lines[:epochs] * 4  # four networks, the same accuracies
    assert all("Accuracy: 0." in line for line in lines)


@pytest.mark.parametrize("seed", [0, 2, 42])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_every_line_of_every_epoch_is_the_classic_one(classic, few, capsys, architecture, seed):
    train, test = few
    build(classic, architecture, seed=seed).SGD(train, 3, 100, 3.0, test)
    expected = capsys.readouterr().out
    assert len(set(expected.splitlines())) == 3
    for nth in NTHS:
        build(npnet, architecture, nth, seed).SGD(train, 3, 100, 3.0, test)
        assert capsys.readouterr().out == expected, f"every {nth}"


@pytest.mark.parametrize("nth", [None, 2])
def test_lines_without_test_data_and_without_log(capsys, nth):
    x, y = (array.T for array in columns([4, 3], 10))
    network = build(npnet, [4, 5, 3], nth)
    network.SGD((x, y), epochs=2, mini_batch_size=4, eta=3.0)
    assert capsys.readouterr().out == "Epoch: 0\nEpoch: 1\n"
    network.SGD((x, y), epochs=2, mini_batch_size=4, eta=3.0, test_data=(x, y), log=False)
    assert capsys.readouterr().out == ""
    network.SGD((x, y), 1, 4, 3.0, (x, y))
    assert capsys.readouterr().out == f"Epoch: 0, Accuracy: {network.evaluate((x, y))}\n"


def test_memory_cell_shows_the_saving():
    data, peaks = [np.ascontiguousarray(array.T) for array in columns([784, 10], 200)], []
    for nth in (0, 2, 7):
        tracemalloc.start()
        build(npnet, [784] + [30] * 50 + [10], nth).SGD(data, epochs=2, mini_batch_size=100, eta=3.0, log=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] > 1.2 * peaks[1] > 1.2 * peaks[2]


@pytest.mark.parametrize("nth", [None, 3])
@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("sizes", [*ARCHITECTURES, [1, 1], (3, 2, 5), [784] + [30] * 50 + [10]], ids=str)
def test_seed_gives_the_classic_network(classic, sizes, seed, nth):
    theirs, position = build(classic, sizes, nth, seed), np.random.rand()
    ours = build(npnet, sizes, nth, seed)
    assert np.random.rand() == position  # so the next network is the same one, too
    assert (ours.num_layers, list(ours.sizes)) == (theirs.num_layers, list(theirs.sizes))
    for our, their in ((ours.biases, theirs.biases), (ours.weights, theirs.weights)):
        assert isinstance(our, list)
        assert [array.dtype for array in our] == [np.float64] * len(their)
        assert all(map(np.array_equal, our, their))


@pytest.mark.parametrize("nth", NTHS)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_methods_give_the_classic_numbers(classic, sizes, batch, nth):
    ours, theirs = build(npnet, sizes, nth), build(classic, sizes, nth)
    x, y = columns(sizes, batch)
    assert ours.evaluate((x.T, y.T)) == theirs.evaluate((x.T, y.T))
    assert np.array_equal(ours.cost_derivative(x, x + 1), theirs.cost_derivative(x, x + 1))
    nabla_b, nabla_w = ours.backprop(x, y)
    assert isinstance(nabla_b, list)
    assert isinstance(nabla_w, list)
    assert_close([nabla_b, nabla_w], theirs.backprop(x, y))
    assert_trained_alike(ours, theirs, batch)


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_the_classic_parameters_and_defaults(classic, name):
    ours, theirs = (
        inspect.getfullargspec(inspect.unwrap(getattr(module.Network, name))) for module in (npnet, classic)
    )
    assert ours[:4] == theirs[:4]


@pytest.mark.parametrize("start", range(5))
def test_forward_between_checkpoints_gives_the_classic_activations(classic, start):
    ours, theirs = (build(module, [4, 6, 5, 6, 3], 2) for module in (npnet, classic))
    a = np.random.default_rng(start).random((ours.sizes[start], 7))
    for end in range(start, 5):
        activations = ours.forward_between_checkpoints(a, start, end)
        assert activations[0] is a
        assert_close(activations, theirs.forward_between_checkpoints(a, start, end))


class Student(Network):
    """A solution of the exercise on the public names alone: checkpoints, restored segments, gradients."""

    every = 2

    def forward_between_checkpoints(self, a, checkpoint_idx_start, layer_idx_end):
        activations = [a]
        for index in range(checkpoint_idx_start, layer_idx_end):
            activations.append(1 / (1 + np.exp(-self.weights[index] @ activations[-1] - self.biases[index])))
        return activations

    def backprop(self, x, y):
        depth = self.num_layers - 1
        segments = [(start, min(start + self.every, depth)) for start in range(0, depth, self.every)]
        kept = [x]
        for segment in segments:
            kept.append(self.forward_between_checkpoints(kept[-1], *segment)[-1])
        delta = self.cost_derivative(kept.pop(), y)
        nabla_b, nabla_w = [None] * depth, [None] * depth
        for segment in reversed(segments):
            activations = self.forward_between_checkpoints(kept.pop(), *segment)
            for index in reversed(range(*segment)):
                output = activations.pop()
                delta = delta * output * (1 - output)
                nabla_b[index], nabla_w[index] = delta.sum(axis=1, keepdims=True), delta @ activations[-1].T
                delta = self.weights[index].T @ delta
        return nabla_b, nabla_w


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_students_own_backprop_is_trained_by_what_it_inherits(classic, sizes, every):
    student = build(Student, sizes)
    student.every = every
    assert_trained_alike(student, build(classic, sizes))


@pytest.mark.parametrize("sizes", SMALL, ids=str)
@pytest.mark.parametrize("name", [*METHODS, "forward_between_checkpoints"])
def test_classic_method_pasted_into_a_subclass_works_on(classic, name, sizes):
    pasted = type("Pasted", (NetworkWithCheckpointing,), {name: getattr(classic.NetworkWithCheckpointing, name)})
    assert_trained_alike(build(pasted, sizes, 3), build(classic, sizes))


@pytest.mark.parametrize("nth", NTHS)
@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_overridden_cost_derivative_takes_effect_everywhere(classic, sizes, nth):
    class CrossEntropy:
        def cost_derivative(self, output_activations, y):
            assert output_activations.shape == y.shape == (sizes[-1], y.shape[1])
            return (output_activations - y) / (output_activations * (1 - output_activations))

    base = "Network" if nth is None else "NetworkWithCheckpointing"
    ours, theirs = (type(base, (CrossEntropy, getattr(module, base)), {}) for module in (npnet, classic))
    assert_trained_alike(build(ours, sizes, nth), build(theirs, sizes, nth))
