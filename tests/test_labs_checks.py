"""What the labs' tests say: each mistake is named, and nothing is said where all is right."""

import math
import sys

import numpy as np
import pytest

from npnet import labs
from npnet.drawing import plot_bars

RNG = np.random.default_rng(0)
A, B, C = (RNG.normal(size=(3, 3)) for _ in range(3))
WIDE = RNG.normal(size=(2, 5))
COLUMN = RNG.normal(size=(4, 1))


def message(check, *args, **kwargs) -> str:
    with pytest.raises(AssertionError) as caught:
        check(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "array", [A, WIDE, np.zeros((2, 2)), np.array([[0.0, np.nan]]), np.empty((0, 3)), np.arange(4)]
)
def test_nothing_is_said_of_what_is_right(array, exact):
    labs.check_array(array.copy(), array, "x", exact=exact, mistakes={"never": array + 1})
    labs.check_arrays([array, array.copy()], [array, array], "x {}", exact=exact)


def test_rounding_is_right_unless_bits_are_asked():
    near = A * (1 + 1e-14)
    labs.check_array(near, A, "x")
    said = message(labs.check_array, near, A, "x", exact=True)
    assert "right up to rounding" in said
    assert "not bit for bit" in said
    labs.check_array(A * 1.01, A, "x", tolerance=0.1)


@pytest.mark.parametrize(
    ("got", "right", "words"),
    [
        (None, A, "is there a `return`?"),
        ([1.0], A, "got list"),
        (A.astype(object), A, "dtype object"),
        (A.astype(np.float32), A, "its dtype is float32, expected float64"),
        (WIDE.T, WIDE, "it is the transpose of the right one"),
        (np.ones((5, 2)), WIDE, "expected (2, 5), the transpose"),
        (COLUMN[:, 0], COLUMN, "keepdims"),
        (np.ones((4, 64)), COLUMN, "the batch axis (64) is still there"),
        (np.ones((3, 7)), COLUMN, "its shape is (3, 7), expected (4, 1)"),
        (A.T, A, "it is the transpose of the right one"),
        (-A, A, "wrong sign"),
        (64 * A, A, "64 times the right one: did you take the sum where the mean is asked (batch 64)?"),
        (A / 64, A, "1/64 times the right one: did you take the mean where the sum is asked (batch 64)?"),
        (2 * A, A, "it is 2 times the right one"),
        (1.7 * A, A, "it is 1.7 times the right one"),
        (0 * A, A, "all its numbers are 0"),
        (np.where(A > 0, A, np.nan), A, "not finite"),
        (A[::-1], A, "reverse order along axis 0"),
        (WIDE[:, ::-1], WIDE, "reverse order along axis 1"),
        (A + 1, A, "it is the right one plus 1, everywhere"),
        (A + np.eye(3), A, "3 of its 9 numbers are wrong; at [0, 0]"),
        (B, A, "that is B"),
        (np.float64(1), np.float64(3.3), "0.303 times"),
    ],
)
def test_what_is_wrong_with_an_array_is_said(got, right, words):
    said = message(labs.check_array, got, right, "nabla_w", batch=64, mistakes={"that is B": B})
    assert said.startswith("nabla_w: ")
    assert words in said


@pytest.mark.parametrize(
    ("got", "words"),
    [
        (None, "x ...: expected a list of 3 arrays, got None"),
        (A, "got ndarray of shape (3, 3)"),
        ([B, C], "expected 3 arrays, got 2: the first is missing"),
        ([A, B], "got 2: the last is missing"),
        ([B], "expected 3 arrays, got 1"),
        ([], "got 0"),
        ([A, A, B, C], "one too many at the beginning"),
        ([A, B, C, C], "one too many at the end"),
        ([C, B, A], "reverse order"),
        ([B, C, A], "shifted by one place"),
        ([A, A, C], "x 1 and 2: the same array object"),
        ([A, B.T, C], "x 2: it is the transpose"),
        ([A, None, C], "x 2: expected an array"),
        ([A, B + A, C + A], "x 2: 9 of its 9"),
    ],
)
def test_what_is_wrong_with_a_list_is_said(got, words):
    assert words in message(labs.check_arrays, got, [A, B, C], "x {}")


def test_a_backward_pass_is_looked_through_from_its_end():
    said = message(labs.check_arrays, [A, A + B, C + A], [A, B, C], "x {}", backwards=True, hints={3: "Look there."})
    assert said.startswith("x 3: ")
    assert said.endswith("Look there.")
    assert "Look" not in message(labs.check_arrays, [A, A + B, C], [A, B, C], "x {}", hints={3: "Look there."})


@pytest.mark.parametrize(
    ("got", "words"),
    [
        (None, "expected a number, got None"),
        ("12", "got str"),
        (True, "got bool"),
        (np.arange(3), "got ndarray"),
        (11, "you say 11, it is 12: one too few"),
        (13, "one too many"),
        (-12, "the sign is wrong"),
        (24, "2 times the right number"),
        (4.0, "1/3 times"),
        (77, "you say 77, it is 12. You add instead"),
        (78, "you say 78, it is 12"),
    ],
)
def test_what_is_wrong_with_a_number_is_said(got, words):
    said = message(labs.check_number, got, 12, "n", mistakes={"You add instead": 77})
    assert said.startswith("n: ")
    assert words in said


def test_right_numbers():
    for number in (12, 12.0, np.int64(12), np.array(12)):
        labs.check_number(number, 12, "n", mistakes={"never": 12})
    labs.check_number(1.0001, 1, "n", tolerance=1e-3)


def test_numbers_that_differ_are_not_printed_alike():
    said = message(labs.check_number, 2.0**24, 2.0**24 + 4, "the sum")
    assert said == "the sum: you say 16777216.0, it is 16777220.0"


def test_changes_are_noticed():
    x, others = A.copy(), [B.copy(), C.copy()]
    with labs.unchanged(x=x, others=others):
        x + others[0]
    with pytest.raises(AssertionError, match="your code changes others"), labs.unchanged(x=x, others=others):
        others[1] += 1
    with pytest.raises(AssertionError, match="your code changes x"), labs.unchanged(x=x):
        x[0, 0] = 3


def test_calls_are_counted():
    namespace = {"f": lambda x: x + 1}
    original = namespace["f"]
    with labs.counting(namespace, "f") as calls:
        assert namespace["f"](1) == 2
        namespace["f"](5)
    assert calls == [(1,), (5,)]
    assert namespace["f"] is original
    labs.check_calls(42, 42, "forwards")
    mistakes = {"you recompute the last layer of each segment": 50}
    words = "you recompute the last layer of each segment: 50 forwards, 42 suffice"
    assert message(labs.check_calls, 50, 42, "forwards", mistakes) == words
    assert "more than you need: 47 forwards" in message(labs.check_calls, 47, 42, "forwards", mistakes)
    assert "n = 7: something is left out" in message(labs.check_calls, 3, 42, "forwards", mistakes, name="n = 7")


def test_peaks_are_compared():
    like = np.ones(1)
    assert 8e5 <= labs.check_peak(lambda: np.ones(100_000), 9e5, "the peak of f", like=like) < 9e5
    mistakes = {"a little": 1e5, "all of it": 7e5, "more": 1e7}
    said = message(labs.check_peak, lambda: np.ones(100_000), 1e5, "the peak of f", mistakes, like=like)
    assert said.startswith("the peak of f is 800 kB, 100 kB suffice: all of it")
    assert message(labs.check_peak, lambda: np.ones(100_000), 1e5, "it", like=like).endswith("suffice")


@pytest.mark.parametrize(
    ("got", "words"),
    [
        (None, "expected 2 things, got None (is there a `return`?)"),
        (0.0, "expected 2 things, got float"),
        (A, "expected 2 things, got ndarray of shape (3, 3)"),
        ((A, A), "expected 2 things, got ndarray of shape (3, 3)"),
        ((0.7,), "expected 2 things, got 1"),
        (([A, B], A), "expected a number, got ndarray of shape (3, 3)"),
        (([A, None], 0.7), "None stands in the place of an array"),
        (([], 0.7), "expected 2 things, got 0"),
        (([A, 0.0], 0.7), "expected an array, got float"),
        (([A, 0 * A], 0.7), "all its numbers are 0"),
        (([A, B], 0.0), "all its numbers are 0"),
        (([A, B], np.float32(0)), "all its numbers are 0"),
    ],
)
def test_what_computes_nothing_is_not_measured(got, words):
    like = ([A, B], 1.0)
    assert words in message(labs.check_computed, got, like, "f")
    said = message(labs.check_peak, lambda: got, 1e9, "the peak of f", like=like)
    assert said.startswith("the peak of f is that of a function that computes nothing: ")
    assert said.endswith(words)


def test_what_is_computed_may_be_wrong():
    for got in (([A, B], 1.0), ([B.T, -A], 64), [(WIDE, A, C), np.float32(3)]):
        labs.check_computed(got, ([A, B], 1.0), "f")
    labs.check_computed((A, []), (B, []), "f")


def test_errors_are_told_in_a_sentence():
    def stop():
        with labs.told("f"):
            A @ WIDE

    said = message(stop)
    assert said.startswith("f stopped with ValueError: matmul")
    assert "transpose" in said
    with pytest.raises(AssertionError, match="return as many things as the task asks for"), labs.told("f"):
        _, _ = iter([A])
    with pytest.raises(NotImplementedError), labs.told("f"):
        raise NotImplementedError
    with pytest.raises(AssertionError, match=r"^mine$"), labs.told("f"):
        raise AssertionError("mine")
    with pytest.raises(AssertionError, match=r"f stopped with KeyError: 3$"), labs.told("f"):
        {}[3]


def test_numbers_may_be_infinite():
    labs.check_number(math.inf, math.inf, "n")
    assert message(labs.check_number, math.inf, 12, "n") == "n: you say inf, it is 12"
    assert message(labs.check_number, 12, math.inf, "n") == "n: you say 12, it is inf"
    assert message(labs.check_number, math.nan, 12, "n") == "n: you say nan, it is 12"


class Screen:
    """IPython's display, and what was shown."""

    def __init__(self):
        self.shown = []

    def display(self, *things):
        self.shown += things

    @staticmethod
    def Image(data):  # noqa: N802 - IPython's name
        return data

    HTML = Image


class Widgets:
    """ipywidgets, as far as sliders go."""

    @staticmethod
    def SelectionSlider(**options):  # noqa: N802 - its name
        return options

    @staticmethod
    def interactive_output(show, controls):
        show(controls["chosen"]["value"])
        return "output"


@pytest.fixture
def screen(monkeypatch):
    for name in ("NPNET_STATIC", "NBGRADER_EXECUTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "IPython.display", Screen())
    return sys.modules["IPython.display"]


def bars(n):
    return plot_bars({"a": 1.0, "b": n})


@pytest.mark.parametrize("why", ["NPNET_STATIC", "NBGRADER_EXECUTION", "no ipywidgets"])
def test_a_slider_is_a_picture_where_nothing_can_slide(screen, monkeypatch, capsys, why):
    monkeypatch.setitem(sys.modules, "ipywidgets", None if why == "no ipywidgets" else Widgets())
    if why != "no ipywidgets":
        monkeypatch.setenv(why, "autograde")
    assert labs.grading() == (why == "NBGRADER_EXECUTION")
    labs.slider(bars, [1, 2, 4], "n", value=2)
    (picture,) = screen.shown
    assert picture.startswith(b"\x89PNG")
    assert "n = 2" in capsys.readouterr().out


def test_a_slider_slides(screen, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", Widgets())
    labs.slider(lambda n: bars(n).figure, [1, 2, 4], "n")
    picture, chooser, output = screen.shown
    assert picture.startswith(b"\x89PNG")
    assert (chooser["options"], chooser["value"], output) == ([1, 2, 4], 1, "output")


class Animation:
    """An animation, as far as a page goes."""

    def to_jshtml(self, default_mode):
        return f"<p>{default_mode}</p>"


@pytest.mark.parametrize("why", ["NPNET_STATIC", "NBGRADER_EXECUTION"])
def test_an_animation_is_a_picture_where_nobody_plays_it(screen, monkeypatch, why):
    monkeypatch.setenv(why, "autograde")
    labs.play(Animation, lambda: bars(2))
    (picture,) = screen.shown
    assert picture.startswith(b"\x89PNG")


def test_an_animation_is_played(screen):
    labs.play(Animation, lambda: bars(2))
    assert screen.shown == ["<p>once</p>"]
