"""Random numbers: one seed for everything, the same draws within a step, others in the next, noise that is caught."""

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import npnet
from npnet import schedules
from npnet.blocks import GELU, Dropout, Residual
from npnet.checkpoint import backpropagate, checkpoint
from npnet.layer import needs_saved
from npnet.layers import Dense, Linear, Sequential
from npnet.random import as_generator, current_step, draws, new_step, one_step, set_seed
from npnet.step import value_and_grad

ROOT = Path(npnet.__file__).parents[1]
X = np.random.default_rng(0).standard_normal((48, 6))
Y = np.random.default_rng(1).standard_normal((48, 3))
LOSS = npnet.MeanSquaredError()


@pytest.fixture(autouse=True)
def own_stream():
    """Each test in a thread state of its own: no seed is left over for the tests after it."""
    state = npnet.random._state
    before, states = dict(vars(state)), (random.getstate(), np.random.get_state(), os.environ.get("PYTHONHASHSEED"))
    yield
    vars(state).clear()
    vars(state).update(before)
    random.setstate(states[0])
    np.random.set_state(states[1])
    os.environ.pop("PYTHONHASHSEED", None)
    if states[2] is not None:
        os.environ["PYTHONHASHSEED"] = states[2]


def model():
    """Weights and keys from the stream of `set_seed`; dropout in the chain, in a residual and in a part."""
    return Sequential(
        Linear(6, 8, dtype=np.float64),
        Dropout(0.3),
        Residual(Sequential(Dropout(0.2), Dense(8, 8, "tanh", dtype=np.float64))),
        checkpoint(Sequential(Dropout(0.4), GELU("tanh"), Dropout(0.1))),
        Linear(8, 3, dtype=np.float64),
    )


def trained(seed, schedule="none", **options):
    """The weights after three epochs that begin with this seed."""
    set_seed(seed)
    each = model()
    settings = {"loss": LOSS, "optimizer": npnet.SGD(0.1, 0.9), "epochs": 3, "batch_size": 20, "log": False}
    npnet.fit(each, (X, Y), schedule=schedule, **settings, **options)
    return list(each.state_dict().values())


def same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    return all(map(np.array_equal, ours, theirs))


def mask(layer, shape=(50, 40)):
    return layer.forward(np.ones(shape))[0] != 0


# The seed.


def drawn():
    return random.random(), np.random.random(), as_generator().random(), Linear(2, 2).weight.value[0, 0], Dropout().key


def test_one_seed_fixes_every_source_and_the_result_names_them():
    result = set_seed(7)
    assert {"python": 7, "numpy": 7, "npnet": 7, "PYTHONHASHSEED": 7}.items() <= result.items()
    assert set(result) <= {"python", "numpy", "npnet", "PYTHONHASHSEED", "cupy"}
    assert os.environ["PYTHONHASHSEED"] == "7"
    first = drawn()
    assert all(a != b for a, b in zip(first, drawn(), strict=True))  # streams run on
    set_seed(7)
    assert drawn() == first
    set_seed(8)
    assert all(a != b for a, b in zip(first, drawn(), strict=True))


def test_the_steps_are_numbered_from_0_after_a_seed():
    for _ in range(2):
        set_seed(3)
        assert [new_step() for _ in range(3)] == [0, 1, 2]


def test_a_seed_or_generator_that_is_given_does_not_touch_the_stream():
    set_seed(7)
    expected = as_generator().random()
    set_seed(7)
    Linear(5, 5, rng=3), Dropout(rng=np.random.default_rng(3)), as_generator(3).random()
    assert as_generator().random() == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, np.int64(5)])
def test_whole_numbers_up_to_32_bits_are_seeds(seed):
    assert set_seed(seed)["npnet"] == seed


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (-1, ValueError, "seed: expected a whole number, at least 0, got -1"),
        (2**32, ValueError, r"seed: expected a whole number from 0 to 4294967295 .*, got 4294967296"),
        (1.0, TypeError, "seed: expected a whole number, at least 0, got 1.0"),
        (True, TypeError, "seed: .* got True"),
        ("1", TypeError, "seed: .* got '1'"),
        (None, TypeError, "seed: .* got None"),
    ],
)
def test_a_bad_seed_is_refused_and_nothing_is_seeded(seed, error, message):
    set_seed(7)
    expected = drawn()
    set_seed(7)
    with pytest.raises(error, match=message):
        set_seed(seed)
    assert drawn() == expected


# The same training, whatever happens around it.


def test_the_same_seed_trains_the_same_weights_in_two_processes_under_any_schedule():
    code = (
        "import hashlib\nfrom tests.test_random import trained\n"
        "print(hashlib.sha256(b''.join(each.tobytes() for each in trained({}, {!r}))).hexdigest())"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    printed = [
        subprocess.run(
            [sys.executable, "-c", code.format(seed, schedule)],
            env=env | {"PYTHONHASHSEED": str(seed + number)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for number, (seed, schedule) in enumerate([(4, "none"), (4, "none"), (4, "sqrt"), (5, "none")])
    ]
    assert printed[0] == printed[1] == printed[2] != printed[3]


def test_under_any_schedule_training_gives_the_same_weights():
    saving = needs_saved(model().layers)
    expected = trained(4)
    for schedule in ("sqrt", schedules.revolve(5, 3, saving), schedules.selective(5, [2, 4], saving)):
        assert same(trained(4, schedule), expected)
    assert same(trained(4, memory_budget="1 MB"), expected)
    assert not same(trained(5), expected)


def test_what_else_the_thread_draws_does_not_change_a_mask():
    def disturb(*_):
        random.random(), np.random.random(5), as_generator().random(3), np.random.default_rng(0).random()

    layer = Dropout(0.5, rng=1)
    with one_step(3):
        expected = mask(layer)
        disturb()
        assert np.array_equal(mask(layer), expected)
        mask(Dropout(0.5, rng=2))
        set_seed(9)
        assert np.array_equal(mask(layer), expected)


def test_two_threads_that_train_at_once_give_what_each_gives_alone():
    seeds, results = (4, 5, 6), {}
    alone, start = [trained(seed) for seed in seeds], threading.Barrier(len(seeds))

    def run(seed):
        start.wait()
        results[seed] = [trained(seed) for _ in range(3)]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=(seed,)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    for seed, expected in zip(seeds, alone, strict=True):
        assert all(same(result, expected) for result in results[seed])


def test_a_mask_is_a_function_of_layer_and_step():
    first, second = Dropout(0.5, rng=1), Dropout(0.5, rng=2)
    with one_step() as outer:
        masks = [mask(first), mask(first), mask(Dropout(0.5, rng=1)), mask(second)]
        with one_step() as inner:  # the step under way goes on
            masks.append(mask(first))
        with one_step(outer + 1):
            masks.append(mask(first))
        masks.append(mask(first))
    assert inner == outer
    assert [np.array_equal(each, masks[0]) for each in masks] == [True, True, True, False, True, False, True]
    assert not np.array_equal(mask(first), mask(first))  # outside of a step every call is one of its own
    assert current_step() == current_step() - 1


def test_the_numbers_of_two_steps_or_layers_have_nothing_in_common():
    streams = [draws(key, step).random(1000) for key in (0, 1, 2**63 - 1) for step in (0, 1, 2, 10**6)]
    assert len(np.unique(streams)) == 12 * 1000  # not the same stream, a few numbers on
    assert np.array_equal(draws(1, 2).random(1000), streams[6])


def test_each_step_of_the_engine_has_other_masks():
    set_seed(0)
    layer, seen = Dropout(0.5, rng=1), []
    for _ in range(3):
        backpropagate([layer], schedules.none(1, [1]), X, lambda y: seen.append(y) or y.copy())
    value_and_grad(layer, LOSS, X, X)
    assert new_step() == 4
    assert not any(same([seen[a]], [seen[b]]) for a, b in [(0, 1), (0, 2), (1, 2)])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dropout_keeps_the_expectation_and_drops_a_share_of_p(p, dtype):
    x = np.full((1000, 500), 3, dtype)
    y, _ = Dropout(p, rng=0).forward(x)
    assert (y == 0).mean() == pytest.approx(p, abs=4 * (p * (1 - p) / y.size) ** 0.5)
    assert np.unique(y) == pytest.approx([0, 3 / (1 - p)], rel=1e-6)
    assert y.mean() == pytest.approx(3, rel=5 * (p / (1 - p) / y.size) ** 0.5)
    for axis in (0, 1):  # and evenly so
        assert (y == 0).mean(axis=axis) == pytest.approx(np.full(y.shape[1 - axis], p), abs=0.12)
    neighbours = np.corrcoef((y[:, 1:] == 0).ravel(), (y[:, :-1] == 0).ravel())[0, 1]
    assert abs(neighbours) < 5 / y.size**0.5


@pytest.mark.parametrize("layer", [Dropout(0.5, rng=0).eval(), Dropout(0, rng=0)], ids=["eval", "p=0"])
def test_dropout_in_eval_and_with_p_0_is_the_identity(layer):
    y, saved = layer.forward(X)
    assert np.array_equal(y, X)
    assert not np.shares_memory(y, X)
    assert np.array_equal(layer.backward(X, saved), X)
    assert not np.array_equal(Dropout(0.5, rng=0).forward(X)[0], X)
