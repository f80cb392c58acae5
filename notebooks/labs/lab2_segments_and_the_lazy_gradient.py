# %% [markdown]
# # Lab 2: Segments and the lazy gradient
#
# A network has a *bottleneck*, a narrow layer in the middle. Everything that the second half needs of
# the first goes through it; so the first half's activations can be forgotten until the gradient has come
# back as far as the bottleneck. That is the *lazy gradient*: checkpointing with one checkpoint.
#
# You will write it, generalize it to any number of segments, and find out where to cut. On the way you
# will see a measurement that many people make and that shows nothing.
#
# | part | you write | points |
# | --- | --- | --- |
# | 1 A chain and its tape | `forward_chain`, `backward_chain` | 3 |
# | 2 The lazy gradient | `lazy_gradient`: its gradients, its memory | 3 + 2 |
# | 3 Memory, iteration by iteration | nothing: you watch; a question | 2 |
# | 4 Any number of segments | `split`; `checkpoint_sequential`: gradients, costs | 2 + 3 + 2 |
# | 5 Where to cut | `most_held`; `best_cuts`; a question | 3 + 2 + 2 |
# | 6 A training from start to end | nothing: you watch; a question | 2 |
#
# It takes about an hour. Write where it says `YOUR CODE HERE` or `YOUR ANSWER HERE`. Below each task is
# a cell of tests: run it, and it says what is wrong. (There are more tests when the lab is graded.)

# %% nbgrader={"grade_id": "setup", "locked": true}
import copy
import itertools
import os
import sys
import time
import tracemalloc
from statistics import median

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import npnet
from npnet import labs, plots, schedules
from npnet.memory import format_bytes

print("npnet", npnet.__version__, "- NumPy", np.__version__)

# %% [markdown]
# ## 1 A chain and its tape
#
# In npnet a layer remembers nothing. Its `forward` hands back the output **and** what the backward pass
# will need, `saved`; its `backward` wants that again:
#
# ```python
# y, saved = layer.forward(x)      # x: (batch, inputs), y: (batch, outputs); a row is a sample
# dx = layer.backward(dy, saved)   # the gradient at the input, from that at the output, dy
# ```
#
# `backward` also **adds** the gradients of the layer's parameters to `layer.weight.gradient` and
# `layer.bias.gradient` (`None` before the first time). Whoever calls `forward` decides what becomes of
# `saved`, and this is all that checkpointing is about.

# %% nbgrader={"grade_id": "look_at_layer", "locked": true}
layer = npnet.Dense(3, 2, "tanh", rng=0)
x = np.ones((5, 3), dtype=np.float32)
y, saved = layer.forward(x)
dx = layer.backward(np.ones_like(y), saved)
print(f"x {x.shape} -> y {y.shape}; saved: {len(saved)} arrays, {[each.shape for each in saved]}")
print(f"they are x and y themselves, no copies: {saved[0] is x and saved[1] is y}")
print(f"dx {dx.shape}; gradient of the weight {layer.weight.gradient.shape}")

# %% [markdown]
# ### Task 1: through a list of layers and back (3 points)
#
# Write two functions for a chain, given as a list of layers.
#
# * `forward_chain(layers, x, keep=True)` runs them one after the other. It returns the output and the
#   *tape*: the list of what each layer saved, in the order of the layers. With `keep=False` it keeps
#   nothing: the tape is an empty list, and no more than two or three activations are alive at a time.
# * `backward_chain(layers, tape, dy)` goes back, from the last layer to the first, and returns the
#   gradient at the chain's input. It **takes each entry off the tape** when it uses it (`tape.pop()`), so
#   that the tape is empty in the end: an array is freed when nothing refers to it any more.


# %% nbgrader={"grade_id": "chain", "solution": true}
def forward_chain(layers, x, keep=True):
    """The output for x, and the tape: what each layer saved (nothing, without keep)."""
    ### BEGIN SOLUTION
    tape = []
    for layer in layers:
        x, saved = layer.forward(x)
        if keep:
            tape.append(saved)
        del saved  # or this name would keep the activation before x
    return x, tape
    ### END SOLUTION


def backward_chain(layers, tape, dy):
    """The gradient at the chain's input, from dy, that at its output. Uses the tape up."""
    ### BEGIN SOLUTION
    for layer in reversed(layers):
        dy = layer.backward(dy, tape.pop())
    return dy
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_chain", "grade": true, "points": 3}
def make_layers(sizes, seed=0, dtype=np.float64):
    return npnet.mlp(sizes, "tanh", rng=seed, dtype=dtype).layers


def pair_of(answer, words):
    assert isinstance(answer, tuple), words
    assert len(answer) == 2, words
    return answer


def check_gradients(got, right, what, batch, hints=None):
    """Compare the weights' and the biases' gradients of two lists of layers, the last layer first."""
    for number, layer in reversed(list(enumerate(got, 1))):
        missing = layer.weight.gradient is None or layer.bias.gradient is None
        assert not missing, f"{what}: layer {number} has no gradient: nobody called its backward"
    for kind in ("weight", "bias"):
        pairs = [
            [getattr(layer, kind).gradient for layer in layers]
            for layers in (list(got), list(right))
        ]
        name = f"{what}: the gradient of the {kind} of layer {{}}"
        labs.check_arrays(*pairs, name, exact=True, batch=batch, backwards=True, hints=hints)


def check_chain(sizes, batch=6):
    layers, right = make_layers(sizes), make_layers(sizes)
    rng = np.random.default_rng(1)
    x, dy = rng.normal(size=(batch, sizes[0])), rng.normal(size=(batch, sizes[-1]))
    with labs.unchanged(x=x, dy=dy):
        with labs.told("forward_chain"):
            answer = forward_chain(layers, x)
        y, tape = pair_of(answer, "forward_chain: return two things, output, tape")
        right_y, right_tape = npnet.Sequential(*right).forward(x)
        labs.check_array(y, right_y, "forward_chain: the output", exact=True)
        assert isinstance(tape, list), (
            f"forward_chain: the tape is a {type(tape).__name__}, not a list"
        )
        assert len(tape) == len(layers), (
            f"the tape has {len(tape)} entries for {len(layers)} layers"
        )
        for number, (saved, expected) in enumerate(zip(tape, right_tape, strict=True), 1):
            words = f"entry {number} of the tape is not what layer {number} saved"
            for a, b in zip(
                pair_of(saved, f"{words}: forward's second result"), expected, strict=True
            ):
                assert np.array_equal(a, b), f"{words} (in the order of the layers?)"
        with labs.told("backward_chain"):
            dx = backward_chain(layers, tape, dy)
    right_dx = npnet.Sequential(*right).backward(dy, right_tape)
    before_last = len(layers) - 1
    hints = {
        before_last: "The last layer is right: does each layer get what the one behind it returned?"
    }
    check_gradients(layers, right, "backward_chain", batch, hints)
    labs.check_array(dx, right_dx, "backward_chain: the gradient at the input", exact=True)
    assert not tape, (
        f"backward_chain leaves {len(tape)} entries on the tape, so their activations stay alive: "
        "take each off with tape.pop()"
    )


def check_forward_only(depth, width=40, batch=400):
    layers, x = make_layers([width] * (depth + 1)), np.ones((batch, width))
    with labs.told("forward_chain(..., keep=False)"):
        _, tape = forward_chain(layers, x, keep=False)
    assert isinstance(tape, list), "forward_chain(..., keep=False): the tape must be a list, too"
    assert not tape, "forward_chain(..., keep=False): the tape must be empty"
    limit = 4.3 * x.nbytes  # three activations, and what else a name may refer to
    labs.check_peak(
        lambda: forward_chain(layers, x, keep=False),
        limit,
        f"the peak of forward_chain(..., keep=False) with {depth} layers",
        {"all activations are alive at once: who refers to them?": 0.9 * depth * x.nbytes},
        like=(x, []),
    )


check_chain([5, 5, 5, 5])
check_chain([4, 6, 3, 2])
check_forward_only(12)
### BEGIN HIDDEN TESTS
check_chain([7, 1])
check_chain([3] * 20, batch=2)
check_forward_only(20)
### END HIDDEN TESTS
print("forward_chain, backward_chain: right")

# %% [markdown]
# ## 2 The lazy gradient
#
# Here is a model in two halves. `before` squeezes 20 features into a bottleneck $h$ of 8 numbers;
# `after` makes one number of them. The loss is $C(\text{after}(\text{before}(x)), y)$.

# %% nbgrader={"grade_id": "halves", "locked": true}
SIZES_BEFORE, SIZES_AFTER = [20] + [128] * 5 + [8], [8] + [128] * 5 + [1]


def make_halves(seed=0):
    before = npnet.mlp(SIZES_BEFORE, "relu", rng=seed).layers
    return before, npnet.mlp(SIZES_AFTER, "relu", rng=seed + 1).layers


batch = 2000
activation = np.ones((batch, SIZES_BEFORE[0]), dtype=np.float32)
for name, half in zip(("before", "after"), make_halves(), strict=True):
    for layer in half:
        activation, _ = layer.forward(activation)
        what = "  <- the bottleneck h" if layer is half[-1] and name == "before" else ""
        print(
            f"{name:>6}: {layer!s:<28} {activation.shape!s:>12} {format_bytes(activation.nbytes):>8}{what}"
        )

# %% [markdown]
# The chain rule cuts the backward pass in two at the bottleneck:
#
# $$\frac{\partial C}{\partial h} \ \text{ is all that } \texttt{before} \text{ needs of } \texttt{after},
# \qquad h \ \text{ is all that } \texttt{after} \text{ needs of } \texttt{before}.$$
#
# So the two halves never have to be in memory together. As a schedule, for 3 + 3 layers (time runs downwards; `F`
# is computed, `R` *re*computed, `o` held, `B` used by a backward step and then freed, `.` is not in memory; `a3` is $h$):

# %% nbgrader={"grade_id": "look_at_schedule", "locked": true}
print(schedules.selective(6, [3]).diagram())

# %% [markdown]
# ### Task 2: the lazy gradient (3 + 2 points)
#
# Write `lazy_gradient(before, after, loss, x, y)`. It adds the gradients of all parameters, and returns the
# loss, a number.
#
# 1. Run `before` without keeping anything but $h$, then `after`, kept.
# 2. `value, dy = loss.value_and_gradient(output, y)` gives the loss and its gradient at the output.
# 3. Go back through `after`: this gives $\partial C/\partial h$.
# 4. Now run `before` once more, kept, and go back through it.
#
# The first test looks at the gradients, the second at memory, and at how often layers run: those of
# `before` twice, those of `after` once. (The schedule above leaves out one forward more: $h$ itself, which
# is there. That is not asked here.)


# %% nbgrader={"grade_id": "lazy_gradient", "solution": true}
def lazy_gradient(before, after, loss, x, y):
    """Add the gradients of the loss of after(before(x)); the two halves are never alive together."""
    ### BEGIN SOLUTION
    h, _ = forward_chain(before, x, keep=False)
    output, tape = forward_chain(after, h)
    value, dy = loss.value_and_gradient(output, y)
    dh = backward_chain(after, tape, dy)
    _, tape = forward_chain(before, x)
    backward_chain(before, tape, dh)
    return float(value)
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_lazy_gradients", "grade": true, "points": 3}
### BEGIN HIDDEN TESTS
# From here on with the right functions of task 1: a mistake costs its points once.
def forward_chain(layers, x, keep=True):
    tape = []
    for layer in layers:
        x, saved = layer.forward(x)
        if keep:
            tape.append(saved)
        del saved
    return x, tape


def backward_chain(layers, tape, dy):
    for layer in reversed(layers):
        dy = layer.backward(dy, tape.pop())
    return dy


### END HIDDEN TESTS
def check_lazy(sizes_before, sizes_after, batch=6):
    depth, middle = len(sizes_before) + len(sizes_after) - 2, len(sizes_before) - 1
    before, after = make_layers(sizes_before, 2), make_layers(sizes_after, 3)
    whole = npnet.Sequential(*copy.deepcopy(before + after))
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(batch, sizes_before[0])), rng.normal(size=(batch, sizes_after[-1]))
    loss = npnet.MeanSquaredError()
    with labs.unchanged(x=x, y=y), labs.told("lazy_gradient"):
        value = lazy_gradient(before, after, loss, x, y)
    output, saved = whole.forward(x)
    right_value, dy = loss.value_and_gradient(output, y)
    whole.backward(dy, saved)
    if isinstance(value, np.ndarray) and not value.ndim:
        value = value[()]
    labs.check_number(value, float(right_value), "lazy_gradient: the loss", tolerance=1e-12)
    hints = {
        middle: f"Layer {middle} is the last of `before`, and `after` is right: go back through `before` "
        "once, with the gradient at the bottleneck",
        depth: "It is the last layer of `after`: start it once, with the loss's gradient at the output",
    }
    check_gradients(before + after, whole.layers, "lazy_gradient", batch, hints)


check_lazy([5, 5, 5], [5, 5, 5])
check_lazy([6, 5, 2], [2, 4, 4, 3])
### BEGIN HIDDEN TESTS
check_lazy([20, 30, 4], [4, 1], batch=50)
check_lazy([3, 2], [2, 7, 7, 7])
### END HIDDEN TESTS
print("lazy_gradient: the gradients are those of plain backpropagation, bit for bit")


# %% nbgrader={"grade_id": "test_lazy_memory", "grade": true, "points": 2}
class Counted(npnet.Layer):
    """A layer that notes each run of it in a list."""

    def __init__(self, inner, calls, name):
        self.inner, self.calls, self.name = inner, calls, name

    def forward(self, x):
        self.calls.append(self.name)
        return self.inner.forward(x)

    def backward(self, dy, saved):
        return self.inner.backward(dy, saved)


def check_lazy_memory(depth_before, depth_after, width=40, batch=400):
    before = make_layers([width] * (depth_before + 1), 5)
    after = make_layers([width] * (depth_after + 1), 6)
    x, y = np.ones((batch, width)), np.zeros((batch, width))
    calls, loss = [], npnet.MeanSquaredError()
    counted = [
        [Counted(layer, calls, name) for layer in half]
        for name, half in (("before", before), ("after", after))
    ]
    with labs.told("lazy_gradient"):
        lazy_gradient(*counted, loss, x, y)
    name = f"lazy_gradient with {depth_before} + {depth_after} layers"
    words = "you run `before` more than twice" if calls.count("before") > 2 * depth_before else ""
    words = words or (
        "you run `after` again; it is kept from the forward pass"
        if calls.count("after") > depth_after
        else ""
    )
    enough = 2 * depth_before + depth_after
    if len(calls) > enough:
        labs.check_calls(len(calls), enough, "forwards", {words: len(calls)}, name=name)
    for layer in before + after:
        layer.weight.gradient = layer.bias.gradient = None
    depth, parameters = depth_before + depth_after, width * width + width
    gradients = 8 * depth * parameters

    def value_and_gradients():
        value = lazy_gradient(before, after, loss, x, y)
        return value, [layer.weight.gradient for layer in before + after]

    labs.check_peak(
        value_and_gradients,
        (max(depth_before, depth_after) + 8) * x.nbytes + gradients,
        f"the peak of {name}",
        {
            "the activations of both halves are alive at once. Is `before` first run with keep=False, and "
            "run again only when the tape of `after` is used up?": depth * x.nbytes
        },
        like=(1.0, [layer.weight.value for layer in before + after]),
    )


check_lazy_memory(12, 12)
check_lazy_memory(14, 11)
### BEGIN HIDDEN TESTS
check_lazy_memory(16, 16)
### END HIDDEN TESTS
print("lazy_gradient: one half in memory at a time")

# %% [markdown]
# ## 3 Memory, iteration by iteration
#
# Three ways to take a training step:
#
# * **plain**: one chain, everything kept;
# * **two stages**: the backward pass in two stages, with the gradient at the bottleneck in between; but both
#   tapes are kept from the forward pass;
# * **lazy**: yours.
#
# We train with Adam, and read the memory twice in each iteration: *after* the step, as
# a training loop usually does it (`torch.cuda.memory_allocated()` is such a reading), and at the *peak* of
# the step. Counted is what was allocated since the training began; the data and the weights were there.


# %% nbgrader={"grade_id": "three_ways", "locked": true}
def plain_gradient(before, after, loss, x, y):
    output, tape = forward_chain(before + after, x)
    value, dy = loss.value_and_gradient(output, y)
    del output
    backward_chain(before + after, tape, dy)
    return float(value)


def two_stage_gradient(before, after, loss, x, y):
    h, tape_before = forward_chain(before, x)
    output, tape_after = forward_chain(after, h)
    value, dy = loss.value_and_gradient(output, y)
    del output
    dh = backward_chain(after, tape_after, dy)
    backward_chain(before, tape_before, dh)
    return float(value)


iterations, batch = (3, 100) if labs.grading() else (15, 2000)
rng = np.random.default_rng(7)
data = []
for _ in range(iterations):
    x = rng.standard_normal((batch, SIZES_BEFORE[0]), dtype=np.float32)
    data.append(
        (
            x,
            np.sin(x.sum(axis=1, keepdims=True))
            + 0.1 * rng.standard_normal((batch, 1), np.float32),
        )
    )


def train_and_read(gradient_of):
    """Losses, and megabytes after each step and at its peak; and the trained weights."""
    before, after = make_halves()
    model, optimizer = npnet.Sequential(*before, *after), npnet.Adam(1e-3)
    losses, left, peaks = [], [], []
    tracemalloc.start()
    for x, y in data:
        tracemalloc.reset_peak()
        losses.append(gradient_of(before, after, npnet.MeanSquaredError(), x, y))
        optimizer.step(model.parameters())
        now, peak = tracemalloc.get_traced_memory()
        left.append(now / 1e6)
        peaks.append(peak / 1e6)
    tracemalloc.stop()
    return losses, left, peaks, model.state_dict()


ways = {"plain": plain_gradient, "two stages": two_stage_gradient, "lazy": lazy_gradient}
runs = {name: train_and_read(gradient_of) for name, gradient_of in ways.items()}
for name, (losses, left, peaks, state) in runs.items():
    same = all(np.array_equal(state[key], runs["plain"][3][key]) for key in state)
    print(
        f"{name:>10}: last loss {losses[-1]:.6f}, after the last step {left[-1]:.2f} MB, "
        f"peak {max(peaks):.2f} MB; the weights are plain's, bit for bit: {same}"
    )

styles = {"plain": ("o-", 9), "two stages": ("s-", 5.5), "lazy": ("^-", 5)}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
for name, (_, left, peaks, _) in runs.items():
    marker, size = styles[name]
    axes[0].plot(range(1, iterations + 1), left, marker, markersize=size, alpha=0.7, label=name)
    axes[1].plot(range(1, iterations + 1), peaks, marker, markersize=size, alpha=0.7, label=name)
axes[0].set(title="read after each step", xlabel="iteration", ylabel="memory (MB)", ylim=0)
axes[1].set(title="the peak of each step", xlabel="iteration")
axes[0].legend()
plt.show()

# %% [markdown]
# ### Question 1 (2 points)
#
# * The left picture cannot tell the three ways apart. Why? What is it that is left after a step?
#   (The model has 137,097 weights and biases, in float32.)
# * *Two stages* computes the gradient at the bottleneck, too, and sends it back from there. Why does it save
#   nothing? What exactly makes `lazy` lazy?
# * Why does `lazy` not come down to one half of `plain`?

# %% [markdown] nbgrader={"grade_id": "question_memory", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# After a step no activation is alive, whichever way was taken, and the optimizer has used the gradients up.
# What is left is Adam's state, two numbers for each weight: $2\cdot4\cdot137{,}097 \approx 1.10$ MB, from the
# first iteration on. Memory has to be read at the peak, which lies between the forward and the backward pass.
# *Two stages* keeps `before`'s tape through the whole forward and backward pass of `after`: at the peak, when the
# forward pass ends, all activations are there as in plain training. To cut the backward pass in two is
# not enough; `lazy` throws the first half's activations away, and computes them again. What does not shrink:
# Adam's state, the gradients of the half that is done, what one backward step takes at a time, the loss.
# ### END SOLUTION

# %% [markdown]
# ## 4 Any number of segments
#
# Cut a chain of $L$ layers into $k$ segments. Keep the **input of each segment**, forget what is inside, and
# restore a segment when the gradient arrives at its end. The last segment is kept as it is: its turn
# comes at once. `torch.utils.checkpoint.checkpoint_sequential` does this, and so will you.
#
# ### Task 3a: the segments (2 points)
#
# `split(layers, segments)` gives a list of lists. PyTorch's rule: every segment has $\lfloor L/k \rfloor$ layers,
# and the last one also has what remains. Ten layers in four segments: 2, 2, 2, 4.


# %% nbgrader={"grade_id": "split", "solution": true}
def split(layers, segments):
    """A list of `segments` lists of layers, in order."""
    ### BEGIN SOLUTION
    size = len(layers) // segments
    last = size * (segments - 1)  # the last segment begins here
    return [layers[start : start + size] for start in range(0, last, size)] + [layers[last:]]
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_split", "grade": true, "points": 2}
def check_split(depth, segments):
    layers = [npnet.Tanh() for _ in range(depth)]
    call = f"split: {depth} layers in {segments} segments"
    with labs.told(call):
        got = split(list(layers), segments)
    assert isinstance(got, list), f"{call}: expected a list of lists, got {type(got).__name__}"
    for part in got:
        assert isinstance(part, list), (
            f"{call}: expected a list of lists, got a list with {part} in it"
        )
    lengths = [len(part) for part in got]
    flat = [id(layer) for part in got for layer in part]
    left_out = depth - len(set(flat))
    assert not left_out, (
        f"{call}: {left_out} layers are in no segment; your segments have {lengths}"
    )
    assert flat == [id(layer) for layer in layers], (
        f"{call}: order changed, or a layer is there twice"
    )
    assert len(got) == segments, f"{call}: you make {len(got)}, with {lengths} layers"
    right, each = npnet.Sequential(*layers), depth // segments
    _, tape = npnet.checkpoint.checkpoint_sequential(right, segments, np.ones((1, 1)))
    parts = tape.parts
    expected = [len(getattr(part, "inner", part).layers) for part in parts]
    evenly = [len(part) for part in np.array_split(np.arange(depth), segments)]
    words = ""
    if lengths == evenly:
        words = ". You share the rest out evenly (which is the better rule; asked is PyTorch's)"
    elif lengths[0] > each:
        words = ". The rest belongs to the last segment; you round up, or begin with the longest"
    assert lengths == expected, f"{call}: yours have {lengths} layers, expected {expected}{words}"


check_split(10, 4)
check_split(6, 3)
check_split(11, 3)
check_split(5, 1)
### BEGIN HIDDEN TESTS
for depth in range(1, 15):
    for segments in range(1, depth + 1):
        check_split(depth, segments)
### END HIDDEN TESTS
print("split: right; 50 layers in 26 segments:", [len(part) for part in split([None] * 50, 26)])

# %% [markdown]
# ### Task 3b: checkpoint the segments (3 + 2 points)
#
# * `checkpoint_sequential(layers, segments, x)` returns the output, and `kept`: whatever your backward
#   pass needs. What is in it is for you to choose (a tuple, say).
# * `backward_sequential(kept, dy)` returns the gradient at `x`, and adds the gradients of all parameters.
#
# Use `split`, `forward_chain` and `backward_chain`. The first test compares with plain backpropagation; the second
# counts runs (the layers of all segments but the last run twice) and bytes.


# %% nbgrader={"grade_id": "checkpoint_sequential", "solution": true}
def checkpoint_sequential(layers, segments, x):
    """The output for x, and what the backward pass needs: inputs of segments, and the last one's tape."""
    ### BEGIN SOLUTION
    parts, inputs = split(layers, segments), []
    for part in parts[:-1]:
        inputs.append(x)
        x, _ = forward_chain(part, x, keep=False)
    y, tape = forward_chain(parts[-1], x)
    return y, (parts, inputs, tape)
    ### END SOLUTION


def backward_sequential(kept, dy):
    """The gradient at x, from dy, that at the output; adds the parameters' gradients."""
    ### BEGIN SOLUTION
    parts, inputs, tape = kept
    dy = backward_chain(parts[-1], tape, dy)
    for part in reversed(parts[:-1]):
        _, tape = forward_chain(part, inputs.pop())
        dy = backward_chain(part, tape, dy)
    return dy
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_sequential", "grade": true, "points": 3}
### BEGIN HIDDEN TESTS
# From here on with the right split.
def split(layers, segments):
    size = len(layers) // segments
    ends = [size * i for i in range(segments)] + [len(layers)]
    return [layers[a:b] for a, b in itertools.pairwise(ends)]


### END HIDDEN TESTS
def check_sequential(sizes, segments, batch=6):
    layers, whole = make_layers(sizes, 8), npnet.Sequential(*make_layers(sizes, 8))
    depth, call = len(layers), f"{len(layers)} layers in {segments} segments"
    rng = np.random.default_rng(9)
    x, dy = rng.normal(size=(batch, sizes[0])), rng.normal(size=(batch, sizes[-1]))
    right_y, saved = whole.forward(x)
    right_dx = whole.backward(dy, saved)
    with labs.unchanged(x=x, dy=dy):
        with labs.told(f"checkpoint_sequential ({call})"):
            answer = checkpoint_sequential(layers, segments, x)
        y, kept = pair_of(answer, "checkpoint_sequential: return two things, y, kept")
        labs.check_array(y, right_y, f"{call}: the output", exact=True)
        with labs.told(f"backward_sequential ({call})"):
            dx = backward_sequential(kept, dy)
    hints = {
        end: f"Layer {end} is the last of a segment, and what is behind it is right: does this segment begin "
        "with its own input, and get the gradient that the next one gave?"
        for end in itertools.accumulate(depth // segments for _ in range(segments - 1))
    }
    check_gradients(layers, whole.layers, call, batch, hints)
    labs.check_array(dx, right_dx, f"{call}: the gradient at x", exact=True)


check_sequential([5] * 11, 4)
check_sequential([5] * 7, 3)
check_sequential([6, 5, 4, 3, 2, 3], 2)
check_sequential([6, 5, 4], 1)
### BEGIN HIDDEN TESTS
check_sequential([6, 5, 4, 3, 2, 3], 5)
check_sequential([4] * 31, 7)
### END HIDDEN TESTS
print("checkpoint_sequential: output and gradients are those of plain backpropagation, bit for bit")


# %% nbgrader={"grade_id": "test_sequential_costs", "grade": true, "points": 2}
def check_sequential_costs(depth, segments, width=40, batch=400):
    layers, calls = make_layers([width] * (depth + 1), 10), []
    counted = [Counted(layer, calls, number) for number, layer in enumerate(layers, 1)]
    x, call = np.ones((batch, width)), f"{depth} layers in {segments} segments"
    with labs.told("checkpoint_sequential"):
        y, kept = checkpoint_sequential(counted, segments, x)
    forwards = len(calls)
    labs.check_calls(forwards, depth, "forwards", name=f"{call}: checkpoint_sequential")
    with labs.told("backward_sequential"):
        dx = backward_sequential(kept, np.ones_like(y))
    labs.check_computed([y, dx], [x, x], f"{call}: output and gradient at x")
    last = depth - depth // segments * (segments - 1)
    enough = depth - last
    mistakes = {"you recompute the last segment, too; it can be kept from the forward pass": depth}
    if len(calls) - forwards > enough:
        labs.check_calls(
            len(calls) - forwards, enough, "recomputed forwards", mistakes, name=f"{call}: backward"
        )
    for layer in layers:
        layer.weight.gradient = layer.bias.gradient = None

    def both_passes():
        y, kept = checkpoint_sequential(layers, segments, x)
        return backward_sequential(kept, np.ones_like(y))

    gradients = 8 * depth * (width * width + width)
    labs.check_peak(
        both_passes,
        (segments + last + 6) * x.nbytes + gradients,
        f"the peak of {call}",
        {
            "more is alive than one segment and the inputs of the others: are they taken off the list when used, "
            "and do segments before the last run with keep=False?": (segments + last + 6)
            * x.nbytes,
            "nearly every activation is alive at once. Do the segments before the last run with keep=False?": (
                0.9 * depth * x.nbytes + gradients
            ),
        },
        like=x,
    )


check_sequential_costs(30, 5)
check_sequential_costs(24, 6)
### BEGIN HIDDEN TESTS
check_sequential_costs(31, 4)
### END HIDDEN TESTS
print("checkpoint_sequential: no run too many, one segment and the inputs of the others in memory")

# %% [markdown]
# ## 5 Where to cut
#
# Let $A_l$ be the bytes of the activation $a_l$, $l = 1, \dots, L$ (the input $a_0$ is the caller's). The *cuts* are
# the layers $c_1 < c_2 < \dots$ whose outputs are kept. Each moment when a segment is complete is a
# candidate for the most memory. In the segment from $s$ to $e$ (so $a_s$ is its input, and $e$ is its
# last layer) these are held: every cut up to $s$, $s$ included (but not the input $a_0$), and $a_{s+1}, \dots, a_e$. What lies behind the segment has
# been used and freed.
#
# ### Task 4a: the most that is held (3 points)
#
# Write `most_held(sizes, cuts)`: the most bytes held at any time. `sizes` is the list $A_1, \dots, A_L$ (so
# `sizes[l - 1]` is $A_l$), and `cuts` a sorted list of layers from 1 to $L - 1$; it may be empty. In the
# diagram in part 2, with all sizes 1 and `cuts = [3]`, it is 4.


# %% nbgrader={"grade_id": "most_held", "solution": true}
def most_held(sizes, cuts):
    """The most bytes of a_1 ... a_L held, with the outputs of the layers `cuts` as checkpoints."""
    ### BEGIN SOLUTION
    edges = [0, *cuts, len(sizes)]
    checkpoints, most = 0, 0
    for start, end in itertools.pairwise(edges):
        checkpoints += sizes[start - 1] if start else 0  # a_start; a_0 is the caller's
        most = max(most, checkpoints + sum(sizes[start:end]))  # a_{start+1} ... a_end
    return most
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_most_held", "grade": true, "points": 3}
def count_held(sizes, cuts):
    """The same, by going through the schedule's actions one by one."""
    held, most = set(), 0
    for kind, layer in schedules.selective(len(sizes), cuts):
        (held.add if kind is npnet.schedule.FORWARD else held.discard)(layer)
        most = max(most, sum(sizes[number - 1] for number in held))
    return most


def check_most_held(sizes, cuts):
    right, edges = count_held(sizes, cuts), [0, *cuts, len(sizes)]
    largest = max(sum(sizes[a:b]) for a, b in itertools.pairwise(edges))
    kept, twice = sum(sizes[cut - 1] for cut in cuts), 0
    passed = 0
    for a, b in itertools.pairwise(edges):
        passed += sizes[a - 1] if a else 0
        twice = max(twice, passed + sum(sizes[a:b]) + (sizes[b - 1] if b < len(sizes) else 0))
    mistakes = {
        "You count all checkpoints with the largest segment; those behind a segment have been used by then": kept
        + largest,
        "You count one segment without the checkpoints before it": largest,
        "You count everything, as if nothing were dropped": sum(sizes),
        "You look at the last segment only": kept + sum(sizes[edges[-2] :]),
        "You count the checkpoint behind a segment twice: it is the segment's last activation": twice,
    }
    with labs.unchanged(sizes=sizes, cuts=cuts), labs.told("most_held"):
        got = most_held(sizes, cuts)
    labs.check_number(got, right, f"most_held({sizes}, {cuts})", mistakes=mistakes)


check_most_held([5, 7, 2, 1, 3, 8], [3])
check_most_held([5, 7, 2, 1, 3, 8], [1, 4])
check_most_held([40, 30, 20, 3, 2, 1], [2, 4])
check_most_held([3, 2, 1], [])
check_most_held([1] * 6, [3])
check_most_held([1] * 9, [3, 6])
### BEGIN HIDDEN TESTS
rng = np.random.default_rng(11)
for depth in range(1, 12):
    for count in range(min(depth, 5)):
        cuts = sorted(rng.choice(np.arange(1, depth), count, replace=False).tolist())
        check_most_held(rng.integers(1, 100, depth).tolist(), cuts)
### END HIDDEN TESTS
print("most_held: right")

# %% [markdown]
# ### Task 4b: the best cuts (2 points)
#
# Write `best_cuts(sizes, count)`: of all choices of `count` layers from 1 to $L - 1$, a sorted list of those with which
# `most_held` is least. Try them all: `itertools.combinations` lists them. (If several are equally good, any
# of them. For a chain of hundreds of layers, trying all is hopeless; lab 8 does it by dynamic programming.)


# %% nbgrader={"grade_id": "best_cuts", "solution": true}
def best_cuts(sizes, count):
    """The `count` layers to keep the outputs of, so that the most that is held is least."""
    ### BEGIN SOLUTION
    choices = itertools.combinations(range(1, len(sizes)), count)
    return list(min(choices, key=lambda cuts: most_held(sizes, cuts)))
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_best_cuts", "grade": true, "points": 2}
### BEGIN HIDDEN TESTS
# From here on with the right most_held.
def most_held(sizes, cuts):
    edges = [0, *cuts, len(sizes)]
    return max(
        sum(sizes[cut - 1] for cut in cuts if cut <= a) + sum(sizes[a:b])
        for a, b in itertools.pairwise(edges)
    )


### END HIDDEN TESTS
def check_best_cuts(sizes, count):
    with labs.unchanged(sizes=sizes), labs.told("best_cuts"):
        got = best_cuts(sizes, count)
    call, depth = f"best_cuts({sizes}, {count})", len(sizes)
    kind = None if got is None else type(got).__name__
    assert isinstance(got, (list, tuple)), f"{call}: expected a list of layers, got {kind}"
    got, choices = list(got), itertools.combinations(range(1, depth), count)
    assert len(got) == count, f"{call}: expected {count} cuts, got {got}"
    assert got == sorted(set(got)), f"{call}: expected a sorted list without repetition, got {got}"
    allowed = set(range(1, depth))
    assert set(got) <= allowed, f"{call}: cuts are layers from 1 to {depth - 1}, got {got}"
    held, least = count_held(sizes, got), min(count_held(sizes, list(cuts)) for cuts in choices)
    narrow = sorted(sorted(range(1, depth), key=lambda layer: sizes[layer - 1])[:count])
    equal = [depth // (count + 1) * i for i in range(1, count + 1)]
    words = ""
    if got == equal:
        words = ". Segments of equally many layers are not segments of equally many bytes"
    elif got == narrow:
        words = (
            ". You cut where the activations are narrowest; the segments between have to fit, too"
        )
    elif held == max(
        count_held(sizes, list(cuts)) for cuts in itertools.combinations(range(1, depth), count)
    ):
        words = ". It is the worst choice: you take the maximum for the minimum"
    assert held == least, (
        f"{call}: with your {got}, {held} bytes are held, and {least} are enough{words}"
    )


check_best_cuts([5, 7, 2, 1, 3, 8], 1)
check_best_cuts([9, 9, 9, 2, 9, 9, 1, 1], 2)
check_best_cuts([1, 1, 1, 8, 8, 8, 8, 1], 2)
check_best_cuts([4, 4, 4], 0)
### BEGIN HIDDEN TESTS
rng = np.random.default_rng(12)
for depth in (2, 5, 8):
    for count in range(min(depth, 4)):
        check_best_cuts(rng.integers(1, 100, depth).tolist(), count)
### END HIDDEN TESTS
print("best_cuts: right")

# %% [markdown]
# Now look at two chains. On the left 50 equal layers, cut by PyTorch's rule: what is held, against the
# number of segments. On the right an hourglass of 16 layers, cut into equally many layers, and with your best
# cuts.

# %% nbgrader={"grade_id": "draw_cuts", "locked": true}
depth = 50
numbers = list(range(1, depth + 1))
held = []
for number in numbers:
    lengths = [len(part) for part in split([None] * depth, number)]
    held.append(most_held([1] * depth, list(itertools.accumulate(lengths[:-1]))))
best = min(numbers, key=lambda number: held[number - 1])
for number in (best, 25, 26):
    last = len(split([None] * depth, number)[-1])
    print(
        f"{depth} layers, {number} segments: {held[number - 1]} held; the last segment has {last}"
    )

hourglass = [256, 256, 256, 192, 128, 64, 32, 8, 16, 32, 64, 64, 96, 128, 128, 10]
kilobytes = [4 * width for width in hourglass]  # float32, a batch of 1000
counts = list(range(3 if labs.grading() else 6))
equal, chosen = [], []
for count in counts:
    lengths = [len(part) for part in split(hourglass, count + 1)]
    equal.append(most_held(kilobytes, list(itertools.accumulate(lengths[:-1]))))
    cuts = best_cuts(kilobytes, count)
    chosen.append(most_held(kilobytes, cuts))
    print(
        f"hourglass, {count} checkpoints: equal {equal[-1]:>5} kB, best {chosen[-1]:>5} kB at {cuts}"
    )

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
axes[0].plot(numbers, held, ".-", label="PyTorch's rule")
axes[0].axvline(depth**0.5, color="grey", linestyle=":", label=r"$\sqrt{L}$ segments")
axes[0].set(
    title=f"{depth} equal layers", xlabel="segments", ylabel="activations held at most", ylim=0
)
axes[1].plot(counts, equal, "s-", label="equally many layers")
axes[1].plot(counts, chosen, "o-", label="best cuts")
axes[1].set(
    title="an hourglass of 16 layers", xlabel="checkpoints", ylabel="kB held at most", ylim=0
)
for ax in axes:
    ax.legend()
plt.show()

# %% [markdown]
# And this is a whole training step of the hourglass with **one** cut: the bytes alive, action by action.
# Move the cut through the network. Where does it help, and what makes it useless near the ends?

# %% nbgrader={"grade_id": "slide", "locked": true}
model = npnet.mlp([20, *hourglass], "relu", rng=0)


def timeline(cut):
    figure = plt.Figure(figsize=(8, 3.8), layout="constrained")
    plan = npnet.plan(model, 1000, strategy=schedules.selective(len(hourglass), [cut]))
    return plots.plot_timeline(plan, ax=figure.add_subplot())


labs.slider(timeline, list(range(1, 16)), "cut", value=8)

# %% [markdown]
# ### Question 2 (2 points)
#
# * On the left: with 25 segments 26 activations are held, with 26 segments all 50. Explain the jump. Which rule would
#   you use instead, and how many would it hold with 26 segments?
# * On the right, with one checkpoint: the best cut is not at the waist, layer 8, although no activation is cheaper to
#   keep. Why? Give the numbers (the widths are in the cell above).

# %% [markdown] nbgrader={"grade_id": "question_cuts", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# $\lfloor 50/25 \rfloor = 2$: 25 segments of two layers, 24 checkpoints and 2. But $\lfloor 50/26 \rfloor = 1$: the first 25
# segments have one layer each, which saves nothing, and the last one has the other 25: $25 + 25 = 50$.
# Segments whose lengths differ by one at most (24 of two layers and 2 of one) would hold $25 + 2 = 27$, or less
# when the longer ones come first. Few segments are best anyway: about $\sqrt{50} \approx 7$.
#
# The first half of the hourglass is heavier than the second. Cut at the waist, the segment 1 to 8 has
# $256\cdot3 + 192 + 128 + 64 + 32 + 8 = 1248$ numbers a sample (4992 kB), the other one 538 and the checkpoint's 8. Cut at 4, the
# segments have 960, and $770 + 192 = 962$ with the checkpoint (3848 kB): the most is what counts, so they
# should be equally heavy, *with* the checkpoint; a narrow place is worth a small imbalance only.
# ### END SOLUTION

# %% [markdown]
# ## 6 A training from start to end
#
# 100,000 points near the line $y = 2x + 3$, one epoch in batches of 1000, and a chain of 16 layers that is far
# too large for a line: memory is what we want to see. It is trained three times from the same weights: plain, with
# your segments, and with npnet's own `checkpoint_sequential`.


# %% nbgrader={"grade_id": "train", "locked": true}
def plain_step(layers, x, dy_of):
    y, tape = forward_chain(layers, x)
    return backward_chain(layers, tape, dy_of(y))


def your_step(layers, x, dy_of):
    y, kept = checkpoint_sequential(layers, 4, x)
    return backward_sequential(kept, dy_of(y))


def built_in_step(layers, x, dy_of):
    y, tape = npnet.checkpoint.checkpoint_sequential(layers, 4, x)
    return tape.backward(dy_of(y))


samples = 2000 if labs.grading() else 100_000
x_all, y_all = npnet.make_linear(samples, noise=0.5, rng=0, dtype=np.float32)
print(f"x: {x_all.shape}, from {x_all.min():.2f} to {x_all.max():.2f}; y: {y_all.shape}")


class Training:
    """A model trained by one of the three ways; all begin with the same weights."""

    def __init__(self, step):
        self.model = npnet.mlp([1] + [48] * 15 + [1], "relu", rng=3)
        self.step, self.optimizer = step, npnet.Adam(1e-3)
        self.losses, self.seconds = [], []

    def train_on(self, x, y):
        def dy_of(output):
            value, dy = npnet.MeanSquaredError().value_and_gradient(output, y)
            self.losses.append(float(value))
            return dy

        began = time.perf_counter()
        self.step(self.model.layers, x, dy_of)
        self.optimizer.step(self.model.parameters())
        self.seconds.append(time.perf_counter() - began)


trainings = {"plain": plain_step, "yours": your_step, "npnet's": built_in_step}
trainings = {name: Training(step) for name, step in trainings.items()}
batches = [(x_all[i : i + 1000], y_all[i : i + 1000]) for i in range(0, samples, 1000)]
static = labs.grading() or "NPNET_STATIC" in os.environ  # nobody looks at the bar
for x, y in tqdm(batches[:-1], desc="training", file=sys.stdout, disable=static):
    for (
        training
    ) in trainings.values():  # they take turns: what else the machine does hits all alike
        training.train_on(x, y)

times, peaks = {}, {}
for name, training in trainings.items():
    times[name] = 1e3 * median(training.seconds)
    peaks[name] = npnet.measure_peak(training.train_on, *batches[-1]).increase_bytes / 1e6
print("            last loss   step (ms)   ratio   peak (MB)   ratio   weights as plain's")
for name, training in trainings.items():
    same = all(
        np.array_equal(a.value, b.value)
        for a, b in zip(
            training.model.parameters(), trainings["plain"].model.parameters(), strict=True
        )
    )
    print(
        f"{name:<10}{training.losses[-1]:>11.6f}{times[name]:>12.2f}{times[name] / times['plain']:>8.2f}"
        f"{peaks[name]:>12.2f}{peaks[name] / peaks['plain']:>8.2f}   {same}"
    )

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for i, (name, training) in enumerate(trainings.items()):
    axes[0].plot(training.losses, linewidth=6 - 2 * i, alpha=0.7, label=name)
axes[0].set(
    title="the loss: three curves in one", xlabel="iteration", ylabel="mean squared error", ylim=0
)
few = slice(0, 400)
grid = np.linspace(-1, 1, 100, dtype=np.float32)[:, None]
axes[1].plot(x_all[few], y_all[few], ".", color="lightgrey", label="data (400 of them)")
axes[1].plot(grid, 2 * grid + 3, "k--", label="y = 2x + 3")
axes[1].plot(
    grid, trainings["yours"].model.predict(grid), color="C1", label="trained with your segments"
)
axes[1].set(title="what was learnt", xlabel="x", ylabel="y", xticks=[-1, -0.5, 0, 0.5, 1])
for ax in axes:
    ax.legend()
plt.show()

# %% [markdown]
# The three trainings are one, bit for bit. (Do not be surprised if the ratio of the times is near 1: 12 of 16 layers
# are run again, but memory that was just freed is handed out again faster than fresh memory from the system, and this
# may pay for it.) Is the built-in version's peak higher than yours? It lets go of a segment only when
# the whole of it has had its backward pass. (npnet trains by schedules, `npnet.fit(..., schedule="sqrt")`,
# and these free each activation as it is used.)
#
# Where PyTorch is installed, we can ask it, too: the same weights, its own `checkpoint_sequential`.

# %% nbgrader={"grade_id": "pytorch", "locked": true}
try:
    import torch
    from torch.utils.checkpoint import checkpoint_sequential as torch_checkpoint_sequential
except ImportError:
    torch = None
    print("PyTorch is not installed: comparison skipped. (Nothing else needs it.)")
if torch is not None:
    layers = make_layers([6, 5, 5, 5, 2], 13)
    modules = []
    for layer in layers:
        linear = torch.nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(np.array(layer.weight.value)))
            linear.bias.copy_(torch.from_numpy(np.array(layer.bias.value)))
        modules.append(
            linear if layer is layers[-1] else torch.nn.Sequential(linear, torch.nn.Tanh())
        )
    x = np.random.default_rng(14).normal(size=(8, 6))
    output = torch_checkpoint_sequential(
        torch.nn.Sequential(*modules), 2, torch.from_numpy(x).requires_grad_(), use_reentrant=False
    )
    output.sum().backward()
    y, kept = checkpoint_sequential(layers, 2, x)
    backward_sequential(kept, np.ones_like(y))
    first = modules[0][0].weight.grad.numpy()
    print("outputs agree with PyTorch's:  ", np.allclose(y, output.detach().numpy()))
    print("gradients agree with PyTorch's:", np.allclose(layers[0].weight.gradient, first))

# %% [markdown]
# ### Question 3 (2 points)
#
# Somebody tries the lazy gradient on a model with these sizes, in float32, with Adam and batches of 128:
# `before` 40,000 - 100 - 32, `after` 32 - 3000 - 40,000 - 1. They measure no difference at all, and
# blame the method.
#
# Estimate: the bytes of weights, gradients and Adam's state together; the bytes of the activations of each half
# (without the input). How much can the lazy gradient save? What would you advise?

# %% [markdown] nbgrader={"grade_id": "question_model", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# Weights: $40{,}000\cdot100 + 100\cdot32 + 32\cdot3000 + 3000\cdot40{,}000 + 40{,}000 \approx 124$ million; times 4 bytes, times 4
# (weight, gradient, two of Adam's): about 2 GB. Activations: `before` $128\cdot132\cdot4 \approx 68$ kB, `after`
# $128\cdot43{,}001\cdot4 \approx 22$ MB (twice that where the outputs of a linear layer and of its activation are both kept). The lazy
# gradient forgets `before`'s: 68 kB of 2 GB, three hundred-thousandths. Checkpointing shrinks activations alone, and here they are 1 %.
# First: cut where the halves are equally heavy. But what helps is fewer bytes a weight: SGD instead of Adam
# (1 GB less), an update of each layer as soon as its gradient is there (so that not all gradients are alive together:
# the largest is 480 MB, so hardly anything here), a narrower layer. Checkpointing pays with large batches and deep networks.
# ### END SOLUTION

# %% [markdown]
# ## What you have learnt
#
# * At a bottleneck the backward pass falls into two parts, with the gradient $\partial C/\partial h$ between
#   them. To save memory, that is not enough: what is not needed yet must not be there yet.
# * Memory has to be read at its peak. After a step, what is left is weights and the optimizer's state, with
#   checkpointing or without.
# * `checkpoint_sequential` keeps the inputs of segments, and restores one segment at a time; the last one is not
#   run again. Outputs and gradients are those of plain backpropagation, bit for bit.
# * With equal layers, about $\sqrt L$ segments hold least. With unequal ones, what counts is bytes: cuts
#   where it is narrow, and segments that are equally heavy with their checkpoints.
# * Checkpointing shrinks activations, and nothing else. Estimate first what they are of the whole.
#
# npnet has all of this built in: `npnet.lazy_gradient`, `npnet.checkpoint.checkpoint_sequential`, and
# `npnet.plan(..., memory_budget=...)`, which finds the best schedule. Lab 3 checkpoints any part of a model, with
# random numbers in it; lab 8 finds the best cuts without trying all.
#
# ## To read
#
# * T. Chen, B. Xu, C. Zhang and C. Guestrin, "Training deep nets with sublinear memory cost", 2016,
#   arXiv:1604.06174: segments, and their number.
# * A. Griewank and A. Walther, *Evaluating Derivatives: Principles and Techniques of Algorithmic Differentiation*, 2nd
#   edition, SIAM, 2008, chapter 12: reversal schedules and checkpointing.
# * O. Beaumont, L. Eyraud-Dubois, J. Herrmann, A. Joly and A. Shilova, "Optimal checkpointing for heterogeneous
#   chains: how to train deep neural networks with limited memory", 2019, arXiv:1911.13214.
# * The documentation of `torch.utils.checkpoint`.
