"""Activations out of memory and back: the same numbers, less memory, and nothing left behind."""

import errno
import os
import tempfile
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npnet
from npnet import Dense, Dropout, LayerNorm, Linear, Residual, Sequential, schedules
from npnet.backend import to_backend, to_host
from npnet.layer import needs_saved
from npnet.offload import OffloadError, Store, borrowed_store
from npnet.schedule import BACKWARD, DROP, FETCH, FORWARD, OFFLOAD, InvalidSchedule, Schedule
from tests.guard import install_guard


def chain(depth, dtype="float32", backend=None):
    return npnet.mlp([7, *[5] * (depth - 1), 3], "tanh", dtype=dtype, rng=0, backend=backend)


def blocks():
    """Layers whose outputs do not suffice among them."""
    rng = np.random.default_rng(0)
    inner = Sequential(Linear(6, 6, rng=rng), npnet.GELU("tanh"), Linear(6, 6, rng=rng))
    middle = [
        layer
        for _ in range(3)
        for layer in (Dense(6, 6, "tanh", rng=rng), Dropout(0.3, rng=rng), LayerNorm(6), npnet.GELU("tanh"))
    ]
    return Sequential(Dense(7, 6, rng=rng), *middle, Residual(inner), Linear(6, 3, rng=rng))


def batch(rows=9, dtype="float32"):
    rng = np.random.default_rng(1)
    return rng.standard_normal((rows, 7)).astype(dtype), rng.standard_normal((rows, 3)).astype(dtype)


def gradients(model, schedule, rows=9):
    npnet.set_seed(3)
    dtype = next(iter(model.parameters())).value.dtype
    return npnet.value_and_grad(model, npnet.Quadratic(), *batch(rows, dtype), schedule=schedule)


def assert_same(first, second):
    assert first[0] == second[0]
    for name in first[1]:
        np.testing.assert_array_equal(first[1][name], second[1][name], strict=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("depth", range(1, 10))
def test_the_gradient_is_that_of_plain_backpropagation_bit_for_bit(depth, rows, dtype):
    plain = gradients(chain(depth, dtype), "none", rows)
    for n in range(1, depth + 2):
        for most in (None, 0, 1, 2):
            assert_same(plain, gradients(chain(depth, dtype), schedules.offloaded(depth, n, most), rows))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 20])
def test_with_layers_that_need_what_they_saved(n):
    layers = blocks().layers
    schedule = schedules.offloaded(len(layers), n, needs_saved=needs_saved(layers))
    assert schedule.offloads == (n < 10)
    assert_same(gradients(blocks(), "none"), gradients(blocks(), schedule))


def test_a_store_that_gives_other_numbers_would_be_seen(monkeypatch):
    right = Store.get
    monkeypatch.setattr(Store, "get", lambda self, number: right(self, number) + np.float32(1e-6))
    with pytest.raises(AssertionError):
        assert_same(gradients(chain(6), "none"), gradients(chain(6), "offload"))


@given(st.integers(1, 12), st.integers(1, 14), st.none() | st.integers(0, 12), st.sets(st.integers(1, 12)))
def test_every_schedule_that_is_made_can_be_executed(depth, n, most, saved):
    saved = {layer for layer in saved if layer <= depth}
    schedule = schedules.offloaded(depth, n, most, saved)
    kinds = [action.kind for action in schedule]
    assert kinds.count(OFFLOAD) == kinds.count(FETCH) <= max(0, (depth - 1) // n - 1)
    if not saved:
        assert schedule.extra_forwards == schedules.every_nth(depth, n).extra_forwards
    lines = schedule.diagram().splitlines()
    assert len(lines) == len(schedule) + 1
    assert sum(line.count("<") for line in lines) == kinds.count(FETCH)


WRONG = {
    "a_1 is not held": [(OFFLOAD, 1)],
    "a_1 is not offloaded": [(FORWARD, 1), (FETCH, 1)],
    "a_1 is offloaded: fetch it": [(FORWARD, 1), (OFFLOAD, 1), (FORWARD, 1)],
    "its input a_1 is not held": [(FORWARD, 1), (OFFLOAD, 1), (FORWARD, 2)],
    "it needs a_1 and a_2, and a_1 is not held": [(FORWARD, 1), (FORWARD, 2), (OFFLOAD, 1), (BACKWARD, 2)],
}


@pytest.mark.parametrize("words", WRONG)
def test_a_list_that_cannot_be_executed_is_refused(words):
    with pytest.raises(InvalidSchedule, match=words):
        Schedule(WRONG[words], 2)


def test_what_is_left_outside_is_refused():
    actions = [*schedules.none(3)][:3]
    with pytest.raises(InvalidSchedule, match="has no backward pass"):
        Schedule([*actions, (OFFLOAD, 1)], 3)
    all_of_it = [*actions, (OFFLOAD, 1), (BACKWARD, 3), (FETCH, 1), (BACKWARD, 2)]
    Schedule([*all_of_it, (BACKWARD, 1)], 3)
    with pytest.raises(InvalidSchedule, match="not held"):
        Schedule([*all_of_it, (OFFLOAD, 1), (BACKWARD, 1)], 3)


def test_what_a_layer_saved_cannot_go_out():
    actions = [(FORWARD, 1), (FORWARD, 2), (OFFLOAD, 1), (BACKWARD, 2), (FETCH, 1), (BACKWARD, 1)]
    with pytest.raises(InvalidSchedule):
        Schedule(actions, 2)
    actions = [(FORWARD, 1), (FORWARD, 2), (FORWARD, 3), (OFFLOAD, 1), (BACKWARD, 3), (FETCH, 1), (BACKWARD, 2)]
    Schedule([*actions, (BACKWARD, 1)], 3)
    with pytest.raises(InvalidSchedule, match=r"layer 1 needs what it saved, too: drop a_1"):
        Schedule([*actions, (BACKWARD, 1)], 3, needs_saved=[1])


@pytest.mark.parametrize("strategy", [1, 2, 4])
def test_the_peak_is_the_one_predicted(strategy):
    model, loss, optimizer = npnet.mlp([64, *[96] * 20, 10], "tanh", rng=0), npnet.Quadratic(), npnet.SGD(0.1)
    schedule = schedules.offloaded(21, strategy)
    rng = np.random.default_rng(0)
    x, y = rng.random((1024, 64), np.float32), np.eye(10, dtype=np.float32)[rng.integers(0, 10, 1024)]
    planned = npnet.plan(model, 1024, strategy=schedule, loss=loss)
    step = (npnet.train_step, model, loss, optimizer, schedule, x, y)
    npnet.measure_peak(*step)
    peak = npnet.measure_peak(*step).increase_bytes
    assert abs(peak - (planned.peak_bytes - planned.chain.fixed)) < 0.01 * planned.peak_bytes + 16384
    plain = npnet.plan(model, 1024, loss=loss)
    assert peak < 0.5 * (plain.peak_bytes - plain.chain.fixed)
    assert planned.chain.moved_bytes(schedule) == len(range(strategy, 21, strategy)[:-1]) * 1024 * 96 * 4


def test_for_a_budget_as_little_as_possible_goes_out():
    model = npnet.mlp([64, *[96] * 20, 10], "tanh", rng=0)
    plain, least = npnet.plan(model, 256), npnet.plan(model, 256, strategy="offload")
    moved = []
    for budget in np.linspace(least.peak_bytes, plain.peak_bytes, 7).astype(int):
        plan = npnet.plan(model, 256, strategy="offload", memory_budget=int(budget))
        assert plan.peak_bytes <= budget
        assert plan.extra_forwards == 0
        moved.append(plan.chain.moved_bytes(plan.schedule))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] == 0 < moved[0]
    assert "moved out of memory on the way up, and back when needed: the outputs of layers 1-" in least.describe()
    with pytest.raises(npnet.InfeasibleBudget, match="of this strategy"):
        npnet.plan(model, 256, strategy="offload", memory_budget=least.peak_bytes - 1000)


def test_training_is_the_same(tmp_path):
    x, y = batch(40)
    results = []
    for schedule in ("none", "offload"):
        model = chain(8)
        npnet.fit(
            model,
            (x, y),
            loss=npnet.Quadratic(),
            optimizer=npnet.Adam(),
            epochs=2,
            batch_size=16,
            schedule=schedule,
            rng=0,
            log=False,
        )
        results.append(model.state_dict())
    assert all(np.array_equal(results[0][name], results[1][name]) for name in results[0])


@settings(max_examples=60)
@given(st.data())
def test_a_store_gives_back_what_it_took(data):
    store, expected = Store(), {}
    for number in range(data.draw(st.integers(1, 8))):
        shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
        array = np.arange(np.prod(shape, dtype=int) * 2).astype(data.draw(st.sampled_from(["f2", "f4", "f8", "?"])))
        array = array.reshape([*shape, 2])[..., 0] if data.draw(st.booleans()) else array[::2].reshape(shape, order="F")
        array = np.asarray(array)
        store.put(number, array)
        expected[number] = array.copy(order="K")
        if data.draw(st.booleans()):
            taken = data.draw(st.sampled_from(sorted(expected)))
            np.testing.assert_array_equal(store.get(taken), expected.pop(taken), strict=True)
    for number in data.draw(st.permutations(sorted(expected))):
        np.testing.assert_array_equal(store.get(number), expected[number], strict=True)
    assert not len(store)


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_layout_is_kept(order):
    store = Store()
    store.put(1, np.asarray(np.random.default_rng(0).random((4, 3)), order=order))
    assert store.get(1).flags[f"{order}_CONTIGUOUS"]


def test_no_file_has_a_name_and_the_space_is_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("npnet.offload._stores", type("Fresh", (), {"free": []})())
    for _ in range(3):
        gradients(chain(12), "offload")
    assert not list(tmp_path.iterdir())
    with borrowed_store() as store:
        assert store._file is not None
        assert os.fstat(store._file.fileno()).st_size == 10 * 9 * 5 * 4


@pytest.mark.parametrize("call", ["write", "readinto"])
def test_a_disk_that_fails_is_named_and_changes_nothing(call, monkeypatch):
    class Failing:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            if name == call:
                raise OSError(errno.ENOSPC if call == "write" else errno.EIO, os.strerror(errno.EIO))
            return getattr(self.file, name)

    model, (x, y) = chain(6), batch()
    before = model.state_dict()
    right = tempfile.TemporaryFile
    monkeypatch.setattr("npnet.offload._stores", type("Fresh", (), {"free": []})())
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *args, **options: Failing(right(*args, **options)))
    words = "cannot be offloaded to .* TMPDIR" if call == "write" else "cannot be read"
    with pytest.raises(OffloadError, match=words):
        npnet.add_gradients(model, npnet.Quadratic(), x, y, schedule="offload")
    assert all(parameter.gradient is None for parameter in model.parameters())
    assert all(np.array_equal(before[name], array) for name, array in model.state_dict().items())
    monkeypatch.undo()
    assert_same(gradients(chain(6), "none"), gradients(model, "offload"))


def test_a_file_that_was_cut_is_noticed():
    store = Store()
    store.put(1, np.ones(1000))
    os.truncate(store._file.fileno(), 100)
    with pytest.raises(OffloadError, match="shorter"):
        store.get(1)


def test_threads_have_stores_of_their_own():
    plain, found = gradients(chain(9), "none"), {}

    def work(number):
        found[number] = [gradients(chain(9), "offload") for _ in range(10)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results in found.values():
        for each in results:
            assert_same(plain, each)


def test_from_a_device_without_pinned_memory_activations_go_to_a_file():
    plain = gradients(chain(6), "none")
    with install_guard():
        x, y = (to_backend(each, "guard") for each in batch())
        _, found = npnet.value_and_grad(chain(6, backend="guard"), npnet.Quadratic(), x, y, schedule="offload")
        for name, array in plain[1].items():
            np.testing.assert_allclose(to_host(found[name]), array, rtol=1e-5)


def test_what_cannot_be_offloaded_is_refused_in_words():
    model, (x, y) = chain(6), batch()
    vector = {name: array.copy() for name, array in model.state_dict().items()}
    with pytest.raises(TypeError, match="a Dual cannot be offloaded: take a schedule that does not"):
        npnet.hessian_vector_product(model, npnet.Quadratic(), x, y, vector, schedule="offload")
    with pytest.raises(npnet.CannotCapture, match="moves activations out of memory"):
        npnet.CapturedStep(model, npnet.Quadratic(), npnet.SGD(0.1), "offload")(x, y)
    with pytest.raises(ValueError, match="n: "):
        schedules.offloaded(5, 0)
    with pytest.raises(ValueError, match="most: "):
        schedules.offloaded(5, 1, -1)


def test_a_drop_frees_what_was_fetched():
    actions = [
        *[(FORWARD, 1), (FORWARD, 2), (FORWARD, 3), (OFFLOAD, 1), (BACKWARD, 3), (FETCH, 1), (DROP, 1), (FORWARD, 1)],
        *[(BACKWARD, 2), (BACKWARD, 1)],
    ]
    assert_same(gradients(chain(3), "none"), gradients(chain(3), Schedule(actions, 3)))
