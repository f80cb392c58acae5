# %% [markdown]
# # Lab 4: Gradient accumulation
#
# Activations take memory in proportion to the batch. *Gradient accumulation* cuts the batch into
# *micro-batches*, runs them one after the other, adds up their gradients, and updates once. The
# activations are those of one micro-batch; the update is that of the large batch.
#
# You will write it in a dozen lines. What is difficult is not the loop: it is by which number each gradient
# is multiplied, what happens to the samples that are left over, and what is still alive without anybody
# wanting it.
#
# | part | you write | points |
# | --- | --- | --- |
# | 1 Why the loss is scaled | `combine`; a question | 3 + 2 |
# | 2 A window of micro-batches | `accumulate`: its gradients, its memory | 4 + 2 |
# | 3 An epoch, and the partial window | `train_epoch` | 5 |
# | 4 What it saves | `accumulation_steps_for`; a question | 3 + 2 |
# | 5 What it does not do | nothing: you watch; a question | 2 |
#
# It takes about an hour. Write where it says `YOUR CODE HERE` or `YOUR ANSWER HERE`. Below each task is
# a cell of tests: run it, and it says what is wrong. (There are more tests when the lab is graded.)

# %% nbgrader={"grade_id": "setup", "locked": true}
import copy

import matplotlib.pyplot as plt
import numpy as np

import npnet
from npnet import labs, measure_peak, plots, schedules
from npnet.memory import format_bytes

patients, diabetes = npnet.load_diabetes(standardize=True)
print(f"patients: {patients.shape}, {patients.dtype}; diabetes: {diabetes.shape}, 0 or 1")


# %% nbgrader={"grade_id": "helpers", "locked": true}
# What the tests and the pictures need. There is no need to read it.
def a_batch(samples, inputs=5, outputs=3, seed=0):
    """A small classification problem: rows x, (samples, inputs), and one-hot labels, (samples, outputs)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, inputs))
    return x, npnet.one_hot(rng.integers(outputs, size=samples), outputs)


def cut(x, y, sizes):
    """The rows in micro-batches of these sizes."""
    ends = np.cumsum(sizes)
    return [(x[end - n : end], y[end - n : end]) for n, end in zip(sizes, ends, strict=True)]


def gradient_of(model, loss, x, y):
    """The gradients of the mean loss of these rows, by npnet: {name of the parameter: array}."""
    return npnet.value_and_grad(copy.deepcopy(model), loss, x, y)[1]


# %% [markdown]
# ## 1 Why the loss is scaled
#
# The loss of a batch of $N$ samples is a **mean** over them, and so is its gradient:
#
# $$L = \frac1N \sum_{i=1}^{N} \ell_i, \qquad \nabla L = \frac1N \sum_{i=1}^{N} \nabla \ell_i.$$
#
# Cut the batch into $K$ micro-batches of $N_1, \dots, N_K$ samples. What a backward pass gives for the
# $k$-th of them is the gradient of *its own* mean, $\nabla L_k = \frac{1}{N_k}\sum \nabla\ell_i$. And a
# backward pass **adds** to the gradients that are there: after $K$ of them the parameters hold the sum
# of $K$ means. That is not the mean of all, unless something is done about it.
#
# ### Task 1: from the gradients of the parts to that of the whole (3 points)
#
# Given are $\nabla L_1, \dots, \nabla L_K$ and $N_1, \dots, N_K$. Write `combine`, which returns
# $\nabla L$. The micro-batches may have different sizes: the last of a data set nearly always has.
#
# Do not change the arrays you are given.


# %% nbgrader={"grade_id": "combine", "solution": true}
def combine(gradients, sizes):
    """The gradient of the mean loss of all samples.

    Args:
        gradients: a list of arrays of one shape: for each micro-batch the gradient of the mean loss of its samples.
        sizes: a list of whole numbers: how many samples each micro-batch has.

    Returns:
        An array of that shape.
    """
    ### BEGIN SOLUTION
    samples = sum(sizes)
    return sum(gradient * (size / samples) for gradient, size in zip(gradients, sizes, strict=True))
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_combine", "grade": true, "points": 3}
def check_combine(sizes):
    model, loss = npnet.mlp([5, 4, 3], "tanh", rng=1, dtype=np.float64), npnet.SoftmaxCrossEntropy()
    x, y = a_batch(sum(sizes))
    parts = [gradient_of(model, loss, *part)["0.weight"] for part in cut(x, y, sizes)]
    with labs.unchanged(gradients=parts, sizes=sizes), labs.told("combine"):
        got = combine(parts, sizes)
    mistakes = {
        "this is the sum of the micro-batches' gradients, each of them the gradient of a mean. It is about "
        f"{len(sizes)} times too large: the loss is not scaled": np.sum(parts, axis=0),
        "this is the mean of the means, in which every micro-batch counts the same; but they have "
        f"{sizes} samples, and every *sample* has to count the same": np.mean(parts, axis=0),
        "this is the gradient of the last micro-batch alone": parts[-1],
    }
    right = gradient_of(model, loss, x, y)["0.weight"]
    labs.check_array(got, right, f"combine, sizes {sizes}", batch=sum(sizes), mistakes=mistakes)


check_combine([4, 4, 4])
check_combine([8, 8, 5])
### BEGIN HIDDEN TESTS
check_combine([6])
check_combine([1, 2, 30])
### END HIDDEN TESTS
print("combine: right")

# %% [markdown]
# In practice nobody keeps the $K$ gradients in a list: that would take the memory of $K$ models. The factor
# goes into the **loss** of each micro-batch before its backward pass. A backward pass is linear in the
# gradient that it begins with, so a factor there is a factor in every gradient of every layer, and it is
# multiplied on the smallest array there is.
#
# With equal sizes the factor is $1/K$, and that is what one reads everywhere: `loss = loss / K`. With other
# sizes that is wrong. In 2024 this was found in widely used code for training language models: sequences
# have different numbers of tokens, each micro-batch took the mean over its own tokens, and then all
# counted the same.
#
# Here is what happens to the training when the factor is forgotten, with two optimizers. All four runs begin with the
# same weights, and see the same samples in the same order:

# %% nbgrader={"grade_id": "look_at_scaling", "locked": true}
updates, learning_rate = 3 if labs.grading() else 30, 1.0
loss = npnet.BCEWithLogits()


def by_hand(factor, optimizer, updates=updates, accumulation_steps=6):
    """The loss of 768 patients at each update: 6 micro-batches of 128, each loss multiplied by ``factor``."""
    model, values = npnet.mlp([8, 32, 16, 1], rng=0, dtype=np.float64), []
    for _ in range(updates):
        values.append(float(loss(model.predict(patients), diabetes)))
        for x, y in cut(patients, diabetes, [128] * accumulation_steps):
            npnet.add_gradients(model, loss, x, y, weight=factor)
        optimizer.step(model.parameters())
    return values


figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
for ax, name, make in [
    (axes[0], "SGD", lambda: npnet.SGD(learning_rate)),
    (axes[1], "Adam", lambda: npnet.Adam(0.01)),
]:
    ax.plot(by_hand(1 / 6, make()), label="scaled: 1/6 of each loss")
    ax.plot(by_hand(1.0, make()), "--", label="not scaled")
    ax.set(title=name, xlabel="update", ylim=(0, 2))
axes[0].set_ylabel("loss of all 768 patients")
axes[0].legend()
plt.show()

# %% [markdown]
# ### Question 1 (2 points)
#
# * With SGD, what else could one have changed, instead of leaving out the factor, to get exactly the dashed
#   curve?
# * With Adam one hardly sees the mistake. Why? (How does Adam's update change when every gradient is
#   multiplied by the same number?) Name one thing in a usual training that goes wrong with Adam all the same.

# %% [markdown] nbgrader={"grade_id": "question_scale", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# A sum of 6 gradients is 6 times their mean: with SGD that is the learning rate times 6, 6 instead of 1.
# Adam divides the mean of the gradients by the root of the mean of their squares; a common factor cancels,
# but for the small $\epsilon$ in the denominator. So training goes on nearly unchanged, and nobody notices.
# What is compared with an absolute size does go wrong: clipping to a norm cuts gradients that are $K$ times
# too large, weight decay that is added to the gradient weighs $K$ times less, the loss in the log is $K$
# times too large, and in half precision gradients overflow earlier.
# ### END SOLUTION

# %% [markdown]
# ## 2 A window of micro-batches
#
# The micro-batches that make up one update are a *window*. This is what you need of npnet:
#
# | call | does |
# | --- | --- |
# | `output, saved = model.forward(x)` | the output, (rows, outputs), and all that the backward pass will need |
# | `value, gradient = loss.value_and_gradient(output, y)` | the mean loss of these rows; its gradient at the output |
# | `model.backward(gradient, saved)` | **adds** to `parameter.gradient`, for each parameter |
# | `parameter.gradient = None` | forgets a gradient (`for parameter in model.parameters()`) |
#
# A model remembers nothing. `saved` is where the activations are: they live as long as you hold it.
#
# ### Task 2: accumulate (4 + 2 points)
#
# Write `accumulate`. Afterwards `parameter.gradient` of each parameter is the gradient of the mean loss of
# **all** samples of the window, and nothing of what was there before. Return that mean loss.
#
# `micro_batches` can be gone through only once, and you do not know how many there are (they may come from
# a disk, one by one). That is why you are told the number of `samples`.
#
# Two tests follow. The second measures the memory: eight micro-batches should need what one needs. Ask
# yourself, when the second one runs forward, which names still hold something of the first. (`del name` makes a
# name let go.)


# %% nbgrader={"grade_id": "accumulate", "solution": true}
def accumulate(model, loss, micro_batches, samples):
    """The gradient of the mean loss of a window, in the parameters of the model.

    Args:
        model, loss: see the table.
        micro_batches: gives pairs x, (rows, inputs), and y, (rows, outputs), one after the other, once.
        samples: how many rows all micro-batches have together.

    Returns:
        The mean loss of all samples, a float.
    """
    ### BEGIN SOLUTION
    for parameter in model.parameters():
        parameter.gradient = None
    total = 0.0
    for x, y in micro_batches:
        share = len(x) / samples
        output, saved = model.forward(x)
        value, gradient = loss.value_and_gradient(output, y)
        model.backward(gradient * share, saved)
        total += float(value) * share
        del saved  # or these activations would be alive while the next ones are computed
    return total
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_accumulate", "grade": true, "points": 4}
def check_accumulate(sizes, loss, seed=0):
    model, samples = npnet.mlp([5, 4, 3], "tanh", rng=1, dtype=np.float64), sum(sizes)
    x, y = a_batch(samples, seed=seed)
    parts = cut(x, y, sizes)
    right = gradient_of(model, loss, x, y)
    single = [gradient_of(model, loss, *part) for part in parts]
    for parameter in model.parameters():
        parameter.gradient = np.ones_like(parameter.value)  # something from before
    weights = [parameter.value for parameter in model.parameters()]
    with labs.unchanged(x=x, y=y, weights=weights), labs.told("accumulate"):
        value = accumulate(model, loss, iter(parts), samples)
    call = f"accumulate, micro-batches of {sizes}"
    for name, parameter in model.named_parameters().items():
        each = [gradients[name] for gradients in single]
        mistakes = {
            "you multiply by the wrong factor: the gradients of the micro-batches' means are simply added, the loss is "
            f"not scaled ({len(sizes)} times too large, about)": np.sum(each, axis=0),
            "every micro-batch counts the same (1/K), but they have different sizes: each has to count by its "
            "number of samples": np.mean(each, axis=0),
            "only the last micro-batch is in it: are the gradients forgotten inside of the loop?": each[
                -1
            ]
            * (sizes[-1] / samples),
            "what was in `gradient` before is still in it: forget it before the first micro-batch": right[
                name
            ]
            + 1,
        }
        got = parameter.gradient
        assert got is not None, (
            f"{call}: the gradient of {name} is None: was model.backward called?"
        )
        labs.check_array(
            got, right[name], f"{call}: the gradient of {name}", batch=samples, mistakes=mistakes
        )
    values = [float(loss(model.predict(x), y)) for x, y in parts]
    mistakes = {
        "This is the sum of the micro-batches' means": sum(values),
        "This is the mean of the micro-batches' means, but they have different sizes": np.mean(
            values
        ),
        "This is the last micro-batch's mean loss": values[-1],
        "This is the last micro-batch's scaled loss, which says nothing about the others": values[
            -1
        ]
        * (sizes[-1] / samples),
    }
    labs.check_number(
        value,
        float(loss(model.predict(x), y)),
        f"{call}: the loss",
        mistakes=mistakes,
        tolerance=1e-9,
    )


check_accumulate([4, 4, 4], npnet.SoftmaxCrossEntropy())
check_accumulate([8, 8, 5], npnet.SoftmaxCrossEntropy())
check_accumulate([1, 7, 4], npnet.MeanSquaredError())
### BEGIN HIDDEN TESTS
check_accumulate([9], npnet.Quadratic())
check_accumulate([1] * 10, npnet.BCEWithLogits())
check_accumulate([2, 30, 5, 5], npnet.SoftmaxCrossEntropy(), seed=3)
### END HIDDEN TESTS
print("accumulate: the gradient and the loss of the large batch")


# %% nbgrader={"grade_id": "test_accumulate_peak", "grade": true, "points": 2}
def peak_of_window(model, x, y, sizes):
    """The most bytes alive while a window of micro-batches is accumulated, above those of model and data."""
    parts = cut(x, y, sizes)
    for parameter in model.parameters():
        parameter.gradient = None

    def window():
        loss.append(accumulate(model, npnet.SoftmaxCrossEntropy(), iter(parts), len(x)))

    loss = []
    peak = measure_peak(window).increase_bytes
    got = [loss[0], [parameter.gradient for parameter in model.parameters()]]
    like = [1.0, [parameter.value for parameter in model.parameters()]]
    labs.check_computed(got, like, "accumulate: the loss and the gradients")
    return peak


def check_accumulate_peak(depth, rows, count, width=32):
    model = npnet.mlp([width] * depth + [3], "tanh", rng=1, dtype=np.float64)
    x, y = a_batch(rows * count, inputs=width)
    activations = rows * (width * (depth - 1) + 3) * 8  # of one micro-batch
    gradients = sum(parameter.value.nbytes for parameter in model.parameters())
    with labs.told("accumulate"):
        one = peak_of_window(model, x[:rows], y[:rows], [rows])
        all_ = peak_of_window(model, x, y, [rows] * count)
    limit = max(one, activations + gradients) + gradients + 0.4 * activations
    if all_ > limit:
        two = "the activations of a micro-batch are still alive while the next one runs forward: which name holds them?"
        every = (
            "the activations of all micro-batches are alive at once: run backward for one before you run "
            "forward for the next"
        )
        reason = every if all_ > 0.7 * count * activations else two
        raise AssertionError(
            f"accumulate with {count} micro-batches of {rows} takes {format_bytes(all_)}, {format_bytes(limit)} suffice, "
            f"and one micro-batch alone takes {format_bytes(one)}: {reason}"
        )
    return one, all_


peak_of_one, peak_of_eight = check_accumulate_peak(depth=8, rows=400, count=8)
check_accumulate_peak(depth=5, rows=600, count=4)
### BEGIN HIDDEN TESTS
check_accumulate_peak(depth=12, rows=300, count=6)
### END HIDDEN TESTS
print(
    f"one micro-batch of 400: {format_bytes(peak_of_one)}; eight of them: {format_bytes(peak_of_eight)}"
)

# %% [markdown]
# ### Equal, but not bit for bit
#
# Is the gradient *the same* as that of the large batch? Here is the largest difference in any parameter,
# relative to the largest gradient, when the 768 patients are cut into more and more parts:

# %% nbgrader={"grade_id": "look_at_rounding", "locked": true}
print("micro-batches       float64: difference, equal bits    float32: difference, equal bits")
for count in (1, 2, 4, 16, 256):
    line = f"{count:>3} x {768 // count:<8}"
    for dtype in (np.float64, np.float32):
        model = npnet.mlp([8, 32, 16, 1], rng=0, dtype=dtype)
        x, y = patients.astype(dtype), diabetes.astype(dtype)
        right = gradient_of(model, loss, x, y)
        accumulate(model, loss, iter(cut(x, y, [768 // count] * count)), 768)
        got = model.named_parameters()
        most = max(np.abs(array).max() for array in right.values())
        far = max(np.abs(got[name].gradient - right[name]).max() for name in right) / most
        bits = np.mean(np.concatenate([(got[n].gradient == right[n]).ravel() for n in right]))
        line += f"{far:>22.1e} {bits:>10.0%}"
    print(line)

# %% [markdown]
# It is the same sum, but added up in another order, and floating-point addition depends on the order: the last
# bits differ. (Checkpointing is another thing: it does the same arithmetic in the same order, and so gives
# the same bits. Lab 5 is about this.)
#
# ## 3 An epoch, and the partial window
#
# 768 patients in micro-batches of 128, and an update every 4: the first window has $4\cdot128 = 512$
# samples, then 256 are left over, two micro-batches. What becomes of them? Three answers are seen in real code:
#
# 1. They are forgotten, or, worse, their gradient stays where it is and gets into the next epoch's first update.
# 2. They are used, but divided by the 4 that stands everywhere, although there are 2: a step half as long.
# 3. They are a window of their own, smaller, and every sample in it counts as it should.
#
# We want the third. Then accumulation gives what batches of 512 give, whose last batch has 256.
#
# ### Task 3: train for an epoch (5 points)
#
# Write `train_epoch`. Go through the samples in their order, in micro-batches of `batch_size`; update with
# `optimizer.step(model.parameters())` after every `accumulation_steps` of them, and after the last window, however
# full it is. The very last micro-batch may be smaller than `batch_size`, too. Use `accumulate`.


# %% nbgrader={"grade_id": "train_epoch", "solution": true}
def train_epoch(model, loss, optimizer, x, y, batch_size, accumulation_steps):
    """Go through the samples once.

    Args:
        x, y: rows, (samples, inputs) and (samples, outputs).
        batch_size: the rows of a micro-batch.
        accumulation_steps: the micro-batches of a window.

    Returns:
        A list with the mean loss of each window, before its update.
    """
    ### BEGIN SOLUTION
    losses, window = [], batch_size * accumulation_steps
    for start in range(0, len(x), window):
        end = min(start + window, len(x))
        micro_batches = (
            (x[i : i + batch_size], y[i : i + batch_size]) for i in range(start, end, batch_size)
        )
        losses.append(accumulate(model, loss, micro_batches, end - start))
        optimizer.step(model.parameters())
    return losses
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_train_epoch", "grade": true, "points": 5}
### BEGIN HIDDEN TESTS
# From here on with the right accumulate: a mistake costs its points once.
def accumulate(model, loss, micro_batches, samples):
    for parameter in model.parameters():
        parameter.gradient = None
    return sum(
        npnet.add_gradients(model, loss, x, y, weight=len(x) / samples) for x, y in micro_batches
    )


### END HIDDEN TESTS
class Recording(npnet.SoftmaxCrossEntropy):
    """The loss, with a note of how many rows each micro-batch had, and "update" for each update; and all targets."""

    def __init__(self):
        self.rows, self.targets = [], []

    def value_and_gradient(self, output, target):
        self.rows.append(len(output))
        self.targets.append(target)
        return super().value_and_gradient(output, target)


class RecordingSGD(npnet.SGD):
    """SGD that notes its updates among the loss's rows."""

    def __init__(self, loss):
        super().__init__(0.5)
        self.loss = loss

    def step(self, parameters):
        self.loss.rows.append("update")
        super().step(parameters)


def trained(windows, x, y, batch_size, samples=None, last_only=False):
    """The weights after an update for each window (numbers of samples), by npnet.

    Wrong ones: divided by ``samples``; or from the last micro-batch of each window alone.
    """
    model, loss, end = (
        npnet.mlp([5, 4, 3], "tanh", rng=1, dtype=np.float64),
        npnet.SoftmaxCrossEntropy(),
        0,
    )
    values = []
    for window in windows:
        rows = slice(end, end + window)
        if last_only:
            rows = slice(end + (window - 1) // batch_size * batch_size, end + window)
        share = len(x[rows]) / (samples or window)
        values.append(npnet.add_gradients(model, loss, x[rows], y[rows], weight=share))
        npnet.SGD(0.5).step(model.parameters())
        end += window
    return {name: each.value for name, each in model.named_parameters().items()}, values


def check_train_epoch(samples, batch_size, count):
    x, y = a_batch(samples, seed=samples)
    model, loss = npnet.mlp([5, 4, 3], "tanh", rng=1, dtype=np.float64), Recording()
    call = f"train_epoch, {samples} samples, batch_size {batch_size}, accumulation_steps {count}"
    with labs.unchanged(x=x, y=y), labs.told("train_epoch"):
        losses = train_epoch(model, loss, RecordingSGD(loss), x, y, batch_size, count)
    micro = [len(part) for part, _ in npnet.batches(x, y, batch_size, shuffle=False)]
    windows = [len(part) for part, _ in npnet.batches(x, y, batch_size * count, shuffle=False)]

    rows = [row for row in loss.rows if row != "update"]
    updates, left = loss.rows.count("update"), samples % (batch_size * count)
    assert max(rows, default=0) <= batch_size, (
        f"{call}: {max(rows)} rows ran at once. That takes the memory of {max(rows)} rows; run {batch_size} at a time"
    )
    mistakes = {
        f"the partial window at the end, {left} samples, is not used for an update": len(windows)
        - bool(left),
        "you update after every micro-batch": len(micro),
        "optimizer.step is never called": 0,
        "the index counts from 0: the first update comes after a single micro-batch": len(
            {*range(0, len(micro), count), len(micro) - 1}
        ),
    }
    labs.check_calls(updates, len(windows), "updates", mistakes, name=call)
    assert rows == micro, (
        f"{call}: the micro-batches that ran had {rows} rows, expected {micro}: every sample is used once, the last "
        "micro-batch may be smaller"
    )
    in_order = np.array_equal(np.concatenate(loss.targets), y)
    assert in_order, (
        f"{call}: the samples do not come in their order (npnet.batches shuffles, but for shuffle=False)"
    )
    at, expected = [], []  # after how many micro-batches the updates come
    for i, each in enumerate(loss.rows):
        if each == "update":
            at.append(i - len(at))
    expected = [min((i + 1) * count, len(micro)) for i in range(len(windows))]
    assert at == expected, (
        f"{call}: the updates come after {at} micro-batches, expected after {expected}"
        + (
            ": the index counts from 0, so the first window is too short"
            if at[0] == 1 < expected[0]
            else ""
        )
    )

    right, values = trained(windows, x, y, batch_size)
    whole = trained(windows, x, y, batch_size, samples=batch_size * count)[0]
    last = trained(windows, x, y, batch_size, last_only=True)[0]
    shared = "is accumulate called for each micro-batch? It forgets what was there before: call it once a window"
    for name, parameter in model.named_parameters().items():
        mistakes = {
            f"the partial window of {left} samples was divided by the full window's {batch_size * count}: "
            "its step is too short": whole[name],
            f"only the last micro-batch of each window is in the update: {shared}": last[name],
        }
        labs.check_array(
            parameter.value, right[name], f"{call}: {name} afterwards", mistakes=mistakes
        )
    assert isinstance(losses, list), f"{call}: return a list of losses, one a window"
    assert len(losses) == len(windows), (
        f"{call}: {len(losses)} losses, expected {len(windows)}, one a window"
    )
    labs.check_array(np.array(losses, float), np.array(values), f"{call}: the losses")


check_train_epoch(samples=24, batch_size=4, count=3)  # two full windows
check_train_epoch(samples=20, batch_size=4, count=3)  # and a partial one
check_train_epoch(samples=26, batch_size=4, count=2)  # whose last micro-batch is smaller, too
check_train_epoch(samples=12, batch_size=4, count=1)  # no accumulation
### BEGIN HIDDEN TESTS
check_train_epoch(samples=5, batch_size=4, count=8)
check_train_epoch(samples=3, batch_size=4, count=2)
check_train_epoch(samples=33, batch_size=8, count=2)
### END HIDDEN TESTS
print("train_epoch: right")

# %% [markdown]
# ### Watch it
#
# The diabetes data, four ways, 40 epochs each. Three of them should be one curve:

# %% nbgrader={"grade_id": "watch", "locked": true}
runs = {  # batch_size, accumulation_steps
    "batches of 512": (512, 1),
    "128, an update every 4": (128, 4),
    "32, an update every 16": (32, 16),
    "batches of 128": (128, 1),
}
epochs, curves = 3 if labs.grading() else 40, {}
for name, (batch_size, steps) in runs.items():
    model, optimizer = npnet.mlp([8, 32, 16, 1], rng=0, dtype=np.float64), npnet.SGD(0.3)
    curves[name] = []
    for _ in range(epochs):
        losses = train_epoch(model, loss, optimizer, patients, diabetes, batch_size, steps)
        curves[name].append(float(loss(model.predict(patients), diabetes)))
    print(
        f"{name:<24} {len(losses)} updates an epoch, in the last window a mean loss of {losses[-1]:.15f}"
    )

figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
for (name, curve), width in zip(curves.items(), (7, 4, 1.5, 1.5), strict=True):
    ax.plot(range(1, epochs + 1), curve, label=name, linewidth=width, alpha=0.7)
ax.set(title="the diabetes data, SGD", xlabel="epoch", ylabel="loss of all 768 patients")
ax.legend()
plt.show()

# %% [markdown]
# The first three differ, if at all, in the last digits. The fourth is another training: three times as many updates an
# epoch, each from a noisier gradient. That is what an *effective batch size* of 512 means: 128 rows in memory, 512
# in the update.
#
# How much noisier? Take $n$ of the $N = 768$ patients at random. Their gradient $g_n$ differs from the gradient
# $g$ of all. If $\sigma^2$ is the mean of $\lVert \nabla\ell_i - g\rVert^2$ over the patients, then
#
# $$\sqrt{\mathrm{E}\,\lVert g_n - g\rVert^2} = \frac{\sigma}{\sqrt n}\,\sqrt{\frac{N-n}{N-1}},$$
#
# where the second factor is there because nobody is drawn twice. It makes no difference to this whether the $n$
# come at once or in micro-batches.

# %% nbgrader={"grade_id": "measure_noise", "locked": true}
model, rng = npnet.mlp([8, 32, 16, 1], rng=0, dtype=np.float64), np.random.default_rng(0)


def flat_gradient(rows):
    gradients = npnet.value_and_grad(model, loss, patients[rows], diabetes[rows])[1]
    return np.concatenate([array.ravel() for array in gradients.values()])


g = flat_gradient(slice(None))
samples, trials = len(patients), 1 if labs.grading() else 40
sigma = np.sqrt(np.mean([((flat_gradient([i]) - g) ** 2).sum() for i in range(samples)]))
windows = [8, 16, 32, 64, 128, 256, 512, 700]
measured = [
    np.sqrt(
        np.mean(
            [
                ((flat_gradient(rng.choice(samples, n, replace=False)) - g) ** 2).sum()
                for _ in range(trials)
            ]
        )
    )
    for n in windows
]
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
n = np.geomspace(8, samples - 1, 200)
ax.loglog(windows, measured / np.linalg.norm(g), "ko", label=f"measured, {trials} windows each")
ax.loglog(
    n, sigma / np.sqrt(n) / np.linalg.norm(g), ":", color="grey", label=r"$\sigma / \sqrt{n}$"
)
exact = sigma / np.sqrt(n) * np.sqrt((samples - n) / (samples - 1)) / np.linalg.norm(g)
ax.loglog(n, exact, "-", label="the formula")
ax.set(
    title="how far the gradient of n patients is from that of all",
    xlabel="effective batch size n",
    ylabel=r"error, relative to $\Vert g \Vert$",
    ylim=(0.02, 3),
)
ax.legend()
plt.show()

# %% [markdown]
# ## 4 What it saves
#
# A deep network, and a window of 2048 samples. Memory for one micro-batch after the other, as in a training that
# looks at its memory after every iteration: all at once, in micro-batches, and for comparison batches of 256
# with an update after each.

# %% nbgrader={"grade_id": "measure_iterations", "locked": true}
deep = npnet.mlp([64] + [128] * 8 + [10], "tanh", rng=0)
many_x = np.random.default_rng(0).standard_normal((4096, 64), dtype=np.float32)
many_y = npnet.one_hot(np.random.default_rng(1).integers(10, size=4096), 10, np.float32)
entropy = npnet.SoftmaxCrossEntropy()
print(
    f"parameters: {format_bytes(sum(p.value.nbytes for p in deep.parameters()))}, gradients as many"
)


def memory_by_iteration(batch_size, accumulation_steps):
    """The peak of each micro-batch of two windows, in bytes, above those of model and data."""
    model, optimizer, peaks = copy.deepcopy(deep), npnet.SGD(0.01), []
    model_bytes = sum(parameter.value.nbytes for parameter in model.parameters())
    windows = 4096 // (batch_size * accumulation_steps)
    for i in range(windows * accumulation_steps):
        rows = slice(i * batch_size, (i + 1) * batch_size)
        waiting = (
            0 if i % accumulation_steps == 0 else model_bytes
        )  # gradients of the window so far
        peak = measure_peak(
            npnet.add_gradients,
            model,
            entropy,
            many_x[rows],
            many_y[rows],
            weight=1 / accumulation_steps,
        )
        peaks.append(peak.increase_bytes + waiting)
        if (i + 1) % accumulation_steps == 0:
            optimizer.step(model.parameters())
    return peaks


iterations = {
    "2048 at once": (2048, 1, "s-"),
    "512, an update every 4": (512, 4, "o-"),
    "256, an update every 8": (256, 8, "o-"),
    "256, an update each": (256, 1, "k."),
}
if labs.grading():
    iterations = {"2048 at once": (2048, 1, "s-")}
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, (batch_size, steps, style) in iterations.items():
    peaks = memory_by_iteration(batch_size, steps)
    seen = batch_size * np.arange(1, len(peaks) + 1)
    ax.plot(seen, np.array(peaks) / 1e6, style, label=name, markersize=4)
    print(f"{name:<24} at most {format_bytes(max(peaks))}")
ax.set(
    title="two windows of 2048 samples",
    xlabel="samples seen",
    ylabel="peak of the iteration (MB)",
    ylim=0,
)
ax.legend()
plt.show()

# %% [markdown]
# Three things to see: memory follows the **micro-batch**, not the window. In a window of several micro-batches, from
# the second one on, the gradients of the first are there as well, and wait: that is the step between the first point
# and the second. And compared with 256 samples and an update each, accumulation saves nothing, on the contrary: it does
# not make a *small* batch smaller. It makes a large one possible.
#
# ### Task 4: how many micro-batches? (3 points)
#
# The peak is, to a good approximation, a straight line: `fixed_bytes` that do not depend on the batch (gradients,
# say), and `bytes_per_sample` for each row of the micro-batch. Write `accumulation_steps_for`: the **least** number
# of micro-batches into which a window of `samples` rows has to be cut, as evenly as possible, so that the peak is at
# most `budget` bytes. All arguments are whole numbers. Where not even a single row fits, raise a `ValueError`.


# %% nbgrader={"grade_id": "accumulation_steps_for", "solution": true}
def accumulation_steps_for(samples, budget, fixed_bytes, bytes_per_sample):
    """The least number of micro-batches for a window of ``samples`` rows whose peak is at most ``budget`` bytes.

    Raises:
        ValueError: not even a single row fits.
    """
    ### BEGIN SOLUTION
    rows = (budget - fixed_bytes) // bytes_per_sample
    if rows < 1:
        raise ValueError(f"a single row takes {fixed_bytes + bytes_per_sample} bytes")
    return -(-samples // rows)
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_accumulation_steps_for", "grade": true, "points": 3}
def check_steps(samples, budget, fixed, each):
    call = f"accumulation_steps_for({samples}, {budget}, {fixed}, {each})"
    right = next(
        (
            k
            for k in range(1, samples + 1)
            if fixed + each * (samples // k + (samples % k > 0)) <= budget
        ),
        None,
    )
    try:
        got = accumulation_steps_for(samples, budget, fixed, each)
    except ValueError as error:
        if right is None:
            return
        raise AssertionError(
            f"{call}: ValueError ({error}), but {right} micro-batches do"
        ) from None
    except NotImplementedError:
        raise
    except Exception as error:
        raise AssertionError(f"{call} stopped with {type(error).__name__}: {error}") from error
    assert right is not None, (
        f"{call}: you say {got}, but a single row takes {fixed + each} bytes: raise a ValueError"
    )
    mistakes = {}
    if right is not None:
        rows = max(m for m in range(1, 2 * samples) if fixed + each * m <= budget)
        mistakes[
            "So many rows may a micro-batch have; asked is how many micro-batches there are"
        ] = rows
    free = budget // each
    if free:
        mistakes["You leave out the fixed bytes: they are there whatever the micro-batch"] = -(
            -samples // free
        )
    if right > 1:
        largest = samples // (right - 1) + (samples % (right - 1) > 0)
        mistakes[
            f"One too few: then the largest micro-batch has {largest} rows, and takes {fixed + each * largest} bytes. "
            "Round up, not down"
        ] = right - 1
    mistakes[
        "One too many: a smaller number fits, too. Where nothing is left over, nothing is added"
    ] = right + 1
    if isinstance(got, float) and got == right:
        raise AssertionError(
            f"{call}: you say {got!r}, a float; give a whole number ( // instead of / )"
        )
    labs.check_number(got, right, call, mistakes=mistakes)


check_steps(1000, budget=500, fixed=300, each=2)
check_steps(1001, budget=500, fixed=300, each=2)
check_steps(512, budget=1_000_000, fixed=600_000, each=5000)
check_steps(100, budget=10_000, fixed=100, each=2)  # all at once
check_steps(10, budget=100, fixed=95, each=10)  # not even a row
### BEGIN HIDDEN TESTS
check_steps(7, budget=110, fixed=100, each=10)
check_steps(7, budget=109, fixed=100, each=10)
check_steps(10, budget=50, fixed=100, each=10)
for budget in range(20, 400, 7):
    check_steps(97, budget=budget, fixed=30, each=3)
### END HIDDEN TESTS
print("accumulation_steps_for: right")

# %% [markdown]
# Does the straight line hold? We measure the peak of `accumulated_step`, npnet's own `accumulate`, with two sizes of
# micro-batches, draw the line through them, choose budgets, and look whether they are kept. (We keep 2 % back: the line
# knows nothing of the small buffers of a matrix product.) Then the same with
# checkpoints (every 3 layers, lab 1): they lower the bytes *per sample*, accumulation the number of samples. Both
# together go furthest.


# %% nbgrader={"grade_id": "measure_budgets", "locked": true}
def window_peak(count, n=0, samples=2048):
    """Measured peak of a window of ``samples`` rows in ``count`` micro-batches, a checkpoint every n layers."""
    model, optimizer = copy.deepcopy(deep), npnet.SGD(0.01)
    sizes = [len(rows) for rows in np.array_split(np.arange(samples), count)]
    parts = cut(many_x[:samples], many_y[:samples], sizes)
    schedule = schedules.every_nth(len(model.layers), n or len(model.layers))
    step = measure_peak(npnet.accumulated_step, model, entropy, optimizer, schedule, parts, samples)
    return step.increase_bytes


figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
counts = [4] if labs.grading() else [1, 2, 4, 8, 16, 32, 64, 128]
gradient_bytes = sum(parameter.value.nbytes for parameter in deep.parameters())
for n, name, color in [(0, "without checkpoints", "C0"), (3, "a checkpoint every 3", "C1")]:
    few, more = window_peak(16, n), window_peak(8, n)  # micro-batches of 128 and 256
    each = (more - few) // 128
    fixed = few - 128 * each
    print(f"{name}: {format_bytes(fixed)} and {format_bytes(each)} a sample")
    for budget in (4_000_000, 2_000_000, 1_000_000)[: 1 if labs.grading() else 3]:
        count = accumulation_steps_for(2048, budget * 98 // 100, fixed, each)
        print(
            f"    budget {format_bytes(budget)}: {count:>3} micro-batches, measured {format_bytes(window_peak(count, n))}"
        )
    peaks = np.array([window_peak(count, n) for count in counts])
    ax.loglog(counts, peaks / 1e6, "o", color=color, label=f"{name}, measured")
    ax.loglog(
        counts, (fixed + each * 2048 / np.array(counts)) / 1e6, "-", color=color, label="the line"
    )
ax.axhline(gradient_bytes / 1e6, color="grey", linestyle=":", label="gradients of all layers")
ax.set(
    title="a window of 2048 samples, 9 layers",
    xlabel="micro-batches",
    ylabel="peak (MB)",
    xticks=counts,
    xticklabels=counts,
    yticks=[0.5, 1, 2, 5, 10],
    yticklabels=[0.5, 1, 2, 5, 10],
)
ax.minorticks_off()
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# The curves end at the gradients: they have to be there for the whole window, whatever is done. (The last points lie
# above the line, since from the second micro-batch on a layer's new gradient is alive beside the old one for a moment,
# and with few rows that is the peak.) And this is what one
# micro-batch of the window looks like from inside, planned by npnet, action by action. Move the slider: everything
# shrinks but the gradients and the parameters.


# %% nbgrader={"grade_id": "slide", "locked": true}
def timeline(count):
    figure = plt.Figure(figsize=(8, 3.8), layout="constrained")
    planned = npnet.plan(
        deep, 2048 // count, loss=entropy, optimizer=npnet.SGD(0.01), accumulation_steps=count
    )
    ax = plots.plot_timeline(planned, ax=figure.add_subplot())
    ax.set_title(f"one of {count} micro-batches, of {2048 // count} samples")
    return ax


labs.slider(timeline, [1, 2, 4, 8, 16, 32], "micro-batches", value=8)

# %% [markdown]
# ### Question 2 (2 points)
#
# * A report compares "batch 100, an update every 4" with "batch 100, an update each", finds the same memory, and
#   concludes that accumulation saves nothing. What should it have compared? What is the right conclusion?
# * Accumulation and checkpointing both trade time for memory. What does each of them pay? When the number of
#   micro-batches grows, what becomes of the time of a matrix product on your machine, although the flops are the same?

# %% [markdown] nbgrader={"grade_id": "question_memory", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# It compares two trainings with the same micro-batch, which is what the memory depends on; the effective batch sizes
# are 400 and 100. To compare is what does the same update: batch 400 at once. Accumulation gives the update of 400 in
# the memory of 100 (and of the gradients, which stay alive). Checkpointing pays with flops: up to one more forward pass.
# Accumulation does no more flops, but in smaller pieces: each weight is read from memory once a micro-batch, products
# of few rows do not fill the processor's (or the GPU's) units, and each call has a fixed cost. Below some size of
# micro-batch the time grows; checkpointing is the better deal there. For the same number of samples there
# are fewer updates, too, so more epochs may be needed than with small batches and an update each.
# ### END SOLUTION

# %% [markdown]
# ## 5 What it does not do
#
# All of this rests on one sentence: *the loss is a mean over samples, and each sample goes through the network by
# itself*. Here are five trainings. For each, the gradient of 64 samples at once is compared with four accumulated
# micro-batches of 16 that are scaled correctly.


# %% nbgrader={"grade_id": "look_at_limits", "locked": true}
class BatchNorm(npnet.Layer):
    """Each feature minus its mean over the batch, divided by its deviation over the batch (Ioffe and Szegedy)."""

    def forward(self, x):
        deviation = np.sqrt(x.var(axis=0) + 1e-5)  # (features,)
        y = (x - x.mean(axis=0)) / deviation
        return y, (y, deviation)

    def backward(self, dy, saved):
        y, deviation = saved
        return (dy - dy.mean(axis=0) - y * (dy * y).mean(axis=0)) / deviation


def middle(*layers):
    """Two dense layers with something between them; weights are the same each time."""
    first = npnet.Dense(5, 16, "tanh", rng=1, dtype=np.float64)
    return npnet.Sequential(first, *layers, npnet.Linear(16, 3, rng=2, dtype=np.float64))


def distance(model, clip_each=None):
    """Of the accumulated gradient from that of the large batch, relative to its norm."""
    x, y = a_batch(64)
    npnet.set_seed(0)  # steps are counted from 0: for dropout
    right = npnet.value_and_grad(model, entropy, x, y)[1]
    if clip_each is not None:
        norm = np.sqrt(sum((array**2).sum() for array in right.values()))
        right = {name: array * min(1, clip_each / norm) for name, array in right.items()}
    total = {name: np.zeros_like(array) for name, array in right.items()}
    for part in cut(x, y, [16] * 4):
        gradients = npnet.value_and_grad(model, entropy, *part)[1]
        norm = np.sqrt(sum((array**2).sum() for array in gradients.values()))
        factor = 1 if clip_each is None else min(1, clip_each / norm)
        for name, array in gradients.items():
            total[name] += factor * array / 4
    difference = sum(((total[name] - right[name]) ** 2).sum() for name in right)
    return np.sqrt(difference / sum((array**2).sum() for array in right.values()))


print(f"dense layers                                {distance(middle()):.1e}")
print(
    f"layer normalization between them            {distance(middle(npnet.LayerNorm(16, dtype=np.float64))):.1e}"
)
print(f"batch normalization between them            {distance(middle(BatchNorm())):.1e}")
print(
    f"dropout between them                        {distance(middle(npnet.Dropout(0.5, key=1))):.1e}"
)
print(f"dense layers, each micro-batch clipped      {distance(middle(), clip_each=0.2):.1e}")

# %% [markdown]
# ### Question 3 (2 points)
#
# * Why is layer normalization harmless, and batch normalization not?
# * With dropout, too, the gradients differ. Is accumulation therefore *wrong* with dropout, as it is with batch
#   normalization? What has to be done with clipping?

# %% [markdown] nbgrader={"grade_id": "question_limits", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# Layer normalization takes mean and deviation over the features of one sample: the sample still goes through the
# network by itself. Batch normalization takes them over the batch, so that the output for a sample depends on which
# others are in its micro-batch: statistics of 16 are not those of 64, the function itself is another, and no factor
# mends it. With dropout each micro-batch draws masks of its own, where the large batch would have drawn others: the
# gradient is another sample from the *same* distribution, independent for each row in both cases. It is not wrong, only
# not comparable number by number. (One has to see to it that micro-batches do not all get the same mask.) Clipping is not
# linear: it has to be done once a window, after the last micro-batch, on the accumulated gradient.
# ### END SOLUTION

# %% [markdown]
# ### PyTorch, for comparison
#
# The same in PyTorch, where it is installed. `loss.backward()` adds to `.grad` there, too, and nobody divides for you.

# %% nbgrader={"grade_id": "compare_pytorch", "locked": true}
try:
    import torch
except ImportError:
    print("PyTorch is not installed: comparison skipped.")
else:
    model = npnet.mlp([8, 32, 1], "tanh", rng=0, dtype=np.float64)
    first, last = torch.nn.Linear(8, 32).double(), torch.nn.Linear(32, 1).double()
    with torch.no_grad():
        for theirs, ours in zip((first, last), model.layers, strict=True):
            theirs.weight.copy_(torch.from_numpy(np.ascontiguousarray(ours.weight.value)))
            theirs.bias.copy_(torch.from_numpy(ours.bias.value))
    chain = torch.nn.Sequential(first, torch.nn.Tanh(), last)
    for x, y in cut(patients, diabetes, [512, 256]):
        criterion = torch.nn.BCEWithLogitsLoss()
        value = criterion(chain(torch.from_numpy(x)), torch.from_numpy(y)) * (len(x) / 768)
        value.backward()
    accumulate(model, loss, iter(cut(patients, diabetes, [512, 256])), 768)
    far = np.abs(first.weight.grad.numpy() - model.layers[0].weight.gradient).max()
    print(f"largest difference between PyTorch's gradient and yours: {far:.1e}")

# %% [markdown]
# ## What you have learnt
#
# * A backward pass adds. The gradient of a mean is the sum of the parts' gradients, each multiplied by its share of
#   the **samples**; $1/K$ is the special case of equal parts.
# * Forgetting the factor is a learning rate $K$ times too large with SGD, and hardly visible with Adam.
# * A partial window is a window: it counts by the samples that are in it.
# * Memory follows the micro-batch, if nothing of the last one is alive when the next begins; the gradients stay.
# * The result is that of the large batch up to rounding, not bit for bit; the noise of a gradient falls as
#   $1/\sqrt{n}$ in the effective batch size.
# * It holds for whatever is a mean over independent samples. Batch normalization is not; clipping comes after.
#
# In npnet: `npnet.fit(..., batch_size=128, accumulation_steps=4)`, or `npnet.accumulated_step` for a window; with any
# schedule of checkpoints, with clipping, and with a loss scaler (lab 6).
#
# ## To read
#
# * P. Goyal, P. Dollár, R. Girshick et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017,
#   arXiv:1706.02677: how the learning rate goes with the batch size; its remarks on common pitfalls.
# * S. McCandlish, J. Kaplan, D. Amodei et al., "An empirical model of large-batch training", 2018, arXiv:1812.06162: the
#   noise of the gradient, and how large a batch is worth its samples.
# * M. Ott, S. Edunov, D. Grangier and M. Auli, "Scaling neural machine translation", 2018, arXiv:1806.00187:
#   accumulation (there: cumulating gradients) at work.
# * Y. Huang, Y. Cheng, A. Bapna et al., "GPipe: efficient training of giant neural networks using pipeline
#   parallelism", 2018, arXiv:1811.06965: micro-batches, checkpoints and several machines together.
# * S. Ioffe and C. Szegedy, "Batch normalization: accelerating deep network training by reducing internal covariate
#   shift", 2015, arXiv:1502.03167.
