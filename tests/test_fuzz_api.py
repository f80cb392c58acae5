"""Everything public, called with hostile arguments: a right answer, or an error in npnet's own words.

The calls are in `tests.api_layers`, `api_training`, `api_saving` and `api_rest`; NPNET_FUZZ=10 tries ten times as many
examples, and other ones each time.
"""

import copy
import dataclasses
import inspect
import os
from collections.abc import Collection, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import npnet
from npnet.schedules import every_nth
from tests import api_layers, api_rest, api_saving, api_training  # noqa: F401 - they fill the table
from tests.api_calls import CALLS, LOSS, MODEL, X64, X, Y
from tests.hostile import arrays_like, hostile
from tests.outcomes import agree, attempt, faithful, plain

EFFORT = float(os.environ.get("NPNET_FUZZ", "0"))
EXAMPLES = {
    "measure_rss_peak": 1,
    "step_costs": 5,
    "load_mnist": 2,
    "load_diabetes": 10,
    "fit": 60,
}
EXAMPLES |= {"tradeoff": 15, "plots": 8}


def bare(name: str) -> str:
    """The name without the remark in brackets."""
    return name.split(" [")[0]


def examples(name: str) -> int:
    """How many to try."""
    return round(EXAMPLES.get(bare(name), EXAMPLES.get(name.split(".")[0], 25)) * (EFFORT or 1))


def replaceable(name: str) -> list[str]:
    """The arguments in whose places hostile ones are put."""
    return sorted(set(CALLS[name].good) - {"self_"})


@pytest.mark.parametrize("name", CALLS)
def test_right_arguments_have_an_answer(name):
    function, good, also, _ = CALLS[name]
    assert not isinstance(attempt(function, copy.deepcopy(good), also), Exception) or also


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
@pytest.mark.parametrize("name", [name for name in CALLS if replaceable(name)])
def test_hostile_arguments_have_an_answer_or_an_explanation(name):
    function, good, also, patient = CALLS[name]

    @settings(
        max_examples=examples(name),
        derandomize=not EFFORT,
        database=None,
        deadline=None if bare(name) in ("measure_rss_peak", "load_mnist") else 5000,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data):
        chosen = data.draw(st.sets(st.sampled_from(replaceable(name)), min_size=1, max_size=2), label="hostile")
        bad = {each: data.draw(hostile(good[each], each not in patient), label=each) for each in sorted(chosen)}
        answer = attempt(function, {**copy.deepcopy(good), **bad}, also)
        if any(isinstance(value, (np.ndarray, list, tuple)) for value in bad.values()) and all(
            map(faithful, bad.values())
        ):
            clean = {each: plain(value) for each, value in bad.items()}
            again = attempt(function, {**copy.deepcopy(good), **clean}, also)
            assert agree(answer, again), f"{answer!r}, but {again!r} for the same numbers in plain arrays"

    check()


def outcome(function, **args):
    """The answer, or the kind of the error."""
    answer = attempt(function, args)
    return type(answer) if isinstance(answer, Exception) else answer


@settings(max_examples=round(100 * (EFFORT or 1)), derandomize=not EFFORT, database=None, deadline=5000)
@given(arrays_like(X), arrays_like(Y), st.sampled_from(["sqrt", "revolve", lambda depth: every_nth(depth, 2)]))
def test_a_schedule_changes_no_bit_whatever_the_arrays(x, y, schedule):
    """Nor what is refused."""
    once = outcome(lambda x, y: npnet.value_and_grad(MODEL, LOSS, x, y), x=x, y=y)
    again = outcome(lambda x, y: npnet.value_and_grad(MODEL, LOSS, x, y, schedule=schedule), x=x, y=y)
    if isinstance(once, type):
        assert once is again
    else:
        assert once[0] == again[0]
        assert all(np.array_equal(once[1][name], again[1][name], equal_nan=True) for name in once[1])


@settings(max_examples=round(100 * (EFFORT or 1)), derandomize=not EFFORT, database=None, deadline=5000)
@given(arrays_like(X64))
def test_a_network_takes_real_numbers_of_every_dtype_as_floats(x):
    network = npnet.Network([3, 4, 2], rng=0)
    found = outcome(network.feedforward, a=x)
    if not isinstance(found, type):
        with np.errstate(all="ignore"):
            copied = np.asarray(x).astype(np.float64, order="C")
        assert agree(found, network.feedforward(copied))


# Nothing public is left out.

EXEMPT = {
    "cost": "its shapes come from npnet.plan and npnet.summary, which are here",
    "accumulate": "the inner loop of the backward pass",
    **dict.fromkeys(("named_parameters", "named_buffers", "places"), "its prefix is that of the model outside"),
    "save_animation": "renders frame by frame",
    "begin": "of a Saver: npnet.fit calls it with its own run",
    "step_done": "of a Saver, too",
    "save": "of a Saver, too; Sequential.save is there",
}


def public_calls(package: ModuleType) -> Iterator[tuple[str, set[str]]]:
    """Each public name that takes arguments, with the names of calls that would do for it."""
    everything = {name: getattr(package, name) for name in package.__all__}
    classes = {name: value for name, value in everything.items() if inspect.isclass(value)}
    for name, value in everything.items():
        if inspect.ismodule(value):
            members = getattr(value, "__all__", [each for each in vars(value) if each[0] != "_"])
            for each in members:
                function = getattr(value, each)
                if inspect.isfunction(function) and (
                    hasattr(value, "__all__") or function.__module__ == value.__name__
                ):
                    yield f"{name}.{each}", {f"{name}.{each}"}
        elif not inspect.isclass(value):
            yield name, {name}
        else:
            record = issubclass(value, BaseException) or dataclasses.is_dataclass(value) or hasattr(value, "_fields")
            if not record:  # which holds what it is given
                yield name, {name}
            below = {other for other, kind in classes.items() if issubclass(kind, value)}
            for each, method in vars(value).items():
                takes = inspect.isfunction(method) and len(inspect.signature(method).parameters) > 1
                if takes and each[0] != "_" and each[-1] != "_":  # one behind: in place, for the engine
                    yield f"{name}.{each}", {f"{other}.{each}" for other in below}


def uncovered(calls: Collection[str], package: Any = npnet) -> list[str]:
    """What is public, takes arguments, and has no call."""
    there = set(map(bare, calls))
    return [name for name, enough in public_calls(package) if not enough & there and name.split(".")[-1] not in EXEMPT]


def test_everything_public_is_called():
    assert not uncovered(CALLS)


@pytest.mark.parametrize("name", ["fit", "Dense", "one_hot", "schedules.sqrt", "plots.plot_bars", "clip_grad_norm"])
def test_a_name_that_is_not_called_is_found(name):
    assert uncovered([each for each in CALLS if bare(each) != name]) == [name]


def test_a_new_name_would_be_found(monkeypatch):
    monkeypatch.setattr(npnet, "__all__", [*npnet.__all__, "brand_new"])
    monkeypatch.setattr(npnet, "brand_new", lambda x: x, raising=False)
    monkeypatch.setattr(npnet.Linear, "brand_new", lambda self, x: x, raising=False)
    assert uncovered(CALLS) == ["Linear.brand_new", "brand_new"]


# What must not pass.


def lazily(x):
    npnet.Dense(3, 2, rng=0).forward(x)  # which is right
    return x.dot(np.ones(5, np.float32))


def greedily(x):
    x *= 2


def carelessly(x):
    return x.no_such_thing


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lazily, AssertionError, "not npnet's own words: ValueError: shapes"),
        (lambda x: len(5), AssertionError, "not npnet's own words"),
        (greedily, AssertionError, "the call changed its argument"),
        (carelessly, AttributeError, "no_such_thing"),
        (lambda x: np.exp(1000 * x), RuntimeWarning, "overflow"),
    ],
)
def test_what_must_not_pass_does_not(function, error, message):
    with pytest.raises(error, match=message):
        attempt(function, {"x": X.copy()})


def test_an_answer_that_depends_on_the_layout_is_found():
    turned = X.copy(order="F")
    assert agree(turned, plain(turned))
    assert not agree(turned.ravel("K"), plain(turned).ravel("K"))
    assert not agree(np.ones(2), np.zeros(2))
    assert not agree(ValueError(), np.zeros(2))


def test_a_model_changed_by_an_error_is_found():
    def spoils(model):
        model.layers[0].weight.value[0, 0] += 1
        model.forward(None)

    with pytest.raises(AssertionError, match="the error left the model changed"):
        attempt(spoils, {"model": npnet.mlp([3, 2], rng=0)})
