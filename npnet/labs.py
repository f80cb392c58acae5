"""What the tests in the labs call: they compare, and say *what* is wrong in one sentence, by an AssertionError.

What may be wrong with any array, `npnet.diagnosis` knows: transposed, 64 times too large, in reverse. A lab adds its
own reasons, as ``mistakes``: what a typical wrong formula gives, and the words for whoever arrives there.
"""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Any

import numpy as np

from npnet.diagnosis import Mistakes, kind_of, same, same_all, told_factor, why_idle, why_wrong
from npnet.memory import format_bytes, measure_peak


def check_array(
    got: Any,
    right: Any,
    name: str,
    *,
    exact: bool = False,
    batch: int | None = None,
    mistakes: Mistakes | None = None,
    tolerance: float = 1e-8,
) -> None:
    """Compare an array with the right one.

    Args:
        got: the student's.
        right: the right one.
        name: what the array is, for the message: "the gradient of layer 3".
        exact: bit for bit; otherwise up to ``tolerance``, relative to the largest number of the right one.
        batch: the size of the batch: whether a sum was taken for a mean, or the reverse, is then said in these words.
        mistakes: looked up when the numbers are wrong.

    Raises:
        AssertionError: it is another one; the message says what is wrong with it.
    """
    _fail_if(why_wrong(got, np.asarray(right), exact, batch, mistakes, tolerance), name)


def check_arrays(
    got: Any,
    right: Sequence[Any],
    name: str,
    *,
    first: int = 1,
    backwards: bool = False,
    hints: Mapping[int, str] | None = None,
    **how: Any,
) -> None:
    """Compare a list of arrays with the right one, and say which array is wrong, and how.

    Args:
        got, right: one array a layer, say.
        name: what each array is, with a place for its number: "the gradient of layer {}".
        first: the number of the first array.
        backwards: compare the last array first, as a backward pass computes them: where it goes wrong, all that follows
            does, too.
        hints: what to say of the array with this number, when it is the first that is wrong.
        how: as for `check_array`.

    Raises:
        AssertionError: the list is no list, too long or short, reversed, shifted, holds one array twice, or an array
            in it is wrong.
    """
    every = name.format("...")
    if not isinstance(got, (list, tuple)):
        _fail_if(f"expected a list of {len(right)} arrays, got {kind_of(got)}", every)
    if len(got) != len(right):
        reason = f"expected {len(right)} arrays, got {len(got)}"
        if got and same_all(got, right[1:]):
            reason += ": the first is missing"
        elif got and same_all(got, right[:-1]):
            reason += ": the last is missing"
        elif right and same_all(got[1:], right):
            reason += ": there is one too many at the beginning"
        elif right and same_all(got[:-1], right):
            reason += ": there is one too many at the end"
        _fail_if(reason, every)
    if not same_all(got, right) and len(right) > 1:
        for i, array in enumerate(got):
            for j in range(i):
                if array is got[j] and isinstance(array, np.ndarray) and not same(right[i], right[j]):
                    numbers = f"{first + j} and {first + i}"
                    _fail_if(
                        "the same array object stands there twice: make a new array each time", name.format(numbers)
                    )
        if same_all(got, list(reversed(right))):
            _fail_if("the list is in reverse order", every)
        if same_all(got[1:], right[:-1]) or same_all(got[:-1], right[1:]):
            _fail_if("the list is shifted by one place", every)
    for i in reversed(range(len(right))) if backwards else range(len(right)):
        reason, hint = why_wrong(got[i], np.asarray(right[i]), **how), (hints or {}).get(first + i, "")
        _fail_if(reason and f"{reason}{hint and '. '}{hint}", name.format(first + i))


def check_number(
    got: Any, right: float, name: str, *, mistakes: Mistakes | None = None, tolerance: float = 0.0
) -> None:
    """Compare a number with the right one, exactly unless there is a (relative) ``tolerance``.

    Raises:
        AssertionError: it is no number, or another one.
    """
    if isinstance(got, np.ndarray) and got.ndim == 0:
        got = got[()]
    if got is None or isinstance(got, (bool, np.bool_)) or not isinstance(got, (int, float, np.number)):
        _fail_if(f"expected a number, got {kind_of(got)}", name)

    def close(number: float) -> bool:
        return bool(got == number or abs(got - number) <= tolerance * abs(number))  # both may be infinite

    if close(right):
        return
    said, truth = _plain(got), _plain(right)
    if said == truth:  # they differ behind the digits that are printed
        said, truth = repr(float(got)), repr(float(right))
    reason = f"you say {said}, it is {truth}"
    for words, wrong in (mistakes or {}).items():
        if close(wrong):
            _fail_if(f"{reason}. {words}", name)
    ratio = got / right if right and np.isfinite(got) else 0.0
    if got == -right:
        reason += ": the sign is wrong"
    elif abs(got - right) == 1:
        reason += f": one too {'many' if got > right else 'few'}"
    elif ratio and told_factor(ratio):
        reason += f": {told_factor(ratio)} the right number"
    _fail_if(reason, name)


@contextmanager
def unchanged(**arrays: Any) -> Iterator[None]:
    """See to it that what runs meanwhile does not change ``arrays`` (or lists of arrays), given by name.

    Raises:
        AssertionError: one was changed, with its name.
    """
    before = {name: _copied(value) for name, value in arrays.items()}
    yield
    for name, value in arrays.items():
        after = value if isinstance(value, (list, tuple)) else [value]
        if len(after) != len(before[name]) or not all(map(np.array_equal, after, before[name])):
            raise AssertionError(f"your code changes {name}, which belongs to the caller: compute into a new array")


def check_computed(got: Any, like: Any, name: str) -> None:
    """See to it that something was computed, before its memory, its time or its calls are looked at.

    A function that does nothing takes no memory, and must not get points for that. Whether the numbers are right is not
    asked, so that a mistake in them costs its points in one cell.

    Args:
        got: what the function gave; where it gives too little, the gradients it left, in a list or tuple.
        like: anything of that form: arrays, numbers, lists of these.
        name: of the function.

    Raises:
        AssertionError: an array, a number or a list is not there, or all the numbers of one are 0.
    """
    reason = why_idle(got, like)
    _fail_if(reason and f"it computes nothing, so there is nothing to measure: {reason}", name)


@contextmanager
def counting(namespace: dict[str, Any], name: str) -> Iterator[list[tuple[Any, ...]]]:
    """Count calls of a function while this lasts; the list has the arguments of each.

    Args:
        namespace: where the function is looked up: ``globals()`` of the notebook.
        name: of the function.
    """
    original: Callable[..., Any] = namespace[name]
    calls: list[tuple[Any, ...]] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    namespace[name] = counted
    try:
        yield calls
    finally:
        namespace[name] = original


def check_calls(
    made: int, enough: int, what: str, mistakes: Mapping[str, int] | None = None, *, name: str = ""
) -> None:
    """Compare a number of calls with that which suffices.

    Args:
        what: what is counted, in the plural: "forwards".
        mistakes: the numbers that typical mistakes lead to.
        name: where it was counted.

    Raises:
        AssertionError: "you recompute the last layer of each segment: 50 forwards, 42 suffice", say.
    """
    if made == enough:
        return
    found = next((words for words, count in (mistakes or {}).items() if count == made), "")
    if made > enough:
        reason = f"{found or 'you compute more than you need'}: {made} {what}, {enough} suffice"
    else:
        reason = f"{found or 'something is left out, or computed elsewhere'}: {made} {what}, {enough} are needed"
    raise AssertionError(f"{name}: {reason}" if name else reason)


def check_peak(
    call: Callable[[], Any], limit: float, what: str, mistakes: Mapping[str, float] | None = None, *, like: Any
) -> int:
    """Measure the peak of the bytes that a call allocates, and compare it with a limit; returns the peak.

    Args:
        what: what is measured: "the peak of backprop".
        like: anything of the form of what the call gives, as for `check_computed`: who computes nothing takes nothing.
        mistakes: the least peak that each typical mistake leads to; the largest that was reached is named.

    Raises:
        AssertionError: it takes more, or computes nothing.
    """
    given: list[Any] = []
    peak = measure_peak(lambda: given.append(call())).increase_bytes
    reason = why_idle(given[0], like)
    if reason:
        raise AssertionError(f"{what} is that of a function that computes nothing: {reason}")
    if peak > limit:
        reached = [(least, words) for words, least in (mistakes or {}).items() if peak >= least]
        reason = f": {max(reached)[1]}" if reached else ""
        raise AssertionError(f"{what} is {format_bytes(peak)}, {format_bytes(limit)} suffice{reason}")
    return peak


@contextmanager
def told(name: str) -> Iterator[None]:
    """Say which function stopped with an error, and with which, in one sentence.

    Raises:
        AssertionError: instead of whatever else was raised. `NotImplementedError` stays: there is nothing yet.
    """
    try:
        yield
    except (AssertionError, NotImplementedError):
        raise
    except Exception as error:
        reason = f"{name} stopped with {type(error).__name__}: {error}"
        if "unpack" in str(error):
            reason += ". More is expected, or less: return as many things as the task asks for, with commas between"
        if isinstance(error, ValueError) and ("matmul" in str(error) or "shapes" in str(error)):
            reason += ". The shapes do not fit: print them, and look for a transpose that is missing or too much"
        raise AssertionError(reason) from error


def grading() -> bool:
    """Whether nbgrader is grading: measurements, which nobody looks at then, may be shorter."""
    return os.environ.get("NBGRADER_EXECUTION") == "autograde"


def slider(draw: Callable[[Any], Any], values: Sequence[Any], name: str, value: Any = None) -> None:
    """Show ``draw(value)``, a matplotlib Axes or Figure, with a slider to choose the value.

    Without a slider where there is no ipywidgets, or nobody to move it (NPNET_STATIC is set, or nbgrader is grading).

    Args:
        value: the one shown first; by default the first of ``values``.
    """
    display = importlib.import_module("IPython.display")
    value = values[0] if value is None else value

    def show(chosen: Any) -> None:
        display.display(display.Image(_png(draw(chosen))))

    widgets = None
    if not (grading() or os.environ.get("NPNET_STATIC")):
        with suppress(ImportError):
            widgets = importlib.import_module("ipywidgets")
    if widgets is None:
        show(value)
        print(f"{name} = {value} (with ipywidgets, a slider chooses among {', '.join(map(str, values))})")
        return
    chooser = widgets.SelectionSlider(options=list(values), value=value, description=name, continuous_update=False)
    display.display(chooser, widgets.interactive_output(show, {"chosen": chooser}))


def play(animate: Callable[[], Any], still: Callable[[], Any]) -> None:
    """Show the animation that ``animate()`` gives, with buttons; where nobody is there to press them, ``still()``.

    Args:
        animate: makes an animation, such as `npnet.plots.animate_schedule` gives.
        still: draws a matplotlib Axes or Figure, shown where NPNET_STATIC is set, or nbgrader is grading.
    """
    display = importlib.import_module("IPython.display")
    if grading() or os.environ.get("NPNET_STATIC"):
        display.display(display.Image(_png(still())))
        print("(where it can be played, an animation with buttons stands here)")
    else:
        display.display(display.HTML(animate().to_jshtml(default_mode="once")))


def _png(drawn: Any) -> bytes:
    file = BytesIO()
    (getattr(drawn, "figure", None) or drawn).savefig(file, format="png")
    return file.getvalue()


def _fail_if(reason: str, name: str) -> None:
    if reason:
        raise AssertionError(f"{name}: {reason}")


def _copied(value: Any) -> list[Any]:
    return [np.copy(array) for array in (value if isinstance(value, (list, tuple)) else [value])]


def _plain(number: float) -> str:
    return f"{number:,}" if isinstance(number, (int, np.integer)) else f"{number:.6g}"
