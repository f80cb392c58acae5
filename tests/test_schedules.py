"""Schedules: the lists themselves, what they cost, and that exactly the executable ones are accepted."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npnet import schedules
from npnet.schedule import BACKWARD, DROP, FETCH, FORWARD, OFFLOAD, Action, InvalidSchedule, Kind, Schedule
from npnet.schedules import as_schedule, every_nth, none, sqrt

PLAIN_2 = [(FORWARD, 1), (FORWARD, 2), (BACKWARD, 2), (BACKWARD, 1)]


def legal_moves(held, out, at):
    """What may come next: activations are ``held`` or ``out``, and the gradient is at layer ``at``'s output."""
    moves = [(FORWARD, layer) for layer in range(1, at + 1) if layer - 1 in held and layer not in held | out]
    moves += [(kind, layer) for layer in sorted(held - {0}) for kind in (DROP, OFFLOAD)]
    moves += [(FETCH, layer) for layer in sorted(out)]
    return moves + ([(BACKWARD, at)] if at and {at - 1, at} <= held else [])


def after(action, held, out):
    """What is held and what is out then."""
    kind, layer = action
    held = held | {layer} if kind in (FORWARD, FETCH) else held - {layer}
    return held, out | {layer} if kind is OFFLOAD else out - {layer}


def first_problem(actions, depth):
    """How the complaint about the first action that cannot be executed, or about the end, begins; None without one."""
    held, out, at = {0}, set(), depth
    for i, (kind, layer) in enumerate(actions):
        if (kind, layer) not in legal_moves(held, out, at):
            return f"action {i} of {len(actions)}, {kind.value} {layer}: "
        held, out = after((kind, layer), held, out)
        at -= kind is BACKWARD
    return f"after the last of {len(actions)} actions: layer {at} has no backward pass" if at else None


@st.composite
def valid_actions(draw, offloads=True):
    """(actions, depth): random moves for a while, then whatever is needed to finish."""
    depth = draw(st.integers(1, 8))
    held, out, at, actions = {0}, set(), depth, []
    choices = draw(st.lists(st.integers(0, 2**16), max_size=30))
    while at:
        missing = {at - 1, at} - held
        if choices:
            moves = [move for move in legal_moves(held, out, at) if offloads or move[0] is not OFFLOAD]
            kind, layer = moves[choices.pop() % len(moves)]
        elif not missing:
            kind, layer = BACKWARD, at
        else:  # upwards from the nearest activation below the gap
            layer = max(a for a in held if a < max(missing)) + 1
            kind = FETCH if layer in out else FORWARD
        actions.append((kind, layer))
        held, out = after((kind, layer), held, out)
        at -= kind is BACKWARD
    return actions, depth


def offloaded(actions):
    """The layers whose activations leave memory: what these layers save cannot."""
    return {layer for kind, layer in actions if kind is OFFLOAD}


@st.composite
def mutated_actions(draw):
    """(actions, depth): a valid list with a few actions deleted, swapped, duplicated or altered."""
    actions, depth = draw(valid_actions())
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(actions) - 1))
        how = draw(st.sampled_from(["delete", "swap", "duplicate", "alter"]))
        if how == "delete" and len(actions) > 1:
            del actions[i]
        elif how == "swap":
            j = draw(st.integers(0, len(actions) - 1))
            actions[i], actions[j] = actions[j], actions[i]
        elif how == "duplicate":
            actions.insert(draw(st.integers(0, len(actions))), actions[i])
        else:
            actions[i] = (draw(st.sampled_from(Kind)), draw(st.integers(-1, depth + 1)))
    return actions, depth


@pytest.mark.parametrize(
    ("depth", "n", "text"),
    [
        (1, 0, "F1 B1"),
        (3, 1, "F1 F2 F3 B3 B2 B1"),
        (2, 2, "F1 F2 B2 B1"),
        (3, 2, "F1 F2 D1 F3 B3 F1 B2 B1"),
        (5, 2, "F1 F2 D1 F3 F4 D3 F5 B5 F3 B4 B3 F1 B2 B1"),
    ],
)
def test_a_small_schedule_reads_as_expected(depth, n, text):
    words = {"F": "forward", "D": "drop", "B": "backward"}
    assert str(every_nth(depth, n)) == ", ".join(f"{words[kind]} {layer}" for kind, layer in text.split())


@pytest.mark.parametrize("depth", range(1, 41))
def test_extra_forwards_are_as_the_formula_says(depth):
    assert every_nth(50, 7).extra_forwards == 42
    assert none(depth).extra_forwards == every_nth(depth, 0).extra_forwards == 0
    for n in range(1, 46):
        schedule = every_nth(depth, n)
        assert schedule.extra_forwards == (n - 1) * ((depth - 1) // n)
        assert schedule.forwards.total() == depth + schedule.extra_forwards
        assert set(schedule.forwards) == set(range(1, depth + 1))
        assert max(schedule.forwards.values()) == 1 + (1 < n < depth)


@pytest.mark.parametrize("depth", range(1, 61))
def test_every_made_schedule_is_valid_holds_its_checkpoints_and_keeps_the_last_segment(depth):
    assert first_problem(none(depth), depth) is None
    assert first_problem(sqrt(depth), depth) is None
    for n in range(depth + 2):
        schedule = every_nth(depth, n)
        assert first_problem(schedule, depth) is None
        first_pass = schedule[: schedule.index((BACKWARD, depth))]
        dropped = {layer for kind, layer in first_pass if kind is DROP}
        last = (depth - 1) // max(n, 1) * n
        assert dropped == {layer for layer in range(1, last) if n > 1 and layer % n}


@pytest.mark.parametrize("depth", range(1, 61))
def test_sqrt_checkpoints_every_rounded_root_and_says_so(depth):
    n = min(range(1, 9), key=lambda n: abs(n - depth**0.5))
    assert sqrt(depth) == every_nth(depth, n)
    assert sqrt(depth).name == (f"every {n}" if n > 1 else none(depth).name)
    assert sqrt(depth).extra_forwards < depth
    assert none(depth).name == every_nth(depth, 0).name == every_nth(depth, 1).name != "every 1"


@given(st.integers(1, 25), st.integers(0, 26), st.data())
@settings(deadline=None)
def test_what_a_layer_must_save_it_computes_right_before_its_segments_backward(depth, n, data):
    needs_saved = data.draw(st.sets(st.integers(1, depth)))
    schedule = every_nth(depth, n, needs_saved)
    assert first_problem(schedule, depth) is None
    segment = n if n > 1 else depth
    for layer in needs_saved:
        start = (layer - 1) // segment * segment
        backward = schedule.index((BACKWARD, layer))
        last_forward = max(i for i in range(backward) if schedule[i] == (FORWARD, layer))
        between = schedule[last_forward:backward]
        assert all(start < action.layer <= start + segment and action.kind is not DROP for action in between)
        assert [s.saves for s in schedule.runs if s.kind is FORWARD and s.first <= layer <= s.last][-1]
    boundaries = {layer for layer in needs_saved if layer % segment == 0 and layer < depth}
    assert schedule.extra_forwards == every_nth(depth, n).extra_forwards + len(boundaries)


def spelled_out(schedule):
    """The engine's steps, action by action: (kind, layer, recompute, saves)."""
    for step in schedule.runs:
        for layer in range(step.first, step.last + 1):
            yield step.kind, layer, step.recompute, step.saves
            if step.passes and layer > step.first:
                yield DROP, layer - 1, False, False


def test_a_segment_that_leaves_a_checkpoint_is_one_step():
    schedule = every_nth(9, 4)
    assert [(s.first, s.last, s.passes) for s in schedule.runs if s.kind is FORWARD] == [
        (1, 4, True),
        (5, 8, True),
        (9, 9, False),
        (5, 7, False),
        (1, 3, False),
    ]
    assert DROP not in [s.kind for s in schedule.runs]


@given(valid_actions(), st.data())
@settings(deadline=None, max_examples=200)
def test_a_valid_list_is_accepted_and_compiled_into_the_same_actions(given_list, data):
    actions, depth = given_list
    needs_saved = data.draw(st.sets(st.integers(1, depth))) - offloaded(actions)
    assert first_problem(actions, depth) is None
    schedule = Schedule(actions, depth, needs_saved=needs_saved)
    assert list(schedule) == actions
    assert str(schedule) == ", ".join(f"{kind.value} {layer}" for kind, layer in actions)
    flat = list(spelled_out(schedule))
    assert [entry[:2] for entry in flat] == actions
    for i, (kind, layer, recompute, saves) in enumerate(flat):
        if kind is FORWARD:
            assert recompute == ((kind, layer) in actions[:i])
            assert saves == (layer in needs_saved and (kind, layer) not in actions[i + 1 :])
    extra = sum(kind is FORWARD for kind, _ in actions) - depth
    assert schedule.extra_forwards == extra == sum(recompute for kind, _, recompute, _ in flat if kind is FORWARD)


@given(mutated_actions())
@settings(deadline=None, max_examples=500)
def test_an_altered_list_is_accepted_exactly_if_it_can_be_executed(given_list):
    actions, depth = given_list
    problem = first_problem(actions, depth)
    if problem is None:
        assert list(Schedule(actions, depth)) == actions
    else:
        with pytest.raises(InvalidSchedule, match=f"^{problem}"):
            Schedule(actions, depth)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([(FORWARD, 2)], "action 0 of 1, forward 2: its input a_1 is not held"),
        ([(FORWARD, 1), (FORWARD, 1)], "action 1 of 2, forward 1: a_1 is held already"),
        ([*PLAIN_2[:3], (FORWARD, 2)], "action 3 of 4, forward 2: layer 2 already had its backward pass"),
        ([(FORWARD, 1), (DROP, 2)], "action 1 of 2, drop 2: a_2 is not held"),
        ([(FORWARD, 1), (BACKWARD, 1)], "action 1 of 2, backward 1: the gradient is at a_2, so layer 2 is next"),
        ([*PLAIN_2[:2], (DROP, 1), (BACKWARD, 2)], "backward 2: it needs a_1 and a_2, and a_1 is not held"),
        (PLAIN_2[:3], "after the last of 3 actions: layer 1 has no backward pass"),
        ([], "after the last of 0 actions: layer 2 has no backward pass"),
        ([(FORWARD, 0)], "action 0 of 1, forward 0: expected a Kind and a layer from 1 to 2"),
        ([(DROP, 0)], "drop 0: expected a Kind and a layer from 1 to 2"),
        ([(FORWARD, -1)], "forward -1: expected a Kind and a layer from 1 to 2"),
        ([(FORWARD, 1.0)], "forward 1.0: expected a Kind and a layer from 1 to 2"),
        ([(FORWARD, None)], "forward None: expected a Kind and a layer from 1 to 2"),
        ([("onward", 1)], "action 0 of 1, onward 1: expected a Kind and a layer from 1 to 2"),
    ],
)
def test_an_invalid_list_is_refused_by_a_message_that_names_the_action(actions, message):
    for make in (Schedule, as_schedule):
        with pytest.raises(InvalidSchedule, match=re.escape(message)):
            make(actions, 2)


def test_as_schedule_takes_a_name_a_function_a_list_and_a_schedule():
    assert as_schedule("none", 6) == none(6)
    assert as_schedule("sqrt", 6) == sqrt(6)
    assert as_schedule(lambda depth: every_nth(depth, 3), 7) == every_nth(7, 3)
    assert as_schedule(iter(PLAIN_2), 2) == as_schedule([Action(*pair) for pair in PLAIN_2], 2) == none(2)
    schedule = every_nth(7, 3)
    assert as_schedule(schedule, 7) is schedule
    with pytest.raises(ValueError, match="the schedule 'every 3' is for 7 layers, the network has 8"):
        as_schedule(schedule, 8)
    assert set(schedules.MAKERS) >= {"none", "sqrt"}


@pytest.mark.parametrize(
    ("given_as", "error", "message"),
    [
        ("every 7", ValueError, "unknown schedule 'every 7'; choose one of 'none', 'sqrt'"),
        (lambda _: every_nth(5, 2), ValueError, "the schedule 'every 2' is for 5 layers, the network has 2"),
        (lambda depth: PLAIN_2[:depth], InvalidSchedule, "after the last of 2 actions: layer 2 has no"),
        (None, TypeError, "schedule: expected a Schedule .* list of .*, got None"),
        ([1, 2], TypeError, r"schedule: expected a Schedule .*, got \[1, 2\]"),
        ([(FORWARD, 1, 1)], TypeError, "schedule: expected a Schedule .*, got"),
    ],
)
def test_as_schedule_says_what_it_cannot_take(given_as, error, message):
    with pytest.raises(error, match=message):
        as_schedule(given_as, 2)


@pytest.mark.parametrize("n", [-1, 2.0, "2", None, True])
def test_every_nth_takes_whole_numbers_only(n):
    with pytest.raises(
        ValueError if n == -1 else TypeError,
        match=rf"n: expected a whole number, at least 0, got {n!r}",
    ):
        every_nth(5, n)


@pytest.mark.parametrize("make", [none, sqrt, lambda depth: every_nth(depth, 2), lambda depth: Schedule([], depth)])
def test_a_depth_that_is_not_a_positive_whole_number_is_refused_by_name(make):
    for depth in (0, -1, 2.5, "2", None):
        with pytest.raises((TypeError, ValueError), match="depth"):
            make(depth)
