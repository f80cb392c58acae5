"""checkpoint() and checkpoint_sequential(): the same numbers as without, only inputs kept, and noise that is caught."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npnet
from npnet import schedules
from npnet.blocks import GELU, Dropout, LayerNorm, Residual
from npnet.checkpoint import backpropagate, checkpoint, checkpoint_sequential
from npnet.layer import Layer, needs_saved
from npnet.layers import Dense, Sequential
from npnet.random import one_step
from npnet.schedule import Schedule
from tests.test_checkpoint import cotangent, equal, taken
from tests.test_schedules import valid_actions

WIDTH = 6


def bare(layer):
    return layer


def dense(rng, inputs=WIDTH, outputs=WIDTH, activation="tanh"):
    layer = Dense(inputs, outputs, activation, dtype=np.float64, rng=rng)
    layer.bias.value += 0.1
    return layer


KINDS = {
    "dense": lambda rng, wrap: dense(rng),
    "softmax": lambda rng, wrap: dense(rng, activation="softmax"),
    "norm": lambda rng, wrap: LayerNorm(WIDTH, dtype=np.float64),
    "gelu": lambda rng, wrap: GELU(),
    "gelu-tanh": lambda rng, wrap: GELU("tanh"),
    "dropout": lambda rng, wrap: Dropout(0.4, rng=rng),
    "residual": lambda rng, wrap: Residual(wrap(Sequential(dense(rng), Dropout(0.3, rng=rng), dense(rng)))),
    "part": lambda rng, wrap: wrap(Sequential(Dropout(0.2, rng=rng), dense(rng), GELU("tanh"), Dropout(0.5, rng=rng))),
    "nested": lambda rng, wrap: wrap(Sequential(dense(rng), wrap(Residual(wrap(Dropout(0.3, rng=rng)))), dense(rng))),
    "one": lambda rng, wrap: wrap(dense(rng)),
}


def mixed(kinds, wrap, seed=0):
    """A chain of layers of these kinds between two dense ones, its parts wrapped; the numbers do not depend on that."""
    rng = np.random.default_rng(seed)
    return [dense(rng, 4), *(KINDS[kind](rng, wrap) for kind in kinds), dense(rng, outputs=3)]


def batch_of(size, features=4):
    return np.random.default_rng(size).standard_normal((size, features))


def by_hand(model, x, step=7):
    """The output, dx and all gradients, in one step, with no engine."""
    with one_step(step):
        y, saved = model.forward(x)
    dx = model.backward(cotangent(y), saved)  # when the step is over: what it takes has been kept
    return [y, dx, *taken([model])]


def engine(layers, schedule, x, step=7, **options):
    outputs = []

    def output_gradient(y):
        outputs.append(y)
        return cotangent(y)

    with one_step(step):
        dx = backpropagate(layers, schedule, x, output_gradient, needs_dx=True, **options)
    return [*outputs, dx, *taken(layers)]


class Counted(Layer):
    """y = x + 1, and how often that was computed."""

    output_suffices = True

    def __init__(self):
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return x + 1, (x, None)

    def backward(self, dy, saved):
        return dy.copy()


WRAPPED = {
    "each part": lambda layers: Sequential(*layers),
    "the whole": lambda layers: checkpoint(Sequential(*layers)),
    "the whole, twice": lambda layers: checkpoint(checkpoint(Sequential(*layers))),
    "halves": lambda layers: Sequential(checkpoint(Sequential(*layers[:5])), checkpoint(Sequential(*layers[5:]))),
    "halves in a whole": lambda layers: checkpoint(Sequential(checkpoint(Sequential(*layers[:4])), *layers[4:])),
}


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_by_hand_a_checkpointed_model_gives_the_bits_of_the_model_without(wrap, batch, mode):
    x = batch_of(batch)
    expected = by_hand(Sequential(*mixed(KINDS, bare)).train(mode), x)
    model = wrap(mixed(KINDS, checkpoint)).train(mode)
    assert equal(by_hand(model, x), expected)
    if mode:
        assert not equal(by_hand(model, x, step=8), expected)  # the dropout is there


kinds_of_chains = st.lists(st.sampled_from(sorted(KINDS)), min_size=0, max_size=6)


@given(kinds_of_chains, st.integers(1, 4), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=60)
def test_under_every_named_schedule_parts_give_the_bits_of_plain_backpropagation(kinds, batch, seed, data):
    x, layers = batch_of(batch), mixed(kinds, checkpoint, seed)
    expected, depth, saving = by_hand(Sequential(*mixed(kinds, bare, seed)), x), len(layers), needs_saved(layers)
    chosen = data.draw(st.sets(st.integers(1, depth)))
    for schedule in (
        schedules.none(depth, saving),
        schedules.every_nth(depth, data.draw(st.integers(0, depth)), saving),
        schedules.revolve(depth, data.draw(st.integers(2, depth)), saving),
        schedules.selective(depth, chosen, saving),
    ):
        assert equal(engine(layers, schedule, x), expected)
        assert equal(engine(layers, schedule, x, determinism_check=True), expected)


@given(valid_actions(offloads=False), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=60)
def test_under_any_valid_schedule_parts_give_the_bits_of_plain_backpropagation(given_list, seed, data):
    actions, depth = given_list
    kinds, x = data.draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=depth, max_size=depth)), batch_of(3)
    plain, layers = (mixed(kinds, wrap, seed)[: depth + 1] for wrap in (bare, checkpoint))
    layers = [Sequential(*layers[:2]), *layers[2:]]  # as deep as the schedule, from 4 features on
    schedule = Schedule(actions, depth, needs_saved=needs_saved(layers))
    assert equal(engine(layers, schedule, x), by_hand(Sequential(*plain), x))


def test_a_part_runs_again_for_its_backward_pass_while_training_and_only_then():
    layers = [Counted() for _ in range(3)]
    model = Sequential(layers[0], checkpoint(Sequential(layers[1], checkpoint(layers[2]))))
    for mode, runs in ((True, [1, 2, 3]), (False, [1, 1, 1])):
        for layer in layers:
            layer.runs = 0
        by_hand(model.train(mode), batch_of(2))
        assert [layer.runs for layer in layers] == runs


@pytest.mark.parametrize("segments", range(1, 8))
@pytest.mark.parametrize("as_list", [True, False])
def test_segments_are_pytorchs_and_all_but_the_last_run_twice(segments, as_list):
    layers = [Counted() for _ in range(7)]
    functions = layers if as_list else Sequential(*layers)
    y, tape = checkpoint_sequential(functions, segments, batch_of(2))
    assert np.array_equal(y, batch_of(2) + 1 + 1 + 1 + 1 + 1 + 1 + 1)
    assert [layer.runs for layer in layers] == [1] * 7
    assert np.array_equal(tape.backward(np.ones_like(y)), np.ones_like(y))
    twice = 7 // segments * (segments - 1)
    assert [layer.runs for layer in layers] == [2] * twice + [1] * (7 - twice)


@pytest.mark.parametrize("segments", range(1, 13))
def test_checkpoint_sequential_gives_the_bits_of_the_model_without(segments):
    plain, layers, x = mixed(KINDS, bare), mixed(KINDS, checkpoint), batch_of(5)
    with one_step(7):
        y, tape = checkpoint_sequential(layers, segments, x)
    dx = tape.backward(cotangent(y))
    assert equal([y, dx, *taken(layers)], by_hand(Sequential(*plain), x))


def test_an_overflow_inside_a_sigmoid_is_no_warning():
    dense = npnet.Dense(3, 3, "sigmoid", initializer=lambda shape, _: np.full(shape, -1e4), dtype=np.float64)
    y, tape = checkpoint_sequential([dense, npnet.Tanh(), npnet.Tanh()], 3, np.ones((2, 3)))
    tape.backward(np.ones_like(y))


def test_a_tape_frees_what_it_has_used_and_serves_once():
    layers, x = npnet.mlp([64] * 17, rng=0).layers, np.ones((1000, 64), np.float32)

    def peak(segments):
        def step():
            y, tape = checkpoint_sequential(layers, segments, x)
            tape.backward(np.ones_like(y))

        return npnet.measure_peak(step).increase_bytes / x.nbytes

    peak(4)
    assert peak(4) < 0.6 * peak(1)
    y, tape = checkpoint_sequential(layers, 4, x)
    with pytest.raises(ValueError, match="shape"):
        tape.backward(np.ones((3, 64), np.float32))
    tape.backward(np.ones_like(y))
    with pytest.raises(RuntimeError, match="has been used"):
        tape.backward(np.ones_like(y))


@pytest.mark.parametrize(
    ("segments", "error", "message"),
    [
        (4, ValueError, "segments: 4 are more than the 3 layers"),
        (0, ValueError, "segments: expected a whole number, at least 1, got 0"),
        (-1, ValueError, "segments: expected a whole number, at least 1, got -1"),
        (1.5, TypeError, "segments: expected a whole number, at least 1, got 1.5"),
        (True, TypeError, "segments: expected a whole number, at least 1, got True"),
        ("2", TypeError, "segments: expected a whole number, at least 1, got '2'"),
    ],
)
def test_segments_that_cannot_be_are_refused(segments, error, message):
    with pytest.raises(error, match=message):
        checkpoint_sequential([Counted() for _ in range(3)], segments, batch_of(2))


def test_a_part_that_is_no_layer_is_refused():
    for make in (checkpoint, lambda part: checkpoint_sequential([Counted(), part], 1, batch_of(2))):
        with pytest.raises(TypeError, match=r"expected (a layer|layers), got 3"):
            make(3)


@pytest.mark.parametrize("p", [0.5, 0])
def test_without_the_state_of_the_random_numbers_the_gradient_is_another_functions_wherever_some_are_drawn(p):
    def layers():
        rng = np.random.default_rng(0)
        return [dense(rng, 4), Dropout(p, rng=rng), dense(rng)]

    x = batch_of(5)
    expected = by_hand(Sequential(*layers()), x)
    parts = [checkpoint(Sequential(*layers()), preserve_rng_state=preserve) for preserve in (True, False)]
    ours = [by_hand(part, x) for part in parts]
    for number, preserve in enumerate((True, False)):
        chain = layers()
        with one_step(7):
            y, tape = checkpoint_sequential(chain, 3, x, preserve_rng_state=preserve)
        for found in (ours[number], [y, tape.backward(cotangent(y)), *taken(chain)]):
            assert np.array_equal(found[0], expected[0])
            assert equal(found[1:], expected[1:]) == (preserve or not p)


def test_fit_trains_a_model_with_parts_to_the_weights_of_the_model_without(monkeypatch):
    weights = []
    for wrap in (bare, checkpoint):
        monkeypatch.setattr(npnet.random._state, "next_step", 0)
        model = Sequential(*mixed(["part", "nested"], wrap))
        settings = {"loss": npnet.MeanSquaredError(), "optimizer": npnet.SGD(0.1), "epochs": 1, "batch_size": 8}
        npnet.fit(model, (batch_of(24), batch_of(24, 3)), rng=0, log=False, **settings)
        weights.append([parameter.value for parameter in model.parameters()])
    assert equal(*weights)
