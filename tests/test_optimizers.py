"""Optimizers: the formulas, gradients freed, lent arrays untouched, one layer at a time or all at once."""

import numpy as np
import pytest

from npnet.checkpoint import backpropagate
from npnet.layer import Parameter
from npnet.layers import mlp
from npnet.optimizers import SGD, Adam, Optimizer, clip_grad_norm
from npnet.schedules import every_nth

# OpenBLAS 0.3.31 with AVX-512 now and then raises the "invalid" flag in float32 products that are right (inner size 5).
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in dot:RuntimeWarning")

MAKERS = {
    "sgd": lambda: SGD(0.1),
    "momentum": lambda: SGD(0.1, momentum=0.8),
    "adam": lambda: Adam(0.1, 0.7, 0.95, 1e-3),
}
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def plain_sgd(weight, gradients, rate, momentum):
    velocity = 0
    for gradient in gradients:
        velocity = momentum * velocity + gradient
        weight = weight - rate * velocity
    return weight


def plain_adam(weight, gradients, rate, beta1, beta2, epsilon):
    mean = square = 0
    for t, gradient in enumerate(gradients, 1):
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        mean_hat, square_hat = mean / (1 - beta1**t), square / (1 - beta2**t)
        weight = weight - rate * mean_hat / (np.sqrt(square_hat) + epsilon)
    return weight


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(
    ("optimizer", "formula", "numbers"),
    [
        (SGD, plain_sgd, (0.1, 0.0)),
        (SGD, plain_sgd, (0.05, 0.8)),
        (SGD, plain_sgd, (0.0, 0.5)),
        (Adam, plain_adam, (0.1, 0.7, 0.95, 1e-3)),
        (Adam, plain_adam, (1e-3, 0.9, 0.999, 1e-8)),
        (Adam, plain_adam, (0.1, 0.0, 0.0, 1e-8)),
    ],
)
def test_steps_follow_the_formula(optimizer, formula, numbers, steps):
    optimizer = optimizer(*numbers)
    matrix, bias = draw(0, 4, 3), draw(1, 4)
    gradients, bias_gradients = draw(2, steps, 4, 3), draw(3, steps, 4)
    parameters = [Parameter(np.asfortranarray(matrix)), Parameter(bias.copy())]
    for gradient, bias_gradient in zip(gradients, bias_gradients, strict=True):
        parameters[0].gradient, parameters[1].gradient = np.asfortranarray(gradient), bias_gradient.copy()
        optimizer.step(parameters)
    np.testing.assert_allclose(parameters[0].value, formula(matrix, gradients, *numbers), rtol=1e-12)
    np.testing.assert_allclose(parameters[1].value, formula(bias, bias_gradients, *numbers), rtol=1e-12)


def test_the_defaults_are_plain_sgd_and_the_papers_adam():
    assert SGD(0.1).momentum == 0
    adam = Adam()
    assert (adam.learning_rate, adam.beta1, adam.beta2, adam.epsilon) == (1e-3, 0.9, 0.999, 1e-8)


@every_optimizer
def test_the_learning_rate_may_change_between_steps(make):
    optimizer, parameter = make(), Parameter(np.ones(3))
    for rate, moves in [(0.1, True), (0.0, False), (0.1, True)]:
        before = parameter.value.copy()
        optimizer.learning_rate, parameter.gradient = rate, np.ones(3)
        optimizer.step([parameter])
        assert np.array_equal(parameter.value, before) != moves


@every_optimizer
def test_a_step_writes_in_place_and_frees_the_gradient(make):
    array = np.ones((3, 2))
    parameter = Parameter(array)
    parameter.gradient = np.ones((3, 2))
    make().step([parameter])
    assert parameter.gradient is None
    assert parameter.value is array
    assert (array != 1).all()


@every_optimizer
def test_a_parameter_without_gradient_stays_as_it_is_and_takes_no_step(make):
    optimizer, optimizer_alone = make(), make()
    idle, busy, alone = (Parameter(np.ones(3)) for _ in range(3))
    for gradient in draw(0, 3, 3):
        busy.gradient, alone.gradient = gradient.copy(), gradient.copy()
        optimizer.step([idle, busy])
        optimizer_alone.step([alone])
    assert np.array_equal(idle.value, np.ones(3))
    assert np.array_equal(busy.value, alone.value)
    idle.gradient, first = np.full(3, 0.5), Parameter(np.ones(3))
    first.gradient = np.full(3, 0.5)
    optimizer.step([idle])
    make().step([first])
    assert np.array_equal(idle.value, first.value)  # its own first step, whatever the others did


@every_optimizer
def test_a_lent_array_is_untouched_and_the_update_goes_to_a_fresh_copy_once(make):
    lent, ordinary, optimizer = Parameter(draw(0, 3, 2)), Parameter(draw(0, 3, 2)), make()
    handed_out, before = lent.value, lent.value.copy()
    lent.lent = True
    copies = []
    for gradient in draw(1, 2, 3, 2):
        lent.gradient, ordinary.gradient = gradient.copy(), gradient.copy()
        optimizer.step([lent, ordinary])
        copies.append(lent.value)
    assert np.array_equal(handed_out, before)
    assert not np.shares_memory(lent.value, handed_out)
    assert copies[0] is copies[1]
    assert lent.lent is False
    assert np.array_equal(lent.value, ordinary.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@every_optimizer
def test_layer_by_layer_and_all_at_once_give_the_same_weights(make, dtype):
    x = draw(0, 6, 5).astype(dtype)
    weights = []
    for at_once in (True, False):
        model, optimizer = mlp([5, 4, 6, 3], "tanh", dtype=dtype, rng=0), make()
        alive = []

        def update(layer, model=model, optimizer=optimizer, alive=alive):
            alive.append(sum(p.gradient is not None for p in model.parameters()))
            optimizer.step(layer.parameters())

        for _ in range(4):
            after_backward = None if at_once else update
            backpropagate(model.layers, every_nth(3, 2), x, lambda y: y - 1, after_backward=after_backward)
            if at_once:
                optimizer.step(model.parameters())
        assert all(p.gradient is None for p in model.parameters())
        assert set(alive) <= {2}  # the gradients of one layer, never of two
        weights.append([p.value for p in model.parameters()])
    for ours, theirs in zip(*weights, strict=True):
        assert ours.dtype == dtype
        assert np.array_equal(ours, theirs)


@every_optimizer
def test_the_loss_goes_down(make):
    model, optimizer, x = mlp([3, 8, 2], "tanh", dtype=np.float64, rng=0), make(), draw(0, 20, 3)
    losses = []
    for _ in range(40):
        losses.append((model.predict(x) ** 2).mean())
        backpropagate(model.layers, every_nth(2, 0), x, lambda y: y / len(y))
        optimizer.step(model.parameters())
    assert losses[-1] < 0.1 * losses[0]


NUMBERS = {
    "negative": (-0.1, ValueError, "-0.1"),
    "nan": (float("nan"), ValueError, "nan"),
    "inf": (float("inf"), ValueError, "inf"),
    "word": ("fast", TypeError, "'fast'"),
    "string": ("0.1", TypeError, "'0.1'"),
    "none": (None, TypeError, "None"),
    "list": ([0.1], TypeError, r"\[0\.1\]"),
    "complex": (0.1j, TypeError, "0.1j"),
}
OPTIONS = [(SGD, "learning_rate"), (SGD, "momentum"), (Adam, "learning_rate")]
OPTIONS += [(Adam, "beta1"), (Adam, "beta2"), (Adam, "epsilon")]


@pytest.mark.parametrize(("value", "error", "shown"), NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize(("optimizer", "option"), OPTIONS)
def test_a_bad_number_is_refused_by_name(optimizer, option, value, error, shown):
    with pytest.raises(error, match=rf"^{option}: expected a finite number, at least 0.*, got {shown}"):
        optimizer(**{"learning_rate": 0.1, option: value})


@pytest.mark.parametrize(("optimizer", "option"), [(SGD, "momentum"), (Adam, "beta1"), (Adam, "beta2")])
@pytest.mark.parametrize("value", [1, 1.0, 1.5])
def test_a_decay_of_one_is_refused(optimizer, option, value):
    with pytest.raises(ValueError, match=rf"^{option}: expected a finite number, at least 0 and below 1, got {value}"):
        optimizer(learning_rate=0.1, **{option: value})


@every_optimizer
def test_a_parameter_that_is_there_twice_is_refused_and_nothing_is_updated(make):
    parameters = [Parameter(np.ones(3)), Parameter(np.ones(3))]
    for parameter in parameters:
        parameter.accumulate(np.ones(3))
    for call in (make().step, make().prepare, lambda given: clip_grad_norm(given, 0.1)):
        with pytest.raises(ValueError, match="one of them is there twice"):
            call([*parameters, parameters[0]])
    assert all(np.array_equal(parameter.value, np.ones(3)) for parameter in parameters)
    assert all(np.array_equal(parameter.gradient, np.ones(3)) for parameter in parameters)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_state_of_another_layout_gets_that_of_the_weight(order):
    weight, other = Parameter(np.asarray(draw(0, 3, 4), order="F")), "C" if order == "F" else "F"
    optimizer = Adam(0.1)
    state = {f"{kind}/w": np.asarray(np.abs(draw(1, 3, 4)), order=other) for kind in ("mean", "square")}
    weight.value = np.asarray(weight.value, order=order)
    optimizer.load_state_dict({**state, "steps/w": np.array(3)}, {"w": weight})
    for array in optimizer.held([weight]):
        assert array.flags[f"{order}_CONTIGUOUS"]
    weight.accumulate(np.ones((3, 4)))
    optimizer.step([weight])


def test_an_optimizer_without_update_says_what_is_missing():
    parameter = Parameter(np.ones(2))
    parameter.gradient = np.ones(2)
    with pytest.raises(NotImplementedError, match="_update"):
        Optimizer().step([parameter])


def test_an_optimizer_prints_what_it_was_given():
    class Own(Adam):
        """Keeps nothing by the names of its arguments."""

        def __init__(self, rate, **others):
            super().__init__(rate)

    assert repr(Adam()) == "Adam(learning_rate=0.001)"
    assert str(SGD(3.0, momentum=0.9)) == "SGD(learning_rate=3.0, momentum=0.9)"
    assert repr(Own(0.1)) == "Own()"
