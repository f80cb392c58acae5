"""Recording what a function does with arrays: the same numbers again, in one arena, and clear refusals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import npnet
from npnet.backend import array_module
from npnet.replay import ALIGNMENT, Program, pack
from npnet.tracing import CannotCapture, Factor, Recording

LIVES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10), st.integers(1, 9)), min_size=1, max_size=30).map(
    lambda rows: [(first, first + length, ALIGNMENT * units) for first, length, units in rows]
)


def overlapping(offsets, lives):
    """Pairs that are alive together and share bytes."""
    spans = [(start, start + size, first, last) for start, (first, last, size) in zip(offsets, lives, strict=True)]
    return [
        (a, b)
        for number, a in enumerate(spans)
        for b in spans[:number]
        if a[0] < b[1] and b[0] < a[1] and a[2] <= b[3] and b[2] <= a[3]
    ]


def most_alive(lives):
    return max(sum(size for a, b, size in lives if a <= now <= b) for now in range(50))


@given(LIVES)
def test_what_is_alive_together_never_shares_bytes(lives):
    offsets, total = pack([size for *_, size in lives], [(first, last) for first, last, _ in lives])
    assert not overlapping(offsets, lives)
    assert most_alive(lives) <= total == max(start + size for start, (*_, size) in zip(offsets, lives, strict=True))


def test_sharing_bytes_would_be_seen():
    assert overlapping([0, 0], [(0, 3, 64), (3, 5, 64)])


def test_buffers_of_one_size_are_packed_perfectly():
    lives = [(start, start + 2, 640) for start in range(50)]
    assert pack([640] * 50, [(a, b) for a, b, _ in lives])[1] == most_alive(lives)


def recorded(function, *arrays):
    """The function as a program that returns what it returned."""
    recording = Recording()
    result = function(*(recording.input(array) for array in arrays))
    out = np.zeros(result.shape, result.dtype)
    recording.call(np.copyto, recording.constant(out), result)
    program = Program(recording)

    def run(*given):
        out.fill(0)
        program(*given)
        return out.copy()

    return run, program


def in_place(x, y):
    xp = array_module(x)
    z = xp.multiply(x, y)
    xp.add(z, 1, out=z)
    xp.tanh(z, out=z)
    z *= 0.5
    z += x
    return z


FUNCTIONS = {
    "in place": in_place,
    "operators": lambda x, y: (1 - x) / (2 + y * y) - x + 3 * y - (-x),
    "products": lambda x, y: array_module(x).dot(x.T, y).T,
    "reductions": lambda x, y: x.sum(axis=1, keepdims=True) * y.mean(axis=0) - x.max(axis=1, keepdims=True) + y.sum(),
    "views": lambda x, y: array_module(x).dot(x.ravel(), y.reshape(-1)) * x.T[1:, None, ::2],
    "ravel of a transpose": lambda x, y: x.T.ravel() + y.T.ravel(order="K"),
    "einsum": lambda x, y: array_module(x).einsum("ij,ij->j", x, y),
    "casts": lambda x, y: x.astype(np.float16).astype(np.float64, order="F") * y.copy(),
    "masks": lambda x, y: array_module(x).multiply(y, array_module(x).greater(x, 0.0)),
    "limits": lambda x, y: array_module(x).maximum(x, y) - array_module(x).minimum(x, 0.25),
    "erf": lambda x, y: npnet.blocks.erf(x) + y,
    "of NumPy's name": lambda x, y: np.exp(x) + np.dot(x, y.T)[:, :1],
}


@pytest.mark.parametrize("order", ["CC", "CF", "FC", "FF"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_program_does_what_the_function_does(name, dtype, order):
    rng = np.random.default_rng(0)
    batches = [[np.array(rng.standard_normal((6, 4)), dtype, order=each) for each in order] for _ in range(3)]
    run, program = recorded(FUNCTIONS[name], *batches[0])
    for batch in batches:
        before = [array.copy() for array in batch]
        np.testing.assert_array_equal(run(*batch), FUNCTIONS[name](*batch), strict=True)
        assert all(map(np.array_equal, batch, before))
    assert len(program) > 1


def test_a_program_keeps_no_input():
    import weakref

    x = np.ones((6, 4))
    run, _ = recorded(FUNCTIONS["operators"], x, x)
    gone = weakref.ref(x)
    run(x, x)
    del x
    assert gone() is None


def test_zeros_are_zeros_at_every_replay():
    def total(x):
        sum_ = array_module(x).zeros_like(x)
        sum_ += x
        return sum_

    run, _ = recorded(total, np.ones((2, 3)))
    assert np.array_equal(run(np.ones((2, 3))), run(np.ones((2, 3))))


def test_a_factor_is_another_number_at_each_replay():
    recording, factor, x = Recording(), Factor(), np.ones(3, np.float32)
    traced = recording.constant(x)
    array_module(traced).multiply(traced, factor, out=traced)
    program = Program(recording)
    for value in (2.0, 0.1):
        factor.set(value)
        program()
    assert np.array_equal(x, np.float32(2) * np.float32(0.1) * np.ones(3, np.float32))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x if x.sum() > 0 else -x, "decides by the numbers"),
        (lambda x: x * float(x.sum()), "decides by the numbers"),
        (lambda x: list(x), "decides by the numbers"),
        (lambda x: np.asarray(x) + 1, "decides by the numbers"),
        (lambda x: npnet.to_host(x), "decides by the numbers"),
        (lambda x: x * np.random.default_rng(0).random((6, 4)), "makes an array of its own"),
        (lambda x: array_module(x).multiply(x, np.ones((6, 4))), "makes an array of its own"),
        (lambda x: x[x.buffer, :], "an index like"),
        (lambda x: x[[0, 1]], "an index like"),
        (lambda x: array_module(x).argsort(x), "numpy.argsort"),
        (lambda x: np.sort(x), "numpy.sort"),
        (lambda x: np.add.reduce(x), "with reduce"),
        (lambda x: array_module(x).bitwise_and(x, x), "numpy.bitwise_and of float64"),
    ],
)
def test_what_cannot_be_done_again_is_refused(function, words):
    with pytest.raises(CannotCapture, match=words):
        function(Recording().input(np.ones((6, 4))))


def test_rows_of_a_transpose_are_copied_by_a_call_and_not_by_a_view():
    x = Recording().input(np.ones((6, 4)))
    assert x.ravel().buffer is x.T.ravel(order="K").buffer is x.buffer
    assert x.T.reshape(-1).buffer is not x.buffer
    assert [function.__name__ for function, _ in x.recording.calls] == ["copy"]


def test_joined_buffers_lie_side_by_side():
    def whole(x, y):
        a, b = array_module(x).dot(x, y.T), x + y
        joined = x.recording.join([a, b])
        array_module(joined).multiply(joined, 3.0, out=joined)
        return joined

    x, y = np.random.default_rng(0).random((2, 6, 4))
    run, _ = recorded(whole, x, y)
    assert np.array_equal(run(x, y), 3 * np.concatenate([(x @ y.T).ravel(), (x + y).ravel()]))


def test_only_whole_buffers_are_joined():
    recording = Recording()
    x = recording.input(np.ones((6, 4)))
    a, b = x + 1, x + 2
    assert recording.join([a, a]) is None
    assert recording.join([a[:3], b]) is None
    assert recording.join([a, x]) is None
    assert recording.join([a.T, b]).shape == (48,)
    assert recording.join([a, x + 3]) is None


def test_wrong_shapes_are_refused_while_recording():
    x = Recording().input(np.ones((6, 4)))
    xp = array_module(x)
    with pytest.raises(ValueError, match=r"\(6, 4\)"):
        xp.add(x, x, out=x[:2])
    with pytest.raises(ValueError, match="do not fit"):
        xp.dot(x, x)
