# %% [markdown]
# # Lab 3: The checkpoint function and random state
#
# Labs 1 and 2 cut a whole chain into segments. Often only one *part* of a model is worth it: a block with
# large activations that are cheap to compute again. So frameworks offer a function, `checkpoint(part)`, that is
# put around any part, wherever it stands.
#
# You will write it. It has one trap: a part that draws random numbers, such as dropout, draws *others* when it
# is run again. Nothing crashes, the loss falls, and the gradient is that of another function.
#
# | part | you write | points |
# | --- | --- | --- |
# | 1 A layer that draws random numbers | `Dropout` | 3 |
# | 2 The checkpoint function | `Checkpoint`: its gradients, its memory | 3 + 2 |
# | 3 It fails, silently | nothing: you watch; a question | 2 |
# | 4 The random state | `PreservingCheckpoint`: its gradients, the stream afterwards; a question | 3 + 2 + 2 |
# | 5 Which parts? | `choose`, for a memory budget; a question | 3 + 2 |
# | 6 With and without on one command line | `use_checkpoint` | 2 |
#
# It takes about an hour. Write where it says `YOUR CODE HERE` or `YOUR ANSWER HERE`. Below each task is
# a cell of tests: run it, and it says what is wrong. (There are more tests when the lab is graded.)

# %% nbgrader={"grade_id": "setup", "locked": true}
import copy
import inspect
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np

import npnet
from npnet import labs, measure_peak, schedules
from npnet.memory import format_bytes

STREAM = np.random.default_rng(0)  # where all random numbers of this lab's layers come from


def seed(number):
    """Let STREAM begin anew: the same number, the same random numbers."""
    STREAM.bit_generator.state = np.random.default_rng(number).bit_generator.state


for number in (1, 2, 1):
    seed(number)
    print(f"seed({number}):", STREAM.random(4).round(3), STREAM.random(4).round(3))

# %% [markdown]
# ## 1 A layer that draws random numbers
#
# A layer of npnet has two methods, and remembers nothing between them:
#
# ```python
# y, saved = layer.forward(x)      # (batch, inputs) -> (batch, outputs); a row is a sample
# dx = layer.backward(dy, saved)   # also adds to the gradients of the layer's parameters
# ```
#
# Whoever calls `forward` keeps `saved`, or drops it and calls `forward` again: that is all that
# checkpointing is.
#
# ### Task 1: dropout (3 points)
#
# Dropout sets each number to 0 with probability $p$, and scales what it keeps so that the mean stays:
#
# $$y_{ij} = \frac{m_{ij}\, x_{ij}}{1 - p}, \qquad m_{ij} = \begin{cases} 1 & \text{if } r_{ij} \ge p \\ 0 & \text{otherwise,}\end{cases}$$
#
# with $r$ uniform in $[0, 1)$. Draw $r$ by a single `STREAM.random(x.shape)`. The mask $m$ is
# what the backward pass needs: keep it as an array of booleans (1 byte each, where $x$ has 4 or 8). In evaluation
# (`self.training` is False) nothing is dropped and nothing is drawn: $y = x$. Do not change `x` and `dy`.


# %% nbgrader={"grade_id": "dropout", "solution": true}
class Dropout(npnet.Layer):
    """Each number is 0 with probability p, else divided by 1 - p; in evaluation, y = x."""

    def __init__(self, p):
        self.p = p

    def __repr__(self):
        return f"Dropout({self.p})"

    def forward(self, x):
        """y, and what backward needs."""
        ### BEGIN SOLUTION
        if not self.training:
            return x, None
        mask = STREAM.random(x.shape) >= self.p
        return x * mask / (1 - self.p), mask
        ### END SOLUTION

    def backward(self, dy, saved):
        """dx: the gradient at the input."""
        ### BEGIN SOLUTION
        if saved is None:
            return dy
        return dy * saved / (1 - self.p)
        ### END SOLUTION


# %% nbgrader={"grade_id": "test_dropout", "grade": true, "points": 3}
def pair_of(answer, words):
    assert isinstance(answer, tuple), words
    assert len(answer) == 2, words
    return answer


def by_npnet(x, dy, p, draws):
    """y and dx of npnet's dropout, for these draws."""
    with mock.patch.object(npnet.blocks, "keep_mask", return_value=draws >= p):
        layer = npnet.Dropout(p, key=0)
        y, saved = layer.forward(x)
        return y, layer.backward(dy, saved)


def check_dropout(p, shape):
    rng = np.random.default_rng(1)
    x, dy, layer = rng.normal(size=shape), rng.normal(size=shape), Dropout(p)
    seed(2)
    start = STREAM.bit_generator.state
    draws, drawn_once = STREAM.random(shape), STREAM.bit_generator.state
    others = STREAM.random(shape)
    right_y, right_dx = by_npnet(x, dy, p, draws)
    seed(2)
    with labs.unchanged(x=x, dy=dy), labs.told("Dropout"):
        answer = layer.forward(x)
        y, saved = pair_of(answer, "Dropout.forward: return two things, y and what backward needs")
        drawn_by_forward = STREAM.bit_generator.state
        dx = layer.backward(dy, saved)
        drawn_by_backward = STREAM.bit_generator.state
    mistakes = {
        "what is kept has to be divided by 1 - p": right_y * (1 - p),
        "it is divided by p, where 1 - p is asked": right_y * (1 - p) / p,
        "it is multiplied by 1 - p, where it has to be divided": right_y * (1 - p) ** 2,
        "kept and dropped are exchanged": np.where(draws >= p, 0, x / (1 - p)),
        "kept and dropped are exchanged, and nothing is divided by 1 - p": np.where(
            draws >= p, 0, x
        ),
    }
    assert drawn_by_forward != start, "Dropout.forward draws nothing from STREAM"
    words = "Dropout.forward draws more or fewer numbers than one for each of x: STREAM.random(x.shape), once"
    assert drawn_by_forward == drawn_once, words
    labs.check_array(y, right_y, f"Dropout({p}): y", mistakes=mistakes)
    mistakes = {
        "the mask is drawn anew; backward needs that of forward": by_npnet(x, dy, p, others)[1],
        "the mask is missing: where nothing came through, no gradient comes back": dy / (1 - p),
        "it has to be divided by 1 - p, as in forward": right_dx * (1 - p),
        "it is dy itself": dy,
    }
    labs.check_array(dx, right_dx, f"Dropout({p}): dx", mistakes=mistakes)
    assert drawn_by_forward == drawn_by_backward, "Dropout.backward draws random numbers"
    arrays = saved if isinstance(saved, tuple) else (saved,)
    kept = sum(each.nbytes for each in arrays if isinstance(each, np.ndarray))
    assert kept <= x.size, (
        f"Dropout keeps {kept} bytes for {x.size} numbers: keep a mask of booleans"
    )
    before = STREAM.bit_generator.state
    with labs.told("Dropout in evaluation"):
        y, saved = layer.eval().forward(x)
        dx = layer.backward(dy, saved)
    drops = isinstance(y, np.ndarray) and not y.all()
    assert not drops, f"Dropout({p}) in evaluation: y: it still drops; ask self.training"
    labs.check_array(y, x, f"Dropout({p}) in evaluation: y")
    labs.check_array(dx, dy, f"Dropout({p}) in evaluation: dx")
    assert STREAM.bit_generator.state == before, "Dropout in evaluation draws random numbers"


check_dropout(0.3, (40, 5))
check_dropout(0.8, (20, 7))
### BEGIN HIDDEN TESTS
check_dropout(0.1, (100, 100))
check_dropout(0.6, (1, 30))
### END HIDDEN TESTS
print("Dropout: right")

# %% [markdown]
# ## 2 The checkpoint function
#
# ### Task 2: a layer around any layer (3 + 2 points)
#
# A `Checkpoint` is a layer, too. Around another one, `inner` (a single layer, or a `Sequential` of many), it
#
# * runs `inner` in `forward`, and keeps **only the input**;
# * runs `inner` again in `backward`, and goes back through it at once.
#
# So its `saved` is `x`, and what `inner` saved is never there but for a moment. Do not put `x` into `self`: a
# layer that remembers forgets, when it is run a second time before its backward pass.
#
# (In PyTorch, the same class is an `autograd.Function`. Its backward pass has to *detach* the input from the graph of
# the first run, or it would go back through that graph twice. npnet keeps no graph, so there is nothing to detach.)
#
# The first test looks at the gradients, the second counts runs and bytes. Random numbers come in part 4.


# %% nbgrader={"grade_id": "checkpoint", "solution": true}
class Checkpoint(npnet.Layer):
    """A layer of which only the input is kept: it is run again right before its backward pass."""

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"{type(self).__name__}({self.inner})"

    def forward(self, x):
        """inner's output, and what backward needs."""
        ### BEGIN SOLUTION
        y, _ = self.inner.forward(x)
        return y, x
        ### END SOLUTION

    def backward(self, dy, saved):
        """The gradient at the input; adds the gradients of inner's parameters."""
        ### BEGIN SOLUTION
        _, kept = self.inner.forward(saved)
        return self.inner.backward(dy, kept)
        ### END SOLUTION


# %% nbgrader={"grade_id": "test_checkpoint", "grade": true, "points": 3}
### BEGIN HIDDEN TESTS
# From here on with the right Dropout: a mistake costs its points once.
def right_forward(self, x):
    if not self.training:
        return x, None
    mask = STREAM.random(x.shape) >= self.p
    return x * mask / (1 - self.p), mask


Dropout.forward = right_forward
Dropout.backward = lambda self, dy, saved: dy if saved is None else dy * saved / (1 - self.p)


### END HIDDEN TESTS
def dense(inputs, outputs, number=0):
    return npnet.Dense(inputs, outputs, "tanh", dtype=np.float64, rng=number)


def make_parts(sizes):
    """Two dense layers from each size to the next."""
    pairs = enumerate(itertools.pairwise(sizes))
    return [npnet.Sequential(dense(m, n, 2 * i), dense(n, n, 2 * i + 1)) for i, (m, n) in pairs]


def gradients_of(model):
    return {name: each.gradient for name, each in model.named_parameters().items()}


def check_gradients(got, right, what, hint=""):
    """Compare the gradients of two models, the last parameter first."""
    for (name, a), (_, b) in reversed(
        list(zip(gradients_of(got).items(), gradients_of(right).items(), strict=True))
    ):
        assert a is not None, f"{what}: {name} has no gradient: nobody called its layer's backward"
        try:
            labs.check_array(a, b, f"{what}: the gradient of {name}", exact=True)
        except AssertionError as error:
            raise AssertionError(f"{error}{hint and '. '}{hint}") from None


def batch_for(sizes, batch=6, number=3):
    rng = np.random.default_rng(number)
    return rng.normal(size=(batch, sizes[0])), rng.normal(size=(batch, sizes[-1]))


def check_checkpoint(sizes, around):
    """`around` makes the model of the parts; compared with the parts in a row."""
    parts = make_parts(sizes)
    plain, model = npnet.Sequential(*copy.deepcopy(parts)), around(parts)
    x, dy = batch_for(sizes)
    with labs.unchanged(x=x, dy=dy), labs.told("Checkpoint"):
        answer = model.forward(x)
        y, saved = pair_of(
            answer, "Checkpoint.forward: return two things, y and what backward needs"
        )
        dx = model.backward(dy, saved)
    right_y, right_saved = plain.forward(x)
    right_dx = plain.backward(dy, right_saved)
    call = "Checkpoint"
    labs.check_array(y, right_y, f"{call}: the output", exact=True)
    check_gradients(model, plain, call, "Does inner's backward get dy, and run only once?")
    labs.check_array(dx, right_dx, f"{call}: the gradient at the input", exact=True)


def check_two_batches():
    """forward, forward, backward, backward: each backward pass with what its own forward pass saved."""
    parts = make_parts([4, 3])
    plain, model = npnet.Sequential(*copy.deepcopy(parts)), Checkpoint(parts[0])
    batches = [batch_for([4, 3], number=number) for number in (4, 5)]
    with labs.told("Checkpoint"):
        saved = [model.forward(x)[1] for x, _ in batches]
        got = [model.backward(dy, each) for (_, dy), each in zip(batches, saved, strict=True)]
    right_saved = [plain.forward(x)[1] for x, _ in batches]
    right = [plain.backward(dy, each) for (_, dy), each in zip(batches, right_saved, strict=True)]
    wrong = plain.backward(batches[0][1], plain.forward(batches[1][0])[1])
    words = "forward was called for another batch meanwhile, and this is computed with that one's input: keep x in saved, not in self"
    labs.check_array(
        got[0], right[0], "Checkpoint: the gradient at the input", mistakes={words: wrong}
    )
    labs.check_array(got[1], right[1], "Checkpoint: the gradient at the input, second batch")


def each_part(parts):
    return npnet.Sequential(*(Checkpoint(part) for part in parts))


check_checkpoint([4, 4], each_part)
check_checkpoint([5, 4, 3, 2], each_part)
check_checkpoint([5, 4, 3], lambda parts: Checkpoint(npnet.Sequential(*parts)))
check_two_batches()
### BEGIN HIDDEN TESTS
check_checkpoint(
    [5, 4, 3], lambda parts: Checkpoint(npnet.Sequential(parts[0], Checkpoint(parts[1])))
)
check_checkpoint([3] * 8, each_part)
### END HIDDEN TESTS
print("Checkpoint: the gradients are those without it, bit for bit")


# %% nbgrader={"grade_id": "test_checkpoint_costs", "grade": true, "points": 2}
class Counted(npnet.Layer):
    """A layer that notes each run of it in a list."""

    def __init__(self, inner, calls):
        self.inner, self.calls = inner, calls

    def forward(self, x):
        self.calls.append(1)
        return self.inner.forward(x)

    def backward(self, dy, saved):
        return self.inner.backward(dy, saved)


def check_costs(parts, layers=5, width=40, batch=400):
    calls, x = [], np.ones((batch, width))
    counted = Checkpoint(Counted(dense(width, width), calls))
    with labs.told("Checkpoint"):
        y, saved = counted.forward(x)
        labs.check_calls(len(calls), 1, "runs of inner", name="Checkpoint.forward")
        dx = counted.backward(np.ones_like(y), saved)
    mistakes = {"inner is not run again: you keep what it saved": 1}
    labs.check_calls(len(calls), 2, "runs of inner", mistakes, name="Checkpoint")
    labs.check_computed([y, dx], [x, x], "Checkpoint: output and gradient at the input")
    blocks = [npnet.Sequential(*(dense(width, width) for _ in range(layers))) for _ in range(parts)]
    model = npnet.Sequential(*(Checkpoint(block) for block in blocks))

    def both_passes():
        y, saved = model.forward(x)
        return model.backward(np.ones_like(y), saved)

    gradients = 8 * parts * layers * (width * width + width)
    labs.check_peak(
        both_passes,
        (parts + layers + 5) * x.nbytes + gradients,
        f"the peak with {parts} checkpointed parts of {layers} layers each",
        {
            "nearly every activation is alive at once: keep x, and not what inner saved": (
                0.9 * parts * layers * x.nbytes + gradients
            )
        },
        like=x,
    )


check_costs(6)
check_costs(5, layers=8)
### BEGIN HIDDEN TESTS
check_costs(9, layers=4)
### END HIDDEN TESTS
print("Checkpoint: inner runs twice, and one part is in memory at a time")

# %% [markdown]
# ## 3 It fails, silently
#
# Now a model with dropout in it, five blocks. We checkpoint all blocks, or none; the random numbers begin with
# the same seed, so both forward passes draw the same masks and compute the same loss.


# %% nbgrader={"grade_id": "see_it_fail", "locked": true}
def block(width, number):
    return npnet.Sequential(dense(width, width, number), Dropout(0.3))


def model_with(wrapper, width=30, depth=5):
    """Blocks with dropout, each in wrapper (or not), and a last layer without."""
    blocks = [block(width, number) for number in range(depth)]
    wrapped = blocks if wrapper is None else [wrapper(each) for each in blocks]
    return npnet.Sequential(*wrapped, npnet.Linear(width, 1, dtype=np.float64, rng=99))


LOSS = npnet.MeanSquaredError()


def loss_and_gradients(model, x, y, number=7):
    """One forward and backward pass with the random numbers of a seed."""
    for each in model.parameters():
        each.gradient = None
    seed(number)
    output, saved = model.forward(x)
    value, dy = LOSS.value_and_gradient(output, y)
    model.backward(dy, saved)
    return float(value), [each.gradient for each in model.parameters() if each.gradient.ndim == 2]


rng = np.random.default_rng(8)
x, y = rng.normal(size=(100, 30)), rng.normal(size=(100, 1))
plain, wrapped = model_with(None), model_with(Checkpoint)
value, right = loss_and_gradients(plain, x, y)
value_wrapped, wrong = loss_and_gradients(wrapped, x, y)
print(f"loss without checkpoints {value:.12f}\nloss with checkpoints    {value_wrapped:.12f}")

# Which gradient is the derivative of this loss? Move a few weights of the first layer, with the masks held fixed.
weight, step = plain.parameters()[0], 1e-6
print("\nfirst layer's weight   numerically   without checkpoints   with checkpoints")
for place in [(0, 0), (3, 5), (10, 20)]:
    values = []
    for sign in (1, -1):
        weight.value[place] += sign * step
        values.append(loss_and_gradients(plain, x, y)[0])
        weight.value[place] -= sign * step
    numerical = (values[0] - values[1]) / (2 * step)
    print(f"{place!s:>20}{numerical:>14.8f}{right[0][place]:>22.8f}{wrong[0][place]:>19.8f}")

errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(wrong, right, strict=True)]
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
ax.bar([f"block {i}" for i in range(1, 6)] + ["last layer"], [100 * error for error in errors])
ax.set(
    title="checkpoints without random state: how wrong is the gradient?",
    ylabel="relative error in %",
)
plt.show()

# %% [markdown]
# The loss is right to the last digit, so no curve of the loss gives it away; only the last layer, which is in no
# checkpoint, has its right gradient.
#
# Is it just noise, which averages out in a long training? Dropout is noise, after all. We try the
# smallest model of all, dropout before a linear layer, $\hat y = w^\top (m \odot x)/(1-p)$, for which the
# answer is known. With **one** mask in forward and backward pass, the expectation of the squared error is
#
# $$\mathbb E_m \sum_i (\hat y_i - y_i)^2 = \sum_i (w^\top x_i - y_i)^2 + \frac{p}{1-p} \sum_j w_j^2 \sum_i x_{ij}^2 ,$$
#
# least squares with a penalty on the weights. We train twice: once so, and once with a second
# mask in the backward pass, as the checkpoint above does it.

# %% nbgrader={"grade_id": "bias", "locked": true}
p, samples, features = 0.3, 40, 8
rng = np.random.default_rng(10)
x = rng.normal(size=(samples, features))
y = x @ np.array([2.0, -1.5, 1.0, 0.5, 0, 0, 0, 0]) + rng.normal(size=samples)
least_squares = np.linalg.solve(x.T @ x, x.T @ y)
penalized = np.linalg.solve(x.T @ x + p / (1 - p) * np.diag((x**2).sum(axis=0)), x.T @ y)


def train(masks, steps):
    """The weights, on average over the second half of the training."""
    w, total = np.zeros(features), np.zeros(features)
    seed(11)
    for number in range(steps):
        forward = backward = (STREAM.random(x.shape) >= p) / (1 - p)
        if masks == 2:
            backward = (STREAM.random(x.shape) >= p) / (1 - p)
        w -= 0.02 / samples * ((backward * x).T @ ((forward * x) @ w - y))
        if number >= steps // 2:
            total += w
    return total / (steps - steps // 2)


steps = 100 if labs.grading() else 10_000
trained = {masks: train(masks, steps) for masks in (1, 2)}
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
places = np.arange(features)
ax.bar(places - 0.2, trained[1], 0.38, label="trained, the same mask")
ax.bar(places + 0.2, trained[2], 0.38, label="trained, another mask in backward")
ax.plot(
    places - 0.2,
    penalized,
    "k_",
    markersize=15,
    markeredgewidth=2,
    label="least squares with penalty",
)
ax.plot(
    places + 0.2, least_squares, "rx", markersize=7, label="least squares, as if without dropout"
)
ax.set(title=f"dropout ({p}) before a linear layer", xlabel="weight", ylabel="value after training")
ax.legend(fontsize=9)
plt.show()
for masks in (1, 2):
    print(
        f"{masks} mask(s): distance to least squares {np.linalg.norm(trained[masks] - least_squares):.3f}, "
        f"to least squares with penalty {np.linalg.norm(trained[masks] - penalized):.3f}"
    )

# %% [markdown]
# ### Question 1 (2 points)
#
# * Derive what you see: what is the expectation of the gradient
#   $(\hat y - y)\,\frac{m' \odot x}{1-p}$ when the mask $m'$ is independent of that in $\hat y$?
# * So what did the wrong masks do to dropout, in this model? Would you have noticed by the training loss?

# %% [markdown] nbgrader={"grade_id": "question_bias", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# $m/(1-p)$ has the expectation 1. For independent masks the expectation of the product is the product of the
# expectations: $\mathbb E[\hat y - y]\; \mathbb E[m' \odot x]/(1-p) = (w^\top x - y)\,x$, the gradient of least squares *without*
# dropout. With one mask, $m$ and $\hat y$ are correlated, and $\mathbb E[m_j^2]/(1-p)^2 = 1/(1-p)$ adds the term
# $\frac{p}{1-p} w_j x_j^2$, the penalty. So it is no noise that averages out, but a bias: exactly what dropout is there for, the
# regularization, is gone. What stays is its noise in the loss. The training loss even looks plausible, and falls:
# only a comparison of gradients, with a run without checkpoints or numerically, shows it.
# ### END SOLUTION

# %% [markdown]
# ## 4 The random state
#
# A generator has a *state*: put it back, and the same numbers come again.

# %% nbgrader={"grade_id": "look_at_state", "locked": true}
seed(12)
state = STREAM.bit_generator.state  # a copy
print("drawn:      ", STREAM.random(3))
print("then:       ", STREAM.random(3))
STREAM.bit_generator.state = state
print("put back:   ", STREAM.random(3))
print("the state:  ", state)

# %% [markdown]
# ### Task 3: a checkpoint that preserves it (3 + 2 points)
#
# Write `PreservingCheckpoint`.
#
# 1. `forward` notes the state of `STREAM` **before** `inner` draws. Keep it with `x`.
# 2. `backward` puts that state back for the second run, so that `inner` draws the same numbers.
# 3. Afterwards `STREAM` must stand where it stood **when `backward` was called**. Otherwise the next step draws
#    numbers that were drawn already: all its masks are those of the step before!
#
# The first test looks at 1 and 2 (at the gradients, and at what is drawn), the second one at 3.


# %% nbgrader={"grade_id": "preserving", "solution": true}
class PreservingCheckpoint(Checkpoint):
    """As `Checkpoint`, but the second run draws the random numbers of the first."""

    def forward(self, x):
        """inner's output, and what backward needs."""
        ### BEGIN SOLUTION
        state = STREAM.bit_generator.state
        y, _ = self.inner.forward(x)
        return y, (x, state)
        ### END SOLUTION

    def backward(self, dy, saved):
        """The gradient at the input; adds the gradients of inner's parameters."""
        ### BEGIN SOLUTION
        x, state = saved
        now = STREAM.bit_generator.state
        STREAM.bit_generator.state = state
        try:
            _, kept = self.inner.forward(x)
        finally:  # whatever happens
            STREAM.bit_generator.state = now
        return self.inner.backward(dy, kept)
        ### END SOLUTION


def checkpoint(part, preserve_rng_state=True):
    """`part`, of which only the input is kept."""
    return PreservingCheckpoint(part) if preserve_rng_state else Checkpoint(part)


# %% nbgrader={"grade_id": "test_preserving", "grade": true, "points": 3}
### BEGIN HIDDEN TESTS
# From here on with the right Checkpoint.
def right_checkpoint_forward(self, x):
    return self.inner.forward(x)[0], x


def right_checkpoint_backward(self, dy, saved):
    _, kept = self.inner.forward(saved)
    return self.inner.backward(dy, kept)


Checkpoint.forward, Checkpoint.backward = right_checkpoint_forward, right_checkpoint_backward


### END HIDDEN TESTS
class Noting(npnet.Layer):
    """Draws three random numbers in each run, and notes them."""

    def __init__(self):
        self.noted = []

    def forward(self, x):
        self.noted.append(STREAM.random(3))
        return x.copy(), None

    def backward(self, dy, saved):
        return dy.copy()


def check_draws():
    x, noting = np.ones((2, 2)), Noting()
    part = checkpoint(noting)
    seed(13)
    STREAM.random(5)  # the stream does not stand at its beginning
    with labs.told("PreservingCheckpoint"):
        answer = part.forward(x)
        y, saved = pair_of(answer, "PreservingCheckpoint.forward: return two things, y and saved")
        STREAM.random(4)  # as the layers behind do
        part.backward(np.ones_like(y), saved)
    assert len(noting.noted) == 2, (
        f"PreservingCheckpoint: inner ran {len(noting.noted)} times, in forward and backward together; expected 2"
    )
    first, second = noting.noted
    seed(13)
    numbers = STREAM.random(20)
    assert np.array_equal(first, numbers[5:8]), (
        "PreservingCheckpoint.forward: inner draws other numbers than without a checkpoint; forward only has to "
        "note the state, not to change it"
    )
    words = "the second run draws other numbers than the first"
    if np.array_equal(second, numbers[12:15]):
        words = "the second run draws what comes next in the stream: the state is not put back before it"
    elif np.array_equal(second, numbers[8:11]):
        words = "the second run draws what comes after the first: you note the state when inner has drawn; note it before"
    elif np.array_equal(second, numbers[:3]):
        words = "the second run begins with the seed's first numbers; put back the state that forward found"
    assert np.array_equal(first, second), f"PreservingCheckpoint.backward: {words}"


def check_preserving(around, depth=4, width=6):
    blocks = [block(width, number) for number in range(depth)]
    plain, model = npnet.Sequential(*copy.deepcopy(blocks)), around(blocks)
    x, dy = batch_for([width, width], batch=20)
    seed(14)
    right_y, right_saved = plain.forward(x)
    right_dx = plain.backward(dy, right_saved)
    seed(14)
    with labs.unchanged(x=x, dy=dy), labs.told("PreservingCheckpoint"):
        y, saved = model.forward(x)
        dx = model.backward(dy, saved)
    labs.check_array(y, right_y, "PreservingCheckpoint: the output", exact=True)
    check_gradients(
        model, plain, "PreservingCheckpoint", "Are the masks those of the forward pass?"
    )
    labs.check_array(dx, right_dx, "PreservingCheckpoint: the gradient at the input", exact=True)


check_draws()
check_preserving(lambda blocks: npnet.Sequential(*map(checkpoint, blocks)))
check_preserving(lambda blocks: checkpoint(npnet.Sequential(*blocks)))
check_preserving(lambda blocks: npnet.Sequential(blocks[0], checkpoint(blocks[1]), *blocks[2:]))
### BEGIN HIDDEN TESTS
check_preserving(
    lambda blocks: checkpoint(npnet.Sequential(blocks[0], checkpoint(blocks[1]), *blocks[2:]))
)
check_preserving(lambda blocks: npnet.Sequential(*map(checkpoint, blocks)), depth=9)
### END HIDDEN TESTS
print("PreservingCheckpoint: the second run draws what the first one drew")


# %% nbgrader={"grade_id": "test_stream", "grade": true, "points": 2}
def check_stream(parts):
    noting, x = [Noting() for _ in range(parts)], np.ones((2, 2))
    model = npnet.Sequential(*map(checkpoint, noting))
    seed(15)
    with labs.told("PreservingCheckpoint"):
        y, saved = model.forward(x)
        dx = model.backward(np.ones_like(y), saved)
    got = STREAM.random(3)
    labs.check_computed([y, dx], [x, x], "PreservingCheckpoint: output and gradient at the input")
    runs = sum(len(each.noted) for each in noting)
    words = {"backward does not run inner again, so that the stream stands still": parts}
    labs.check_calls(runs, 2 * parts, "runs of inner", words, name="PreservingCheckpoint")
    seed(15)
    numbers = [STREAM.random(3) for _ in range(2 * parts + 1)]
    words = "the stream stands elsewhere than before it"
    if any(np.array_equal(got, drawn) for drawn in numbers[:parts]):
        words = (
            "the stream stands where the second run left it, so the next step draws numbers that were drawn "
            "already: put the state back to what backward found"
        )
    elif any(np.array_equal(got, drawn) for drawn in numbers[parts + 1 :]):
        words = "the stream has moved on, as if the second run had drawn from it: put the state back to what backward found"
    assert np.array_equal(got, numbers[parts]), f"after PreservingCheckpoint.backward, {words}"


check_stream(1)
check_stream(4)
### BEGIN HIDDEN TESTS
check_stream(10)
### END HIDDEN TESTS
print("PreservingCheckpoint: afterwards, the stream goes on as if there were no checkpoint")

# %% [markdown]
# Now the same experiment again. Both models train for some steps; every weight stays the same, bit for bit.


# %% nbgrader={"grade_id": "see_it_right", "locked": true}
def train_model(wrapper, steps=20):
    """The losses, and the weights."""
    model, optimizer = model_with(wrapper), npnet.Adam(1e-2)
    rng = np.random.default_rng(16)
    x = rng.normal(size=(100, 30))
    y = np.tanh(x[:, :1] + x[:, 1:2]) + 0.1 * rng.normal(size=(100, 1))
    seed(17)
    losses = []
    for _ in range(steps):
        output, saved = model.forward(x)
        value, dy = LOSS.value_and_gradient(output, y)
        model.backward(dy, saved)
        optimizer.step(model.parameters())
        losses.append(float(value))
    return losses, [each.value for each in model.parameters()]


plain_losses, plain_weights = train_model(None)
for name, wrapper in {"Checkpoint": Checkpoint, "PreservingCheckpoint": checkpoint}.items():
    losses, weights = train_model(wrapper)
    same = all(map(np.array_equal, weights, plain_weights))
    print(
        f"{name:>20}: losses {losses[0]:.6f}, {losses[1]:.6f}, ..., {losses[-1]:.6f}; weights as without: {same}"
    )
print(
    f"{'without':>20}: losses {plain_losses[0]:.6f}, {plain_losses[1]:.6f}, ..., {plain_losses[-1]:.6f}"
)

# %% [markdown]
# There is another way. A *counter-based* generator has no state to put back: its numbers are a function of a
# key and a counter. npnet's own `Dropout` draws its mask from (key of the layer, number of the step), so that a
# second run in the same step gives the same mask; nothing is kept, and nothing has to be put back, on a GPU
# either. `preserve_rng_state=False` gives the second run a step number of its own. And it can be found out:

# %% nbgrader={"grade_id": "by_npnet", "locked": true}
for preserve in (True, False):
    part = npnet.checkpoint.checkpoint(
        npnet.Dropout(0.5, key=1), preserve_rng_state=preserve, determinism_check=True
    )
    y, saved = part.forward(np.ones((4, 4)))
    try:
        part.backward(np.ones_like(y), saved)
        print(f"preserve_rng_state={preserve}: the second run gave the numbers of the first")
    except npnet.checkpoint.NondeterministicLayer as error:
        print(f"preserve_rng_state={preserve}: NondeterministicLayer: {error}")
print("\nstates of generators, as they would have to be kept for each checkpoint:")
print("  PCG64 (NumPy's default):    2 x 16 bytes")
print(f"  MT19937 (np.random.seed):   {np.random.MT19937(0).state['state']['key'].nbytes} bytes")
print("  Philox, by key and counter: none")

# %% [markdown]
# Where PyTorch is installed, it shows the same:

# %% nbgrader={"grade_id": "pytorch", "locked": true}
try:
    import torch
    from torch.utils.checkpoint import checkpoint as torch_checkpoint
except ImportError:
    torch = None
    print("PyTorch is not installed: comparison skipped. (Nothing else needs it.)")
if torch is not None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(6, 1), torch.nn.Tanh())
    found = {}
    for name, preserve in {"without": None, "preserved": True, "not preserved": False}.items():
        x = torch.arange(24.0).reshape(4, 6).div(24).requires_grad_()
        torch.manual_seed(1)
        if preserve is None:
            output = module(x)
        else:
            output = torch_checkpoint(module, x, use_reentrant=False, preserve_rng_state=preserve)
        output.sum().backward()
        found[name] = x.grad.numpy()
        same = np.array_equal(found[name], found["without"])
        print(
            f"{name:>13}: sum {output.sum().item():.6f}; the gradient is that without a checkpoint: {same}"
        )

# %% [markdown]
# ### Question 2 (2 points)
#
# * A colleague writes a layer that draws from a generator of its own, `self.rng = np.random.default_rng(5)`, and puts
#   it into your `checkpoint`. What happens, and why? (The same trap exists in PyTorch, which preserves the states of
#   its default generators only.) Name two ways to repair it.
# * Batch normalization draws nothing, but updates running averages in each forward pass. Is a checkpoint around it
#   right? What is with its gradient, what with its averages?

# %% [markdown] nbgrader={"grade_id": "question_state", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# The checkpoint notes and puts back the state of `STREAM`; the layer's own generator just goes on, so that the
# second run draws other numbers, and the gradient is wrong, silently, as in part 3. Repairs: let the layer
# draw from `STREAM`; let the checkpoint be told which generators to preserve; let the layer draw from a
# counter-based generator, by key and step; keep the mask from the first run. A check that compares the outputs of both
# runs finds it (`determinism_check`).
#
# In training, batch normalization uses the statistics of the batch, which are the same in both runs: its gradient is right. But the
# averages are updated twice a step, so they move with another momentum: $1-(1-\mu)^2$ for $\mu$. Evaluation then
# differs. Random state is one kind of *hidden state*; a recomputation must not have side effects.
# ### END SOLUTION

# %% [markdown]
# ## 5 Which parts?
#
# Not every part is worth a checkpoint. What it saves are the bytes *inside* the part (its input is kept by the
# part before, anyway); what it costs is its forward pass. Here is a model of nine parts, and npnet's account of them:


# %% nbgrader={"grade_id": "parts", "locked": true}
class Part(NamedTuple):
    """A part of a model: bytes inside, kept if it is not checkpointed; flops to run it again."""

    name: str
    inside: int
    flops: int


def make_part(kind, number, width=64):
    """Three kinds: elementwise operations, a wide one (as in a transformer's MLP), a deep one."""
    if kind == "elementwise":
        twice = [[npnet.LayerNorm(width), npnet.GELU("tanh"), Dropout(0.1)] for _ in range(2)]
        return npnet.Sequential(*twice[0], *twice[1])
    if kind == "wide":
        up, down = npnet.Linear(width, 128, rng=number), npnet.Linear(128, width, rng=number + 1)
        return npnet.Sequential(up, npnet.GELU("tanh"), Dropout(0.1), down)
    return npnet.mlp([width] * 5, "tanh", rng=number)


KINDS = ["wide", "elementwise", "deep"] * 3
BATCH = 100 if labs.grading() else 1000


def account(number, kind):
    """What npnet's layers say of themselves (your Dropout says nothing, so npnet's stands in)."""
    part = make_part(kind, number)
    part.layers = [
        npnet.Dropout(0.1) if isinstance(each, Dropout) else each for each in part.layers
    ]
    cost = part.cost((BATCH, 64), np.dtype(np.float32))
    return Part(f"{kind} {number // 3 + 1}", cost.saved_bytes, cost.forward_flops)


PARTS = [account(number, kind) for number, kind in enumerate(KINDS)]
print("part              inside      flops to run again     bytes saved per kiloflop")
for part in PARTS:
    print(
        f"{part.name:<16}{format_bytes(part.inside):>8}{part.flops / 1e6:>18.1f} million{1e3 * part.inside / part.flops:>18.1f}"
    )

# %% [markdown]
# A checkpointed part takes no memory until its backward pass; then it is restored, and everything in it is there
# for a moment. The parts behind have been freed by then. This function finds the worst moment:


# %% nbgrader={"grade_id": "most_inside", "locked": true}
def most_inside(parts, chosen):
    """The most bytes inside parts at any time, with checkpoints around the parts with indices `chosen`."""
    before, most = 0, 0
    for index, part in enumerate(parts):
        most = max(most, before + part.inside)  # the backward pass of this part
        before += 0 if index in chosen else part.inside
    return most


def flops_again(parts, chosen):
    return sum(parts[index].flops for index in chosen)


everything = range(len(PARTS))
for name, chosen in {
    "none": [],
    "all": everything,
    "all but the first and the last": range(1, 8),
}.items():
    print(
        f"{name:<32} most inside {format_bytes(most_inside(PARTS, chosen)):>8}, again {flops_again(PARTS, chosen) / 1e6:>6.1f} million flops"
    )

# %% [markdown]
# ### Task 4: selective checkpointing (3 points)
#
# Write `choose(parts, budget)`: a sorted list of the indices of the parts to checkpoint, such that `most_inside` is
# at most `budget` bytes and `flops_again` is least. With nine parts there are 512 choices: try all of them. If none fits, raise a
# `ValueError` that says which budget would be enough.


# %% nbgrader={"grade_id": "choose", "solution": true}
def choose(parts, budget):
    """The indices of the parts to checkpoint: least flops within the budget (bytes, for what is inside)."""
    ### BEGIN SOLUTION
    indices = range(len(parts))
    every = [chosen for n in range(len(parts) + 1) for chosen in itertools.combinations(indices, n)]
    fitting = [chosen for chosen in every if most_inside(parts, chosen) <= budget]
    if not fitting:
        least = min(most_inside(parts, chosen) for chosen in every)
        raise ValueError(f"no choice fits {budget} bytes; {least} are enough")
    return list(min(fitting, key=lambda chosen: flops_again(parts, chosen)))
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_choose", "grade": true, "points": 3}
def result_or_error(function, *arguments):
    """What it returned, or the error that it raised."""
    try:
        return function(*arguments), None
    except NotImplementedError:
        raise
    except Exception as error:
        return None, error


def masks_of(parts):
    """All choices, as sets of indices."""
    for bits in range(2 ** len(parts)):
        yield {index for index in range(len(parts)) if bits >> index & 1}


def greedy(parts, budget, key):
    """Checkpoint one part after the other, the one with the largest key first, until it fits."""
    chosen = []
    for index in sorted(range(len(parts)), key=lambda index: key(parts[index]), reverse=True):
        if most_inside(parts, chosen) <= budget:
            break
        chosen.append(index)
    return sorted(chosen)


def check_choose(parts, budget):
    call = f"choose, {len(parts)} parts, budget {budget:,} bytes"
    fitting = [chosen for chosen in masks_of(parts) if most_inside(parts, chosen) <= budget]
    least = min(most_inside(parts, chosen) for chosen in masks_of(parts))
    if not fitting:
        got, error = result_or_error(choose, parts, budget)
        words = (
            f"{call}: nothing fits; expected a ValueError, got {got if error is None else error!r}"
        )
        assert isinstance(error, ValueError), words
        plain = str(error).replace(",", "").replace("_", "")
        words = (
            f"{call}: the error has to name the budget that is enough, {least}; it says: {error}"
        )
        assert str(least) in plain, words
        return
    with labs.told(call):
        got = choose(parts, budget)
    kind = None if got is None else type(got).__name__
    assert isinstance(got, (list, tuple)), f"{call}: expected a list of indices, got {kind}"
    got = list(got)
    assert got == sorted(set(got)), f"{call}: expected sorted indices without repetition, got {got}"
    assert set(got) <= set(range(len(parts))), f"{call}: there are no such parts: {got}"
    inside, flops = most_inside(parts, got), flops_again(parts, got)
    assert inside <= budget, f"{call}: your {got} takes {inside:,} bytes"
    right = min(flops_again(parts, chosen) for chosen in fitting)
    strictly = [each for each in fitting if most_inside(parts, each) < budget]
    words = ""
    if got == min(map(sorted, fitting), key=lambda chosen: most_inside(parts, chosen)):
        words = ". You take what needs the least memory; of all that fits, take what is cheapest"
    elif flops in [min(flops_again(parts, each) for each in strictly or [got])]:
        words = f". {budget:,} bytes are not more than {budget:,}: that fits, too"
    elif got == greedy(parts, budget, lambda part: part.inside):
        words = ". Do you take the largest parts first, until it fits? Try all choices"
    elif got == greedy(parts, budget, lambda part: part.inside / part.flops):
        words = (
            ". Do you take the best ratio first, until it fits? Good, but not always best: try all"
        )
    elif got == min(map(sorted, fitting), key=len):
        words = ". Do you take the fewest parts? Asked are the fewest flops"
    elif flops == max(flops_again(parts, chosen) for chosen in fitting):
        words = ". Of all that fits, this costs most"
    assert flops == right, (
        f"{call}: your {got} runs {flops:,} flops again, {right:,} suffice{words}"
    )


SMALL = [
    Part("a", 50, 90),
    Part("b", 30, 20),
    Part("c", 40, 10),
    Part("d", 20, 60),
    Part("e", 30, 30),
]
for budget in (170, 140, 130, 100, 60, 50, 40):
    check_choose(SMALL, budget)
for share in (1.0, 0.6, 0.3):
    check_choose(PARTS, int(share * most_inside(PARTS, [])))
### BEGIN HIDDEN TESTS
rng = np.random.default_rng(18)
for count in (1, 3, 6):
    for _ in range(5):
        parts = [Part(str(i), *rng.integers(1, 100, 2).tolist()) for i in range(count)]
        check_choose(parts, int(rng.integers(1, 1.2 * most_inside(parts, []))))
### END HIDDEN TESTS
print("choose: right")

# %% [markdown]
# Is it so? We build the model, wrap what is chosen, and measure: the peak of a forward and backward pass, and its time.
# (`backpropagate` frees what a part saved as soon as its backward pass is done. The inputs of the parts, their
# gradients, and what a single layer needs while it computes come on top of what is inside.)
# Three rules of thumb stand beside your choices: all parts, the middle ones, and every third
# ($\sqrt 9 = 3$).


# %% nbgrader={"grade_id": "measure_choices", "locked": true}
def passes(chosen):
    """A function that runs the model with these parts checkpointed, forward and backward, once."""
    parts = [make_part(kind, number) for number, kind in enumerate(KINDS)]
    model = npnet.Sequential(
        *(checkpoint(part) if index in chosen else part for index, part in enumerate(parts))
    )
    x = np.random.default_rng(19).standard_normal((BATCH, 64), dtype=np.float32)

    schedule = schedules.none(len(KINDS), range(1, len(KINDS) + 1))  # the parts need what they save

    def run():
        seed(20)
        npnet.checkpoint.clear_gradients(model.layers)
        npnet.checkpoint.backpropagate(model.layers, schedule, x, np.ones_like, needs_dx=True)

    return run


none = most_inside(PARTS, [])
rules = {"none": [], "all": [*range(9)], "middle": [*range(1, 8)], "every third": [0, 3, 6]}
budgets = [int(share * none) for share in ((0.5,) if labs.grading() else (0.8, 0.6, 0.5, 0.4, 0.3))]
choices = rules | {f"budget {budget / 1e6:.1f} MB": choose(PARTS, budget) for budget in budgets}
runs = {name: passes(chosen) for name, chosen in choices.items()}
peaks = {name: measure_peak(run).increase_bytes for name, run in runs.items()}
seconds = {name: [] for name in runs}
for number in range(2 if labs.grading() else 6):
    for (
        name,
        run,
    ) in runs.items():  # in turns, so that whatever else the machine does hits all alike
        start = time.perf_counter()
        run()
        if number:
            seconds[name].append(time.perf_counter() - start)
forward_flops = sum(part.flops for part in PARTS)
print(
    "checkpoints        parts                  inside     flops again   peak (MB)   time (ms)   ratio"
)
for name, chosen in choices.items():
    extra, milliseconds = flops_again(PARTS, chosen) / forward_flops, 1e3 * median(seconds[name])
    print(
        f"{name:<19}{','.join(map(str, chosen)):<19}{most_inside(PARTS, chosen) / 1e6:>7.2f} MB{extra:>15.0%}"
        f"{peaks[name] / 1e6:>12.2f}{milliseconds:>12.1f}{median(seconds[name]) / median(seconds['none']):>8.2f}"
    )

figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
grid = sorted({most_inside(PARTS, chosen) for chosen in masks_of(PARTS)})
grid = grid[:: max(1, len(grid) // 15)]
best = [100 * flops_again(PARTS, choose(PARTS, budget)) / forward_flops for budget in grid]
ax.plot(np.array(grid) / 1e6, best, "o-", markersize=4, drawstyle="steps-post", label="your choice")
for (name, chosen), marker in zip(rules.items(), "s^vD", strict=True):
    extra = 100 * flops_again(PARTS, chosen) / forward_flops
    ax.plot(most_inside(PARTS, chosen) / 1e6, extra, marker, markersize=9, label=name)
ax.set(
    title="nine parts: what the memory costs",
    xlabel="most bytes inside parts (MB)",
    ylabel="flops again, % of a forward pass",
    xlim=0,
)
ax.legend()
plt.show()

# %% [markdown]
# ### Question 3 (2 points)
#
# * Which parts are chosen first as the budget shrinks, and why? In a transformer, what would you checkpoint by this rule:
#   the large matrix products, or the softmax and dropout of attention, which have many numbers and few flops each?
# * The last part is never chosen. Why does a checkpoint around it save nothing?
# * For 2 % of a forward pass the measured peak falls by about a fifth; for a third of a forward pass, by two fifths; for
#   all of it, by little more than a half. Is there *the* price of checkpointing? What does the square-root rule (every third) overlook here?

# %% [markdown] nbgrader={"grade_id": "question_choice", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# The elementwise ones: they save 585 bytes per kiloflop, twelve times as much as the wide and 25 times as much as the deep
# ones. In a transformer it is the softmax and dropout of attention (batch x heads x length x length numbers): this is selective
# recomputation, which saves most of the activations' memory for a few per cent of the flops; the matrix products' outputs are kept.
#
# The backward pass of the last part comes at once: all that is inside it is needed right now, with a
# checkpoint as without. Only its forward pass would be run twice. (Labs 1 and 2 keep the last segment for the same reason.)
#
# There is no one price: memory has a curve of prices, and its beginning is nearly free. "A third more time" is what it costs to checkpoint
# everything. The square-root rule supposes that all layers are alike; it counts layers, and neither bytes nor flops. Here it takes the wide parts, and
# leaves the elementwise ones, the best bargain, as they are.
# ### END SOLUTION

# %% [markdown]
# ## 6 With and without on one command line
#
# A comparison is worth most when anybody can repeat it: `python run.py True`, `python run.py False`.
#
# ### Task 5: the switch (2 points)
#
# Write `use_checkpoint(arguments)`. It gets the words of the command line, as `sys.argv[1:]` gives them (a list of
# *strings*), and returns `True` or `False`. The words are "True" and "False", in capital or small letters; without any,
# it is `False`. Anything else is a `ValueError` that quotes the word.


# %% nbgrader={"grade_id": "switch", "solution": true}
def use_checkpoint(arguments):
    """Whether to checkpoint, by the words of the command line."""
    ### BEGIN SOLUTION
    word = arguments[0] if arguments else "False"
    if word.lower() not in ("true", "false"):
        raise ValueError(f"expected True or False, got {word!r}")
    return word.lower() == "true"
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_switch", "grade": true, "points": 2}
def check_switch(arguments, right):
    with labs.told(f"use_checkpoint({arguments})"):
        got = use_checkpoint(arguments)
    assert isinstance(got, bool), (
        f"use_checkpoint({arguments}): expected True or False, got {got!r}"
    )
    words = ""
    if arguments and arguments[0] == "False" and got:
        words = (
            ': bool("False") is True, as is that of every word but the empty one. Compare the words'
        )
    elif arguments and got != right:
        words = ": in capital or small letters"
    assert got is right, f"use_checkpoint({arguments}) gives {got}{words}"


def check_refused(word):
    got, error = result_or_error(use_checkpoint, [word])
    got = got if error is None else error
    assert isinstance(error, ValueError), (
        f"use_checkpoint([{word!r}]): expected a ValueError, got {got!r}"
    )
    assert word in str(error), f"use_checkpoint([{word!r}]): quote the word in the error: {error}"


check_switch(["True"], True)
check_switch(["False"], False)
check_switch(["true"], True)
check_switch([], False)
check_refused("maybe")
### BEGIN HIDDEN TESTS
check_switch(["false"], False)
check_switch(["TRUE"], True)
check_refused("Falsehood")
check_refused("2")
### END HIDDEN TESTS
print("use_checkpoint: right")

# %% [markdown]
# The next cell writes a program around your function, and runs it as a shell would, each time in a fresh process:
# a deep network with dropout, some steps, the peak of the memory that they take. Its first and last layer stay outside of the checkpoints.

# %% nbgrader={"grade_id": "run_program", "locked": true}
PROGRAM = '''"""Train a network with dropout, with checkpoints or without: python run.py True | False"""
import sys
import time

import numpy as np

import npnet
from npnet.checkpoint import checkpoint


{switch}

def train(checkpointed, steps):
    """Losses and weights do not depend on `checkpointed`."""
    npnet.set_seed(0)
    middle = [
        npnet.Sequential(npnet.Dense(128, 128), npnet.Dropout(0.1), npnet.Dense(128, 128), npnet.Dropout(0.1))
        for _ in range(4)
    ]
    if checkpointed:
        middle = [checkpoint(part) for part in middle]
    model = npnet.Sequential(npnet.Dense(20, 128), *middle, npnet.Linear(128, 1))
    rng, optimizer, loss = np.random.default_rng(1), npnet.Adam(1e-3), npnet.MeanSquaredError()
    for _ in range(steps):
        x = rng.standard_normal((1000, 20), dtype=np.float32)
        y = x.sum(axis=1, keepdims=True)
        value = npnet.add_gradients(model, loss, x, y)
        optimizer.step(model.parameters())
    return value


if __name__ == "__main__":
    checkpointed = use_checkpoint(sys.argv[1:])
    start = time.perf_counter()
    value = train(checkpointed, 10)
    seconds = time.perf_counter() - start
    peak = npnet.measure_peak(train, checkpointed, 2).increase_bytes
    print(f"checkpoint = {{checkpointed!s:<5}}  last loss {{value:.6f}}   {{seconds:.2f}} s   peak {{peak / 1e6:.2f}} MB")
'''

if labs.grading():
    print("(not run when the lab is graded)")
else:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "run.py"
        program.write_text(
            PROGRAM.format(switch=inspect.getsource(use_checkpoint)), encoding="utf-8"
        )
        for word in ("False", "True"):
            print(f"$ python run.py {word}")
            done = subprocess.run(
                [sys.executable, program, word], capture_output=True, text=True, check=False
            )
            print(done.stdout or done.stderr)

# %% [markdown]
# The same comparison comes with npnet: `npnet train --checkpoint-every 0` and `npnet train --checkpoint-every 5` train
# on MNIST without and with, and `npnet compare` makes the tables.
#
# ## What you have learnt
#
# * A checkpoint around a part keeps the part's input, and runs it again right before its backward pass. It
#   works wherever the part stands, and inside other checkpoints.
# * If the second run draws other random numbers, the gradient is another function's. The loss does not show it.
#   It is not noise: with dropout before a linear layer, exactly the regularization is lost.
# * To preserve: note the state before the first run, put it back for the second, and afterwards let the stream go
#   on where it was. Or draw by key and counter, and there is no state.
# * Selective checkpointing: run again what has many bytes and few flops. The last part gains nothing.
# * Compare gradients, bit for bit, and not only losses; and let everybody repeat it by one command.
#
# ## To read
#
# * N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever and R. Salakhutdinov, "Dropout: a simple way to prevent neural
#   networks from overfitting", *Journal of Machine Learning Research* 15, 2014; section 9.1: the penalty above.
# * J. Salmon, M. Moraes, R. Dror and D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", *SC '11*, 2011: random
#   numbers by key and counter.
# * V. Korthikanti, J. Casper, S. Lym, L. McAfee, M. Andersch, M. Shoeybi and B. Catanzaro, "Reducing activation
#   recomputation in large transformer models", 2022, arXiv:2205.05198: selective, for attention.
# * T. Chen, B. Xu, C. Zhang and C. Guestrin, "Training deep nets with sublinear memory cost", 2016, arXiv:1604.06174.
# * The documentation of `torch.utils.checkpoint`: `preserve_rng_state`, and what it does not preserve.
