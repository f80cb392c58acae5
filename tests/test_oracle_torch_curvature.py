"""PyTorch's double backward as an oracle of second derivatives, to 1e-10."""

import numpy as np
import pytest

import npnet
from npnet import Linear, Residual, Sequential
from npnet.losses import LOSSES
from tests.test_curvature import batch_of, flatten, random_vector, shaken
from tests.test_oracle_torch_layers import TorchResidual

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
nn = torch.nn

F8 = {"dtype": np.float64}
THEIRS = {
    "quadratic": lambda output, target: 0.5 * ((output - target) ** 2).sum() / len(output),
    "mean_squared_error": nn.MSELoss(),
    "softmax_cross_entropy": nn.CrossEntropyLoss(),
    "bce_with_logits": nn.BCEWithLogitsLoss(),
}
every_loss = pytest.mark.parametrize("loss", LOSSES)


def models():
    """npnet's and torch's, with the same numbers; the parameters come in the same order."""
    rng = np.random.default_rng(0)
    inner = Sequential(Linear(6, 5, rng=rng, **F8), npnet.GELU("tanh"), Linear(5, 6, rng=rng, **F8), npnet.Tanh())
    ours = Sequential(
        Linear(4, 6, rng=rng, **F8),
        npnet.LayerNorm(6, **F8),
        npnet.GELU(),
        Residual(inner),
        npnet.Sigmoid(),
        Linear(6, 6, rng=rng, **F8),
        npnet.Softmax(),
        Linear(6, 3, rng=rng, **F8),
    )
    theirs = nn.Sequential(
        nn.Linear(4, 6),
        nn.LayerNorm(6),
        nn.GELU(),
        TorchResidual(nn.Sequential(nn.Linear(6, 5), nn.GELU("tanh"), nn.Linear(5, 6), nn.Tanh())),
        nn.Sigmoid(),
        nn.Linear(6, 6),
        nn.Softmax(dim=1),
        nn.Linear(6, 3),
    ).double()
    for parameter, tensor in zip(shaken(ours).parameters(), theirs.parameters(), strict=True):
        tensor.data = torch.tensor(np.ascontiguousarray(parameter.value))
    return ours, theirs


def loss_of(theirs, loss, x, y):
    return THEIRS[loss](theirs(torch.tensor(x)), torch.tensor(y))


def joined(tensors):
    return torch.cat([each.reshape(-1) for each in tensors])


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-10, atol=1e-10)
    assert np.abs(ours).max() > 1e-3


@every_loss
def test_products_with_the_hessian_are_those_of_double_backward(loss):
    (ours, theirs), (x, y) = models(), batch_of(loss)
    vector, parameters = random_vector(ours), list(theirs.parameters())
    value = loss_of(theirs, loss, x, y)
    gradient = torch.autograd.grad(value, parameters, create_graph=True)
    product = torch.autograd.grad(joined(gradient) @ torch.tensor(flatten(vector)), parameters)
    for schedule in ("none", "sqrt", "revolve"):
        found = npnet.hessian_vector_product(ours, LOSSES[loss](), x, y, vector, schedule=schedule)
        assert found.value == pytest.approx(value.item(), rel=1e-12)
        close(flatten(found.gradient), joined(gradient))
        close(flatten(found.product), joined(product))


@every_loss
def test_the_gradient_of_the_squared_gradient_norm_is_that_of_double_backward(loss):
    (ours, theirs), (x, y) = models(), batch_of(loss)
    parameters = list(theirs.parameters())
    gradient = torch.autograd.grad(loss_of(theirs, loss, x, y), parameters, create_graph=True)
    expected = torch.autograd.grad((joined(gradient) ** 2).sum(), parameters)
    close(flatten(npnet.gradient_norm_gradient(ours, LOSSES[loss](), x, y).product), joined(expected))
    npnet.second_order_step(ours, LOSSES[loss](), x, y, 0.1, 0.02)
    for parameter, tensor, first, second in zip(ours.parameters(), parameters, gradient, expected, strict=True):
        close(parameter.value, tensor - 0.1 * first - 0.02 * second)


@every_loss
def test_the_hessian_is_that_of_double_backward(loss):
    (ours, theirs), (x, y) = models(), batch_of(loss)
    names = [name for name, _ in theirs.named_parameters()]
    shapes = [each.shape for each in theirs.parameters()]

    def value(numbers):
        parts = numbers.split([shape.numel() for shape in shapes])
        values = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return THEIRS[loss](torch.func.functional_call(theirs, values, (torch.tensor(x),)), torch.tensor(y))

    expected = torch.autograd.functional.hessian(value, joined(theirs.parameters()).detach())
    close(npnet.hessian(ours, LOSSES[loss](), x, y), expected)
