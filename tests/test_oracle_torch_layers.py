"""PyTorch as an oracle for layers, losses, whole models, clipping and weight decay: the same numbers, to 1e-10."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npnet
from npnet import GELU, BCEWithLogits, Dense, Dropout, LayerNorm, Linear, MeanSquaredError, Residual, Sequential
from npnet.activations import as_activation
from npnet.checkpoint import backpropagate, checkpoint, checkpoint_sequential
from npnet.layer import needs_saved
from npnet.random import one_step
from npnet.schedules import every_nth

torch = pytest.importorskip("torch")
nn = torch.nn
torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other

F64 = {"dtype": np.float64}
ACTIVATIONS = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "identity": nn.Identity,
    "softmax": lambda: nn.Softmax(dim=1),
}


class TorchDense(nn.Linear):
    """A linear layer and an activation, with npnet's names."""

    def __init__(self, inputs, outputs, activation):
        super().__init__(inputs, outputs)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x):
        return self.activation(super().forward(x))


class TorchResidual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Scaled(nn.Module):
    """What dropout does, with a given mask."""

    def __init__(self, factors):
        super().__init__()
        self.factors = torch.tensor(factors)

    def forward(self, x):
        return x * self.factors


def dense(name):
    return lambda: Dense(5, 5, name, **F64), lambda: TorchDense(5, 5, name)


PAIRS = {  # 5 features in; npnet's and PyTorch's
    **{name: (lambda name=name: as_activation(name), make) for name, make in ACTIVATIONS.items()},
    **{f"dense {name}": dense(name) for name in ACTIVATIONS},
    "linear": (lambda: Linear(5, 3, **F64), lambda: nn.Linear(5, 3)),
    "norm": (lambda: LayerNorm(5, **F64), lambda: nn.LayerNorm(5)),
    "norm, large eps": (lambda: LayerNorm(5, 0.5, **F64), lambda: nn.LayerNorm(5, 0.5)),
    "gelu": (GELU, nn.GELU),
    "gelu-tanh": (lambda: GELU("tanh"), lambda: nn.GELU(approximate="tanh")),
    "dropout in eval": (lambda: Dropout(0.5).eval(), lambda: nn.Dropout(0.5).eval()),
    "residual": (lambda: Residual(Linear(5, 5, **F64)), lambda: TorchResidual(nn.Linear(5, 5))),
    "composed": (
        lambda: Sequential(
            Linear(5, 6, **F64),
            LayerNorm(6, **F64),
            Sequential(GELU(), Sequential(Linear(6, 4, **F64), GELU("tanh")), LayerNorm(4, **F64)),
            Residual(Sequential(Linear(4, 7, **F64), as_activation("relu"), Residual(GELU()), Linear(7, 4, **F64))),
            Dense(4, 3, "softmax", **F64),
        ),
        lambda: nn.Sequential(
            nn.Linear(5, 6),
            nn.LayerNorm(6),
            nn.Sequential(nn.GELU(), nn.Sequential(nn.Linear(6, 4), nn.GELU(approximate="tanh")), nn.LayerNorm(4)),
            TorchResidual(nn.Sequential(nn.Linear(4, 7), nn.ReLU(), TorchResidual(nn.GELU()), nn.Linear(7, 4))),
            TorchDense(4, 3, "softmax"),
        ),
    ),
}
every_pair = pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)


def randomized(layer, random):
    for parameter in layer.parameters():
        parameter.value[...] = random.standard_normal(parameter.value.shape)
    return layer


def copied(layer, module):
    """The module, in float64, with the layer's numbers by name."""
    state = {name: torch.tensor(array) for name, array in layer.state_dict().items()}
    module.double().load_state_dict(state)  # strict: the names are the same
    return module


def taken(layer):
    return [parameter.take_gradient() for parameter in layer.parameters()]


def check(results, expected):
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-10, atol=1e-10)


@every_pair
@given(batch=st.integers(1, 7), scale=st.sampled_from([1e-3, 1.0, 30.0]), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=12)
def test_outputs_dx_and_all_gradients_are_pytorchs_also_of_a_checkpointed_part(ours, theirs, batch, scale, seed):
    random = np.random.default_rng(seed)
    layer, x = randomized(ours(), random), scale * random.standard_normal((batch, 5))
    module, tensor = copied(layer, theirs()), torch.tensor(x, requires_grad=True)
    y, saved = layer.forward(x)
    dy = random.standard_normal(y.shape)
    results = [y, layer.backward(dy, saved), *taken(layer)]
    output = module(tensor)
    output.backward(torch.tensor(dy))
    parameters = dict(module.named_parameters())
    check(results, [output, tensor.grad, *(parameters[name].grad for name in layer.named_parameters())])
    assert set(parameters) == set(layer.named_parameters())
    for part in (checkpoint(layer), checkpoint(checkpoint(layer)), Sequential(checkpoint(layer))):
        y, saved = part.forward(x)
        assert all(map(np.array_equal, [y, part.backward(dy, saved), *taken(part)], results))
    y, tape = checkpoint_sequential([layer, as_activation("identity")], 2, x)
    assert all(map(np.array_equal, [y, tape.backward(dy), *taken(layer)], results))


def test_of_dropout_the_gradient_is_pytorchs_for_the_same_mask():
    random = np.random.default_rng(0)
    parts = [Linear(5, 6, **F64), Dropout(0.4, rng=1), GELU(), Linear(6, 3, **F64)]
    model, x = randomized(Sequential(*parts), random), random.standard_normal((9, 5))
    dy = random.standard_normal((9, 3))
    with one_step(4):
        factors, _ = parts[1].forward(np.ones((9, 6)))
        backpropagate(model.layers, every_nth(4, 2, needs_saved(parts)), x, lambda _: dy.copy())
    assert set(np.unique(factors)) == {0, 1 / 0.6}
    module = copied(model, nn.Sequential(nn.Linear(5, 6), Scaled(factors), nn.GELU(), nn.Linear(6, 3)))
    module(torch.tensor(x)).backward(torch.tensor(dy))
    check(taken(model), [parameter.grad for parameter in module.parameters()])


LOSSES = {
    "quadratic": (npnet.Quadratic(), lambda z, t: 0.5 * ((z - t) ** 2).sum() / len(z)),
    "mean squared error": (MeanSquaredError(), nn.MSELoss()),
    "cross-entropy": (npnet.SoftmaxCrossEntropy(), nn.CrossEntropyLoss()),
    "binary cross-entropy": (BCEWithLogits(), nn.BCEWithLogitsLoss()),
}


@pytest.mark.parametrize(("ours", "theirs"), LOSSES.values(), ids=LOSSES)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    scale=st.sampled_from([1e-3, 1, 300]),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=30)
def test_values_and_gradients_of_losses_are_pytorchs(ours, theirs, shape, scale, seed):
    random = np.random.default_rng(seed)
    z, target = scale * random.standard_normal(shape), random.dirichlet(np.ones(shape[1]), shape[0])
    tensor = torch.tensor(z, requires_grad=True)
    expected = theirs(tensor, torch.tensor(target))
    expected.backward()
    check(ours.value_and_gradient(z, target), [expected, tensor.grad])


# What is done with gradients.


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from([1e-3, 0.5, 3.0, 1e3]), st.integers(0, 2**32)
)
@settings(deadline=None, max_examples=40)
def test_clipping_is_pytorchs_but_for_the_1e_6_that_it_adds_to_the_norm(sizes, max_norm, seed):
    random = np.random.default_rng(seed)
    arrays = [random.standard_normal((size, 3)) for size in sizes]
    parameters = [npnet.Parameter(array.copy()) for array in arrays]
    tensors = [torch.tensor(array) for array in arrays]
    for parameter, tensor, array in zip(parameters, tensors, arrays, strict=True):
        parameter.gradient, tensor.grad = np.asfortranarray(array), torch.tensor(array)
    norm, expected = npnet.clip_grad_norm(parameters, max_norm), nn.utils.clip_grad_norm_(tensors, max_norm)
    assert norm == pytest.approx(expected.item(), rel=1e-12)
    for parameter, tensor in zip(parameters, tensors, strict=True):
        np.testing.assert_allclose(parameter.gradient, tensor.grad.numpy(), rtol=1e-6 + 2e-6 / norm, atol=0)


OPTIMIZERS = {
    "sgd": (npnet.SGD, torch.optim.SGD),
    "momentum": (lambda lr, **o: npnet.SGD(lr, 0.9, **o), lambda p, **o: torch.optim.SGD(p, momentum=0.9, **o)),
    "adam": (  # with an epsilon above the rounding errors of gradients that are zero, as in front of a norm
        lambda lr, **options: npnet.Adam(lr, epsilon=1e-3, **options),
        lambda p, **options: torch.optim.Adam(p, eps=1e-3, **options),
    ),
}


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("decay", [0.0, 0.03, 2.0])
@pytest.mark.parametrize(("ours", "theirs"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_with_weight_decay_and_clipping_lead_to_pytorchs_weights(ours, theirs, decay, clip_norm):
    random = np.random.default_rng(1)
    make, make_theirs = PAIRS["composed"]
    model, loss = randomized(make(), random), MeanSquaredError()
    module, optimizer = copied(model, make_theirs()), ours(0.05, weight_decay=decay)
    torch_optimizer = theirs(module.parameters(), lr=0.05, weight_decay=decay)
    schedule = every_nth(5, 2, needs_saved(model.layers))
    for _ in range(6):
        x, y = random.standard_normal((8, 5)), random.standard_normal((8, 3))
        npnet.train_step(model, loss, optimizer, schedule, x, y, clip_norm=clip_norm)
        torch_optimizer.zero_grad()
        nn.functional.mse_loss(module(torch.tensor(x)), torch.tensor(y)).backward()
        if clip_norm:
            norm = torch.sqrt(sum((parameter.grad**2).sum() for parameter in module.parameters()))
            for parameter in module.parameters():
                parameter.grad *= min(1.0, clip_norm / norm.item())
        torch_optimizer.step()
    check(model.state_dict().values(), [module.state_dict()[name] for name in model.state_dict()])
