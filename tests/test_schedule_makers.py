"""The schedules that are made from integers alone: chosen checkpoints, and revolve."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from npnet.schedule import BACKWARD, DROP, FORWARD
from npnet.schedules import MAKERS, as_schedule, every_nth, none, revolve, selective
from tests.test_schedules import first_problem


def held_before(schedule):
    """(action, the activations held when it begins), the input included."""
    held = {0}
    for action in schedule:
        yield action, set(held)
        if action.kind is FORWARD:
            held.add(action.layer)
        else:
            held.remove(action.layer)


@st.composite
def chosen_layers(draw):
    """(depth, checkpoints, layers that save)."""
    depth = draw(st.integers(1, 25))
    layers = st.sets(st.integers(1, depth))
    return depth, draw(layers), draw(layers)


@given(chosen_layers())
@example((4, {3}, {3}))
@example((6, {2, 4, 6}, {2, 6}))
@settings(deadline=None, max_examples=300)
def test_the_pass_up_drops_what_is_no_checkpoint_below_the_last_one_and_nothing_else(chosen):
    depth, checkpoints, needs_saved = chosen
    schedule = selective(depth, checkpoints, needs_saved)
    assert first_problem(schedule, depth) is None
    assert schedule.needs_saved == needs_saved
    pass_up = schedule[: schedule.index((BACKWARD, depth))]
    assert [action.layer for action in pass_up if action.kind is FORWARD] == list(range(1, depth + 1))
    last = max(checkpoints - {depth}, default=0)
    assert [action.layer for action in pass_up if action.kind is DROP] == [
        layer for layer in range(1, last) if layer not in checkpoints
    ]
    for action, held in held_before(pass_up):  # each is dropped as soon as the next one is there
        assert not {layer for layer in held - checkpoints if 0 < layer < min(action.layer - 1, last)}


@given(chosen_layers())
@example((6, {2, 4, 6}, {2, 6}))
@settings(deadline=None, max_examples=300)
def test_on_the_way_down_a_segment_is_run_again_once_and_only_checkpoints_below_it_are_held(chosen):
    depth, checkpoints, needs_saved = chosen
    schedule, inner = selective(depth, checkpoints, needs_saved), checkpoints - {depth}
    last = max(inner, default=0)
    twice = {layer for layer in range(1, last + 1) if layer not in inner or layer in needs_saved}
    assert schedule.forwards == {layer: 1 + (layer in twice) for layer in range(1, depth + 1)}
    for action, held in held_before(schedule):
        start = max((layer for layer in inner if layer < action.layer), default=0)  # of the segment
        if action.kind is BACKWARD:
            assert held == {0, *(layer for layer in inner if layer <= start), *range(start, action.layer + 1)}
    for layer in needs_saved:  # what it saved in its last run is there in its backward pass: no checkpoint came between
        backward = schedule.index((BACKWARD, layer))
        last_run = max(i for i in range(backward) if schedule[i] == (FORWARD, layer))
        start = max((checkpoint for checkpoint in inner if checkpoint < layer), default=0)
        assert all(kind is not DROP and at > start for kind, at in schedule[last_run:backward])


@given(st.integers(1, 40), st.integers(2, 45), st.data())
@settings(deadline=None)
def test_every_nth_is_the_choice_of_the_multiples_of_n(depth, n, data):
    needs_saved = data.draw(st.sets(st.integers(1, depth)))
    assert every_nth(depth, n, needs_saved) == selective(depth, range(n, depth, n), needs_saved)
    assert every_nth(depth, n, needs_saved) == selective(depth, range(n, depth + 1, n), needs_saved)


def test_the_order_of_checkpoints_does_not_matter_and_the_last_layer_is_no_checkpoint():
    assert selective(9, [7, 3, 3, 9]) == selective(9, {3, 7}) == selective(9, iter((7, 3)))
    assert selective(9, []) == selective(9, [9]) == selective(9, [1]) == none(9)
    assert selective(9, range(1, 10)) == none(9) == selective(9, range(1, 9))
    assert selective(9, [7, 3]).name == "checkpoints at 3, 7"
    assert selective(9, range(1, 9)).name == "checkpoints at 1, 2, 3, 4, 5, 6, 7, 8"
    assert selective(9, range(1, 10)).name == "9 chosen checkpoints"


@pytest.mark.parametrize(
    ("checkpoints", "error", "message"),
    [
        ([0], ValueError, "a layer of checkpoints: expected a whole number, at least 1, got 0"),
        ([2, -1], ValueError, "checkpoints: expected a whole number, at least 1, got -1"),
        ([6, 2], ValueError, "checkpoints: expected layers from 1 to 5, got 6"),
        ([2.0], TypeError, "checkpoints: expected a whole number, at least 1, got 2.0"),
        (["2"], TypeError, "checkpoints: expected a whole number, at least 1, got '2'"),
        ([True], TypeError, "checkpoints: expected a whole number, at least 1, got True"),
    ],
)
def test_checkpoints_that_are_no_layers_are_refused(checkpoints, error, message):
    with pytest.raises(error, match=message):
        selective(5, checkpoints)


@pytest.mark.parametrize("c", range(1, 12))
def test_revolve_recomputes_as_little_as_the_binomial_formula_says(c):
    for depth in range(1, 40):
        r = next(r for r in range(40) if math.comb(c + r, c) >= depth)
        schedule = revolve(depth, c)
        assert first_problem(schedule, depth) is None
        assert schedule.extra_forwards == r * depth - math.comb(c + r, c + 1)
        assert max(schedule.forwards.values()) <= r + 1


@pytest.mark.parametrize("c", range(1, 12))
def test_revolve_takes_as_many_steps_as_checkpoint_schedules_says(c):
    multistage = pytest.importorskip("checkpoint_schedules.multistage")
    for depth in range(2, 40):
        assert revolve(depth, c).extra_forwards + depth == multistage.optimal_steps_binomial(depth, c)


@pytest.mark.parametrize("c", range(1, 12))
def test_revolve_holds_its_slots_and_one_activation_on_the_way(c):
    for depth in range(1, 40):
        schedule = revolve(depth, c)
        most, on_the_way = 0, 0
        for (kind, layer), held in held_before(schedule):
            assert 0 in held
            if kind is FORWARD:  # of what is held, only the activation just made may be no checkpoint
                assert len(held - {on_the_way} | {0}) <= c
                assert on_the_way in {0, layer - 1} or len(held) <= c
                most, on_the_way = max(most, len(held)), layer
            elif kind is BACKWARD:  # its output has been made for it alone
                assert len(held - {layer}) <= c + 1
                on_the_way = 0
        assert most == min(c + 1, depth)


@pytest.mark.parametrize("slots", [1, 2, 3, 7, None])
def test_revolve_runs_each_layer_right_before_its_backward_pass(slots):
    for depth in range(1, 40):
        schedule = revolve(depth, slots, range(1, depth + 1))
        assert schedule == revolve(depth, slots)
        assert schedule.needs_saved == set(range(1, depth + 1))
        for i, (kind, layer) in enumerate(schedule):
            assert kind is not BACKWARD or schedule[i - 1] == (FORWARD, layer)


def test_revolve_by_default_has_slots_for_the_logarithm_of_the_depth():
    for depth, slots in [(1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (64, 7), (65, 8), (100, 8)]:
        assert revolve(depth) == revolve(depth, slots)
        assert revolve(depth).name == f"revolve {slots}"
        assert revolve(depth).forwards.total() <= depth * (2 + math.log2(depth))


def test_revolve_goes_by_its_name_too():
    assert as_schedule("revolve", 6, {2}) == revolve(6, needs_saved={2})
    assert as_schedule("revolve", 6, {2}).needs_saved == {2}
    assert MAKERS["revolve"] is revolve


@pytest.mark.parametrize(("slots", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), ("2", TypeError)])
def test_revolve_refuses_what_is_no_number_of_slots(slots, error):
    with pytest.raises(error, match=f"slots: expected a whole number, at least 1, got {slots!r}"):
        revolve(5, slots)


@pytest.mark.parametrize("make", [revolve, lambda depth: selective(depth, [1])])
def test_a_depth_that_is_no_positive_whole_number_is_refused_by_name(make):
    for depth in (0, -1, 2.5, "2", None):
        with pytest.raises((TypeError, ValueError), match="depth: expected a whole number, at least 1"):
            make(depth)
