"""PyTorch as an oracle: the same chains, losses and optimizers give the same gradients and weights, to 1e-10."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npnet.checkpoint import backpropagate
from npnet.layers import Dense
from npnet.losses import MeanSquaredError, Quadratic, SoftmaxCrossEntropy
from npnet.optimizers import SGD, Adam
from npnet.schedules import every_nth, none

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other

ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "identity": lambda z: z}
LOSSES = {
    "quadratic": (Quadratic(), lambda output, target: 0.5 * ((output - target) ** 2).sum() / len(output)),
    "mean squared error": (MeanSquaredError(), torch.nn.MSELoss()),
    "cross-entropy, probabilities": (SoftmaxCrossEntropy(), torch.nn.CrossEntropyLoss()),
    "cross-entropy, classes": (
        SoftmaxCrossEntropy(),
        lambda output, target: torch.nn.CrossEntropyLoss()(output, target.argmax(dim=1)),
    ),
}
OPTIMIZERS = {
    "sgd": (lambda: SGD(0.1), lambda parameters: torch.optim.SGD(parameters, lr=0.1)),
    "momentum": (lambda: SGD(0.05, 0.9), lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9)),
    "adam": (lambda: Adam(0.01), lambda parameters: torch.optim.Adam(parameters, lr=0.01)),
    "adam, other numbers": (
        lambda: Adam(0.02, 0.8, 0.95, 1e-4),
        lambda parameters: torch.optim.Adam(parameters, lr=0.02, betas=(0.8, 0.95), eps=1e-4),
    ),
}
sizes_of_chains = st.lists(st.integers(1, 6), min_size=2, max_size=9)  # depths 1 to 8


def chain(sizes, activations, random):
    """npnet's layers, and PyTorch's tensors with the same numbers."""
    layers, tensors = [], []
    for n, m, activation in zip(sizes[:-1], sizes[1:], activations, strict=False):
        layers.append(Dense(n, m, activation, dtype=np.float64, rng=random))
        layers[-1].bias.value = random.standard_normal(m)
        tensors += [torch.tensor(p.value.copy(), requires_grad=True) for p in layers[-1].parameters()]
    return layers, tensors


def torch_forward(tensors, activations, x):
    for weight, bias, activation in zip(tensors[::2], tensors[1::2], activations, strict=False):
        x = ACTIVATIONS[activation](x @ weight.T + bias)
    return x


def batch_of(random, loss, batch, inputs, outputs):
    """x, and a target that the loss takes: numbers, rows of probabilities, or one-hot rows."""
    x, target = random.standard_normal((batch, inputs)), random.standard_normal((batch, outputs))
    if loss.startswith("cross-entropy"):
        target = random.dirichlet(np.ones(outputs), batch)
    if loss.endswith("classes"):
        target = np.eye(outputs)[target.argmax(axis=1)]
    return x, target


def check_gradients(sizes, activations, loss, batch, n, seed):
    """Loss and gradients, plain and checkpointed, against PyTorch's."""
    random = np.random.default_rng(seed)
    layers, tensors = chain(sizes, activations, random)
    x, target = batch_of(random, loss, batch, sizes[0], sizes[-1])
    ours, theirs = LOSSES[loss]
    expected = theirs(torch_forward(tensors, activations, torch.tensor(x)), torch.tensor(target))
    expected.backward()
    for schedule in (none(len(layers)), every_nth(len(layers), n)):
        values = []

        def output_gradient(output, values=values):
            value, gradient = ours.value_and_gradient(output, target)
            values.append(float(value))
            return gradient

        backpropagate(layers, schedule, x, output_gradient)
        assert values == [pytest.approx(expected.item(), rel=1e-10, abs=1e-10)]
        for parameter, tensor in zip([p for layer in layers for p in layer.parameters()], tensors, strict=True):
            np.testing.assert_allclose(parameter.gradient, tensor.grad.numpy(), rtol=1e-10, atol=1e-10)
            parameter.gradient = None


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("loss", LOSSES)
@given(sizes=sizes_of_chains, batch=st.integers(1, 6), n=st.integers(0, 9), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=8)
def test_gradients_of_chains_of_one_activation_are_pytorchs(loss, activation, sizes, batch, n, seed):
    check_gradients(sizes, [activation] * 8, loss, batch, n, seed)


@pytest.mark.parametrize("loss", LOSSES)
@given(
    sizes=sizes_of_chains,
    activations=st.lists(st.sampled_from(sorted(ACTIVATIONS)), min_size=8, max_size=8),
    batch=st.integers(1, 6),
    n=st.integers(0, 9),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=25)
def test_gradients_of_mixed_chains_are_pytorchs(loss, sizes, activations, batch, n, seed):
    check_gradients(sizes, activations, loss, batch, n, seed)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("depth", range(1, 9))
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_at_every_depth_are_pytorchs(loss, depth, batch):
    check_gradients([4, *[3, 5] * 4][: depth + 1], list(ACTIVATIONS) * 2, loss, batch, 3, depth)


@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("make_ours", "make_theirs"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_five_steps_of_an_optimizer_lead_to_pytorchs_weights(make_ours, make_theirs, loss, n, layer_by_layer):
    random, activations, sizes = np.random.default_rng(5), ["tanh", "relu", "sigmoid", "identity"], [4, 6, 5, 7, 3]
    layers, tensors = chain(sizes, activations, random)
    start = [tensor.detach().numpy().copy() for tensor in tensors]
    parameters = [p for layer in layers for p in layer.parameters()]
    (ours, theirs), optimizer, torch_optimizer = LOSSES[loss], make_ours(), make_theirs(tensors)
    after_backward = (lambda layer: optimizer.step(layer.parameters())) if layer_by_layer else None
    for _ in range(5):
        x, target = batch_of(random, loss, 6, sizes[0], sizes[-1])
        backpropagate(
            layers,
            every_nth(4, n),
            x,
            lambda output, target=target: ours.value_and_gradient(output, target)[1],
            after_backward=after_backward,
        )
        optimizer.step(parameters)
        torch_optimizer.zero_grad()
        theirs(torch_forward(tensors, activations, torch.tensor(x)), torch.tensor(target)).backward()
        torch_optimizer.step()
        for parameter, tensor in zip(parameters, tensors, strict=True):
            np.testing.assert_allclose(parameter.value, tensor.detach().numpy(), rtol=1e-10, atol=1e-10)
    for parameter, before in zip(parameters, start, strict=True):
        assert not np.allclose(parameter.value, before, rtol=1e-3)
