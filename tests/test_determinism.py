"""The check of determinism: a layer whose noise comes from no seed is caught by its numbers, and named."""

import numpy as np
import pytest

import npnet
from npnet import schedules
from npnet.blocks import GELU, Dropout, Residual
from npnet.checkpoint import NondeterministicLayer, checkpoint
from npnet.layer import Layer
from npnet.layers import Sequential
from npnet.random import current_step, draws
from npnet.step import value_and_grad
from tests.test_parts import batch_of, by_hand, dense, engine


class Unseeded(Layer):
    """y = x * noise: of x's shape, and from a stream of its own, so another each time."""

    def __init__(self):
        self.stream = np.random.default_rng(0)

    def __repr__(self):
        return "Unseeded()"

    def forward(self, x):
        noise = self.stream.random(x.shape)
        return x * noise, noise

    def backward(self, dy, saved):
        return dy * saved


class Seeded(Unseeded):
    """The same, as `npnet.random` says."""

    def forward(self, x):
        noise = draws(5, current_step()).random(x.shape)
        return x * noise, noise


X, Y, LOSS = batch_of(24), batch_of(24, 3), npnet.MeanSquaredError()


def noisy_chain(layer):
    rng = np.random.default_rng(0)
    return [dense(rng, 4), layer, dense(rng), dense(rng, outputs=3)]


SETTINGS = {"loss": LOSS, "optimizer": npnet.SGD(0.1), "epochs": 1, "batch_size": 8, "log": False}
CHECKED = {  # from a layer and the check to a call of the function that is to check
    "checkpoint": lambda layer, check: by_hand(checkpoint(Sequential(*noisy_chain(layer)), determinism_check=check), X),
    "backpropagate": lambda layer, check: engine(
        noisy_chain(layer), schedules.every_nth(4, 3, [2]), X, determinism_check=check
    ),
    "value_and_grad": lambda layer, check: value_and_grad(
        Sequential(*noisy_chain(layer)), LOSS, X, Y, schedule="sqrt", determinism_check=check
    ),
    "fit": lambda layer, check: npnet.fit(
        Sequential(*noisy_chain(layer)), (X, Y), schedule="sqrt", determinism_check=check, **SETTINGS
    ),
}
PASSED_ON = {  # the check is asked for from outside of the part
    "fit": lambda layer, check: npnet.fit(
        Sequential(checkpoint(Sequential(*noisy_chain(layer)))), (X, Y), determinism_check=check, **SETTINGS
    ),
    "backpropagate": lambda layer, check: engine(
        [checkpoint(Sequential(*noisy_chain(layer)))], schedules.none(1, [1]), X, determinism_check=check
    ),
}


@pytest.mark.parametrize("run", [CHECKED["checkpoint"], CHECKED["backpropagate"], PASSED_ON["backpropagate"]])
def test_without_the_check_and_outside_of_a_first_step_nothing_finds_noise(run):
    run(Unseeded(), False)


@pytest.mark.parametrize(
    "run",
    [pytest.param(run, id=name) for name, run in CHECKED.items()]
    + [pytest.param(run, id=f"{name}, a part inside") for name, run in PASSED_ON.items()],
)
def test_the_check_catches_noise_by_its_values_names_the_layer_and_says_what_to_do(run):
    for layer in (Seeded(), Dropout(0.5, rng=0), Residual(Dropout(0.5, rng=0)), checkpoint(Seeded()), GELU()):
        run(layer, True)
    with pytest.raises(
        NondeterministicLayer, match=r"Unseeded\(\).*: run again with the same input.*npnet\.random\.draws"
    ):
        run(Unseeded(), True)


def test_the_check_names_the_layer_by_its_number_and_leaves_no_gradients():
    layers = noisy_chain(Unseeded())
    with pytest.raises(NondeterministicLayer, match=r"^layer 1, Unseeded\(\): "):
        engine(layers, schedules.every_nth(4, 3, [2]), X, determinism_check=True)
    assert all(parameter.gradient is None for layer in layers for parameter in layer.parameters())


def test_a_part_whose_random_numbers_are_not_preserved_is_caught():
    part = checkpoint(Sequential(*noisy_chain(Dropout(0.5, rng=0))), preserve_rng_state=False, determinism_check=True)
    with pytest.raises(NondeterministicLayer, match=r"checkpoint\(Sequential\(.*Dropout"):
        by_hand(part, X)
