"""What a newcomer to `fit` runs into: layers of their own, gradients left over, the wrong kind of argument."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import npnet
from npnet.schedule import Action, Kind
from npnet.schedules import as_schedule, none

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.random((12, 4)), RANDOM.random((12, 2))


class Square(npnet.Layer):
    """y = x^2, by a student: forward and backward, and nothing said about what suffices."""

    def forward(self, x):
        return x * x, x

    def backward(self, dy, saved):
        return 2 * saved * dy


def model():
    dense = [npnet.Dense(n, m, "tanh", rng=i, dtype=np.float64) for i, (n, m) in enumerate([(4, 6), (6, 6), (6, 2)])]
    return npnet.Sequential(dense[0], Square(), npnet.Sequential(dense[1], npnet.Tanh()), dense[2])


def trained(schedule="none", **changes):
    own = changes.pop("model", None) or model()
    options = {"loss": npnet.Quadratic(), "optimizer": npnet.SGD(0.1), "epochs": 2, "batch_size": 5, "rng": 0}
    npnet.fit(own, changes.pop("data", (X, Y)), schedule=schedule, log=False, **(options | changes))
    return [parameter.value for parameter in own.parameters()]


@pytest.mark.parametrize("schedule", ["sqrt", "none"])
def test_layers_of_ones_own_and_nested_chains_train_under_a_schedule_by_name(schedule):
    assert all(map(np.array_equal, trained(schedule), trained()))


def test_a_gradient_left_over_from_playing_is_not_added_to_the_first_step():
    played = model()
    y, saved = played.forward(X)
    played.backward(np.ones_like(y), saved)
    assert all(map(np.array_equal, trained(model=played), trained()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, r"optimizer: expected an Optimizer, such as Adam\(1e-3\), got 'adam'"),
        ({"optimizer": npnet.Adam}, "optimizer: expected"),
        ({"loss": npnet.SoftmaxCrossEntropy}, "loss: expected a Loss"),
        ({"model": npnet.Network([4, 2])}, "model: expected a Sequential"),
        ({"data": X}, r"training data: expected a pair \(x, y\), got ndarray"),
        ({"data": (X, Y.astype(np.float32))}, "y has dtype float32, the network float64; convert with y.astype"),
        ({"data": (X, Y.tolist())}, "expected an array"),
    ],
)
def test_the_wrong_kind_of_argument_is_named(changes, message):
    with pytest.raises(TypeError, match=message):
        trained(**changes)


def test_a_training_that_was_ruined_in_its_last_step_is_not_given_an_accuracy():
    network = npnet.Network([4, 3, 2], rng=0)
    network.weights[0][...] = np.nan
    with pytest.raises(npnet.TrainingDiverged, match="an output of the network is not finite"):
        network.evaluate((X, np.eye(2)[np.arange(12) % 2]))


def test_actions_may_be_written_as_they_are_printed():
    printed = [tuple(str(action).split()) for action in none(2)]
    assert as_schedule([(kind, int(layer)) for kind, layer in printed], 2) == none(2)
    assert Action(Kind("drop"), 1) == (Kind.DROP, 1)


def test_npnet_is_imported_from_the_folder_that_holds_the_clone_too():
    clone = Path(npnet.__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", "from npnet import Network; print(Network([2, 1]))"]
    done = subprocess.run(command, cwd=clone.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "Network([2, 1])\n", done.stderr
