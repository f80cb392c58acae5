"""What looks like a setting and is none is refused, with the right name; settings are checked whenever they are set."""

import copy
import functools
import pickle

import numpy as np
import pytest

import npnet
from npnet.attributes import refuse_unknown_attribute

MAKERS = {
    "SGD": lambda: npnet.SGD(0.1, momentum=0.5),
    "Adam": lambda: npnet.Adam(1e-3),
    "Optimizer": npnet.Optimizer,
    "GradScaler": npnet.GradScaler,
    "SoftmaxCrossEntropy": npnet.SoftmaxCrossEntropy,
    "Quadratic": npnet.Quadratic,
    "Saver": lambda: npnet.Saver("run.npz"),
    "History": npnet.History,
}


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("Adam", "lr", "^Adam has no attribute 'lr': use learning_rate$"),
        ("SGD", "lr", "use learning_rate"),
        ("Optimizer", "eta", "use learning_rate"),
        ("Adam", "betas", "use beta1 and beta2"),
        ("Adam", "eps", "use epsilon"),
        ("Adam", "momentum", "use beta1"),
        ("Adam", "learning_rat", r"did you mean learning_rate\?"),
        ("Adam", "learningRate", r"did you mean learning_rate\?"),
        ("SGD", "momentun", r"did you mean momentum\?"),
        ("SGD", "weight_dekay", r"did you mean weight_decay\?"),
        ("SGD", "nesterov", "would do nothing; what can be set is learning_rate, momentum, weight_decay"),
        ("SGD", "gradient", "would do nothing"),  # that of a parameter, which methods do mention
        ("SGD", "param_groups", "use learning_rate and the other settings"),
        ("GradScaler", "scale", r"use get_scale\(\)"),
        ("GradScaler", "growth_intervall", r"did you mean growth_interval\?"),
        ("SoftmaxCrossEntropy", "reduction", "a mean over the batch"),
        ("SoftmaxCrossEntropy", "label_smoothing", "use targets that are smoothed"),
        ("Saver", "interval", "use every$"),
        ("Saver", "resumed", r"did you mean resume\?"),
        ("History", "losses", "use .*each.loss for each in history"),
        ("History", "epoch", r"did you mean epochs\?"),
        ("Quadratic", "sum", "setting it would do nothing"),
    ],
)
def test_an_attribute_that_does_nothing_is_refused_with_the_right_name(kind, name, words):
    made = MAKERS[kind]()
    before = dict(vars(made))
    with pytest.raises(AttributeError, match=words):
        setattr(made, name, 0.5)
    assert vars(made) == before
    assert not hasattr(made, name)


def test_reading_a_synonym_names_the_right_one_and_nothing_else_is_hidden():
    with pytest.raises(AttributeError, match=r"^Adam has no attribute 'lr': use learning_rate$"):
        npnet.Adam(1e-3).lr  # noqa: B018
    with pytest.raises(AttributeError, match=r"^'Adam' object has no attribute 'unheard'$"):
        npnet.Adam(1e-3).unheard  # noqa: B018

    class Broken(npnet.SGD):
        @property
        def state_names(self):
            return self._never_set

    with pytest.raises(AttributeError, match="_never_set"):  # and not state_names
        Broken(0.1).state_names  # noqa: B018


NEEDED = {"SGD": {"learning_rate": 0.1}, "Saver": {"path": "run.npz"}}
BAD = {
    ("SGD", "learning_rate"): [-1, np.nan, "x", None],
    ("SGD", "momentum"): [1, -0.1, "x"],
    ("SGD", "weight_decay"): [-1e-9, np.inf],
    ("Adam", "beta1"): [1.0, None],
    ("Adam", "beta2"): [2],
    ("Adam", "epsilon"): [-1],
    ("GradScaler", "growth_factor"): [0.5],
    ("GradScaler", "backoff_factor"): [1, 0],
    ("GradScaler", "growth_interval"): [0, 1.5],
    ("Saver", "every"): [0, 1.5, "x"],
    ("Saver", "resume"): ["yes", 2],
}


@pytest.mark.parametrize(("kind", "name"), BAD)
def test_a_setting_is_checked_when_it_is_changed_as_in_the_constructor(kind, name):
    made, build = MAKERS[kind](), getattr(npnet, kind)
    before = getattr(made, name)
    for value in BAD[kind, name]:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected") as changed:
            setattr(made, name, value)
        with pytest.raises((TypeError, ValueError)) as constructed:
            build(**NEEDED.get(kind, {}) | {name: value})
        assert str(changed.value) == str(constructed.value)
        assert getattr(made, name) == before


def test_a_setting_that_is_changed_counts():
    parameter, optimizer = npnet.Parameter(np.zeros(1)), npnet.SGD(1.0)
    optimizer.learning_rate = np.float32(0.5)
    assert type(optimizer.learning_rate) is float
    parameter.gradient = np.ones(1)
    optimizer.step([parameter])
    assert parameter.value == -0.5


@pytest.mark.parametrize("kind", MAKERS)
def test_copies_and_pickles_keep_their_settings(kind):
    made = MAKERS[kind]()
    for other in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert vars(other) == vars(made)
        with pytest.raises(AttributeError):
            other.unheard = 1


# What is one's own.


class Own(npnet.SGD):
    """Sets, reads and mentions attributes, in the ways that people have."""

    nesterov = False
    annotated: int

    def __init__(self, lr):
        super().__init__(lr)
        self.lr = lr
        for name in ("one", "two"):
            setattr(self, name, 0)

    def late(self):
        self.count = getattr(self, "history", 0)
        return [self.inner for _ in range(2)]

    @property
    def seen(self):
        return self.behind

    @functools.lru_cache  # noqa: B019
    def wrapped(self):
        return self.cached


def test_a_subclass_keeps_its_own_attributes():
    own = Own(0.5)
    assert (own.lr, own.learning_rate) == (0.5, 0.5)
    names = ["lr", "nesterov", "annotated", "one", "two", "count", "history", "inner", "behind", "cached", "_private"]
    for name in [*names, "anything"]:  # what setattr sets cannot be seen
        setattr(own, name, name)
        assert getattr(own, name) == name
    with pytest.raises(ValueError, match="learning_rate"):
        own.learning_rate = -1


class Listed(npnet.Quadratic):
    """A loss with a setting."""

    def __init__(self):
        self.scale = 2.0

    def value_and_gradient(self, output, target):
        value, gradient = super().value_and_gradient(output, target)
        return value * self.scale * self.extra, gradient * self.scale


def test_what_no_method_of_a_subclass_mentions_is_refused_until_one_does():
    loss = Listed()
    loss.scale, loss.extra = 3.0, 1.0
    with pytest.raises(AttributeError, match=r"Listed has no attribute 'scales': did you mean scale\?"):
        loss.scales = 3.0
    with pytest.raises(AttributeError, match="Listed has no attribute 'margin'"):
        loss.margin = 1.0
    try:
        Listed.later = lambda self: self.margin  # one method a cell, as in notebooks
        loss.margin = 1.0
        assert loss.later() == 1.0
    finally:
        del Listed.later


def test_what_was_not_looked_for_would_be_set(monkeypatch):
    monkeypatch.setattr("npnet.attributes.refuse_unknown_attribute", lambda *_: None)
    adam = npnet.Adam(1e-3)
    adam.lr = 0.5  # the fault that these tests are about
    assert adam.learning_rate == 1e-3


def test_any_object_can_be_asked_for():
    class Plain:
        def __init__(self):
            self.width = 1

    refuse_unknown_attribute(Plain(), "width", {})
    with pytest.raises(AttributeError, match="Plain has no attribute 'hidden': use width") as error:
        refuse_unknown_attribute(Plain(), "hidden", {"hidden": "width"})
    assert error.value.name == "hidden"
