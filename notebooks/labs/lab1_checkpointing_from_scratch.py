# %% [markdown]
# # Lab 1: Checkpointing from scratch
#
# The backward pass needs the activations of the forward pass again, in reverse order. Plain training
# keeps them all, and in a deep network they are most of the memory. *Gradient checkpointing* keeps a
# few of them, the *checkpoints*, forgets the others, and computes those a second time when their turn
# comes. It pays with time, and gets memory.
#
# You will write it yourself, in NumPy, and see on MNIST that it changes no gradient by a single bit.
#
# | part | you write | points |
# | --- | --- | --- |
# | 1 One layer | `layer_backward` | 3 |
# | 2 What plain backpropagation keeps | `activation_bytes`; a question | 2 + 2 |
# | 3 From a checkpoint on | `forward_between_checkpoints` | 3 |
# | 4 Backpropagation with checkpoints | `backprop`: its gradients, its forwards, its memory | 4 + 2 + 2 |
# | 5 On MNIST | nothing: you watch | |
# | 6 What it costs, what it saves | two formulae; two questions | 3 + 2 + 2 |
#
# It takes about an hour. Write where it says `YOUR CODE HERE` or `YOUR ANSWER HERE`. Below each task is
# a cell of tests: run it, and it says what is wrong. (There are more tests when the lab is graded.)

# %% nbgrader={"grade_id": "setup", "locked": true}
import time
from statistics import median

import matplotlib.pyplot as plt
import numpy as np

import npnet
from npnet import labs, measure_peak, plots, schedules
from npnet.memory import format_bytes

(x_train, y_train), (x_test, y_test) = npnet.load_mnist()
print(
    f"x_train: {x_train.shape}, {x_train.dtype}, {format_bytes(x_train.nbytes)}; y_train: {y_train.shape}"
)
print(f"x_test:  {x_test.shape}; a label: {y_test[0]}")

# %% [markdown]
# ## 1 One layer
#
# Our network is a chain of $L$ layers. Layer $l$ turns the activation $a_{l-1}$ into
#
# $$z_l = W_l\, a_{l-1} + b_l, \qquad a_l = \sigma(z_l), \qquad \sigma(z) = \frac{1}{1 + e^{-z}}.$$
#
# A whole batch goes through at once, **one sample a column**:
#
# | array | shape |
# | --- | --- |
# | $a_{l-1}$ | (inputs, batch) |
# | $W_l$ | (outputs, inputs) |
# | $b_l$ | (outputs, 1) |
# | $a_l$ | (outputs, batch) |


# %% nbgrader={"grade_id": "layer_forward", "locked": true}
def sigmoid(z):
    return 1.0 / (1.0 + np.exp(-z))


def layer_forward(w, b, a_in):
    """The activation behind the layer: (inputs, batch) -> (outputs, batch)."""
    return sigmoid(w @ a_in + b)


# %% [markdown]
# ### Task 1: the backward pass of a layer (3 points)
#
# The backward pass comes with the gradient of the cost $C$ at the layer's output,
# $\partial C/\partial a_l$, and leaves with three gradients: at the input, at the biases, at the weights.
#
# 1. Through the sigmoid: $\partial C/\partial z_l = \partial C/\partial a_l \odot \sigma'(z_l)$, where
#    $\odot$ is the product element by element. The derivative follows from the *output* alone:
#    $\sigma'(z_l) = a_l\,(1 - a_l)$. So nobody needs to keep $z_l$.
# 2. Through the product. Each gradient has the shape of what it is the gradient of, and there is one way
#    to multiply that gives this shape. The gradients at weights and biases are **summed** over the batch.
#
# The first layer is special: nobody needs the gradient at the data $a_0$, and with 784 inputs it would be
# the largest array of all. Where `needs_gradient_in` is False, give `None` in its place.
#
# Do not change the arrays you are given: somebody may need them again.


# %% nbgrader={"grade_id": "layer_backward", "solution": true}
def layer_backward(w, a_in, a_out, gradient, needs_gradient_in=True):
    """The backward pass of a layer.

    Args:
        w: the weights, (outputs, inputs).
        a_in, a_out: the activations before and behind the layer, (inputs, batch), (outputs, batch).
        gradient: of the cost at a_out, (outputs, batch).
        needs_gradient_in: whether to compute gradient_in at all.

    Returns:
        gradient_in, nabla_b, nabla_w: the gradients at a_in (or None), at the biases and at the weights.
    """
    ### BEGIN SOLUTION
    dz = gradient * (a_out * (1 - a_out))  # (outputs, batch)
    gradient_in = w.T @ dz if needs_gradient_in else None
    nabla_b = dz.sum(axis=1, keepdims=True)
    nabla_w = dz @ a_in.T
    return gradient_in, nabla_b, nabla_w
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_layer_backward", "grade": true, "points": 3}
def by_npnet(w, a_in, b, gradient):
    """The same three gradients, as a layer of npnet computes them (its samples are rows)."""
    layer = npnet.Dense(w.shape[1], w.shape[0], "sigmoid", dtype=np.float64)
    layer.weight.value, layer.bias.value = w, b[:, 0]
    _, saved = layer.forward(a_in.T)
    gradient_in = layer.backward(gradient.T, saved).T
    return gradient_in, layer.bias.gradient[:, None], layer.weight.gradient


def check_layer_backward(inputs, outputs, batch):
    rng = np.random.default_rng(inputs)
    w, b = rng.normal(size=(outputs, inputs)), rng.normal(size=(outputs, 1))
    a_in, gradient = rng.random((inputs, batch)), rng.normal(size=(outputs, batch))
    a_out = layer_forward(w, b, a_in)
    with (
        labs.unchanged(w=w, a_in=a_in, a_out=a_out, gradient=gradient),
        labs.told("layer_backward"),
    ):
        answer = layer_backward(w, a_in, a_out, gradient)
    assert isinstance(answer, tuple), "return three gradients, with commas between"
    assert len(answer) == 3, f"return three gradients, not {len(answer)}"
    right = by_npnet(w, a_in, b, gradient)
    wrong = {  # what typical mistakes give
        "the factor (1 - a_out) of the sigmoid's derivative is missing": gradient / (1 - a_out),
        "the sigmoid's derivative is missing": gradient / (a_out * (1 - a_out)),
        "the derivative is (1 - a_out), where a_out (1 - a_out) is asked": gradient / a_out,
        "the derivative is that of tanh, 1 - a_out ** 2": gradient * (1 + a_out) / a_out,
    }
    wrong = {words: by_npnet(w, a_in, b, each) for words, each in wrong.items()}
    if inputs == outputs:
        words = "it is computed with W, where its transpose is asked"
        wrong[words] = (w @ np.linalg.solve(w.T, right[0]), None, None)
    names = ["gradient_in", "nabla_b", "nabla_w"]
    for i, name in enumerate(names):
        mistakes = {words: each[i] for words, each in wrong.items() if each[i] is not None}
        labs.check_array(answer[i], right[i], name, batch=batch, mistakes=mistakes)
    with labs.told("layer_backward(..., needs_gradient_in=False)"):
        answer = layer_backward(w, a_in, a_out, gradient, needs_gradient_in=False)
    assert answer[0] is None, "gradient_in: where it is not needed, return None in its place"
    labs.check_array(answer[2], right[2], "nabla_w, without gradient_in", batch=batch)


check_layer_backward(4, 4, 6)
check_layer_backward(5, 3, 8)
### BEGIN HIDDEN TESTS
check_layer_backward(7, 1, 2)
check_layer_backward(30, 30, 64)
### END HIDDEN TESTS
print("layer_backward: right")

# %% [markdown]
# ## 2 What plain backpropagation keeps
#
# Here is plain backpropagation, written with the two functions. `npnet.Network` brings the rest: the
# weights and biases (`self.weights`, `self.biases`, lists with one array a layer), the derivative of the
# quadratic cost, $\partial C/\partial a_L = a_L - y$, and `SGD`, which calls `backprop` for each batch.
#
# Look at the list `activations`: after the forward pass it holds $a_0, a_1, \dots, a_L$, all of them.


# %% nbgrader={"grade_id": "plain_network", "locked": true}
class PlainNetwork(npnet.Network):
    """A network whose backprop keeps every activation."""

    def backprop(self, x, y):
        weights, biases = self.weights, self.biases
        depth = len(weights)
        nabla_b, nabla_w = [None] * depth, [None] * depth
        activations = [x]
        for w, b in zip(weights, biases, strict=True):
            activations.append(layer_forward(w, b, activations[-1]))
        gradient = self.cost_derivative(activations[-1], y)
        for i in reversed(range(depth)):
            a_out = activations.pop()  # its turn has come, and nobody needs it afterwards
            gradient, nabla_b[i], nabla_w[i] = layer_backward(
                weights[i], activations[-1], a_out, gradient, needs_gradient_in=i > 0
            )
        return nabla_b, nabla_w


# %% nbgrader={"grade_id": "look_at_shapes", "locked": true}
sizes, batch = [784, 30, 30, 30, 30, 10], 100
np.random.seed(0)
network = PlainNetwork(sizes)
a = x_train[:batch].T
print(f"a_0: {a.shape!s:>10} {a.nbytes:>8,} bytes (the data; the caller has them anyway)")
for number, (w, b) in enumerate(zip(network.weights, network.biases, strict=True), 1):
    a = layer_forward(w, b, a)
    print(f"a_{number}: {a.shape!s:>10} {a.nbytes:>8,} bytes")

# %% [markdown]
# ### Task 2: count the bytes (2 points)
#
# How many bytes do the activations take that plain backpropagation keeps, $a_1, \dots, a_L$? ($a_0$ is
# the caller's.) Write it as a function of the layer sizes and the size of the batch. A number in float64
# takes 8 bytes. Compare with the shapes printed above.


# %% nbgrader={"grade_id": "activation_bytes", "solution": true}
def activation_bytes(sizes, batch, itemsize=8):
    """Bytes of the activations a_1 ... a_L of a network with these layer sizes (the input's first)."""
    ### BEGIN SOLUTION
    return sum(sizes[1:]) * batch * itemsize
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_activation_bytes", "grade": true, "points": 2}
### BEGIN HIDDEN TESTS
# From here on with the right layer_backward: a mistake costs its points once.
def layer_backward(w, a_in, a_out, gradient, needs_gradient_in=True):
    dz = gradient * (a_out * (1 - a_out))
    return w.T @ dz if needs_gradient_in else None, dz.sum(axis=1, keepdims=True), dz @ a_in.T


### END HIDDEN TESTS
def check_activation_bytes(sizes, batch, itemsize=8):
    right = sum(
        np.empty((size, batch), dtype=f"f{itemsize}").nbytes for i, size in enumerate(sizes) if i
    )
    mistakes = {
        "You count a_0, which is the caller's": right + sizes[0] * batch * itemsize,
        "You count one sample instead of the batch": right // batch,
        "You count numbers instead of bytes": right // itemsize,
        "You leave out the output, a_L": right - sizes[-1] * batch * itemsize,
        "You take 8 bytes a number, whatever itemsize is": right // itemsize * 8,
        "These are the weights; activations have a row for each unit and a column for each sample": (
            sum(m * n for m, n in zip(sizes[1:], sizes[:-1], strict=True)) * itemsize
        ),
    }
    with labs.told("activation_bytes"):
        got = activation_bytes(sizes, batch, itemsize)
    labs.check_number(
        got, right, f"activation_bytes({sizes}, {batch}, {itemsize})", mistakes=mistakes
    )


check_activation_bytes([784, 30, 30, 30, 30, 10], 100)
check_activation_bytes([20, 7, 3], 5, itemsize=4)
### BEGIN HIDDEN TESTS
check_activation_bytes([784, 100, 10], 128)
check_activation_bytes([3, 2], 1)
### END HIDDEN TESTS
print("activation_bytes: right")

# %% [markdown]
# Does the formula hold? We measure. `measure_peak` counts every byte that is allocated while a function
# runs, at its highest point. Networks with 5, 10, 20 and 40 hidden layers of 30, batches of 1000:

# %% nbgrader={"grade_id": "measure_depth", "locked": true}
batch, depths = 1000, [5, 10, 20, 40]
x, y = x_train[:batch].T, y_train[:batch].T
measured, counted, gradients = [], [], []
for hidden in depths:
    network = PlainNetwork([784] + [30] * hidden + [10])
    measured.append(measure_peak(network.backprop, x, y).increase_bytes)
    counted.append(activation_bytes(network.sizes, batch))
    gradients.append(sum(array.nbytes for array in network.weights + network.biases))
    print(
        f"{hidden:>3} hidden layers: activations {format_bytes(counted[-1])}, "
        f"gradients {format_bytes(gradients[-1])}, measured peak {format_bytes(measured[-1])}"
    )

figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
ax.plot(depths, np.array(measured) / 1e6, "ko", label="measured peak of backprop")
ax.plot(depths, np.array(counted) / 1e6, "-", label="activations, by your formula")
ax.plot(depths, np.array(gradients) / 1e6, "--", label="gradients of all layers")
ax.set(
    title=f"plain backpropagation, batch {batch}",
    xlabel="hidden layers",
    ylabel="memory (MB)",
    ylim=0,
)
ax.legend()
plt.show()

# %% [markdown]
# The memory grows with the number of layers, and nearly all of it is activations. The little above the
# line is what one layer needs while it computes.
#
# ### Question 1 (2 points)
#
# Not everything grows with the batch: the gradients of weights and biases do not. For 40 hidden layers of
# 30 (sizes 784, 30, ..., 30, 10), from which batch size on do the activations take more than the
# gradients? Say how you got there. What does that mean for a network of wide layers and small batches?

# %% [markdown] nbgrader={"grade_id": "question_batch", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# The gradients have as many numbers as there are weights and biases:
# $784\cdot30 + 39\cdot30\cdot30 + 30\cdot10 + 40\cdot30 + 10 = 60{,}130$. The activations have
# $40\cdot30 + 10 = 1210$ numbers a sample. So from a batch of $60130/1210 \approx 50$ on the activations
# are more. In a wide network with small batches the weights ($n^2$ a layer) outweigh the activations
# ($n\cdot$batch a layer) as long as the batch is smaller than the width; checkpointing, which shrinks the
# activations alone, then saves little.
# ### END SOLUTION

# %% [markdown]
# ## 3 From a checkpoint on
#
# Now we keep only every $n$-th activation. Here are six layers with a checkpoint every three. Time runs
# downwards; `F` is computed, `R` *re*computed, `o` held, `B` used by a backward step and then freed, and
# `.` is not in memory:

# %% nbgrader={"grade_id": "look_at_schedule", "locked": true}
print(schedules.every_nth(6, 3).diagram())

# %% [markdown]
# Find these three things in the picture:
#
# * The forward pass keeps $a_3$, and drops $a_1$ and $a_2$ as soon as they have been used.
# * The **last** segment ($a_4, a_5, a_6$) is not dropped: its backward pass comes at once.
# * Then $a_1$ and $a_2$ are recomputed from $a_0$. But not $a_3$: it is the checkpoint, it is there.
#
# ### Task 3: run a part of the network again (3 points)
#
# Write the method `forward_between_checkpoints(a, checkpoint_idx_start, layer_idx_end)`. It starts with
# an activation `a` that was kept, runs the layers with the indices `checkpoint_idx_start`, ...,
# `layer_idx_end - 1`, and returns the list of `a` and all activations computed. Indices count from 0,
# as in Python: `self.weights[i]` belongs to the layer that turns $a_i$ into $a_{i+1}$. So the method gets
# $a_s$ and $s$, $e$, and returns $[a_s, a_{s+1}, \dots, a_e]$, that is $e - s + 1$ arrays.


# %% nbgrader={"grade_id": "forward_between_checkpoints", "solution": true}
class SegmentNetwork(PlainNetwork):
    """A network that can be run from any of its activations on."""

    def __init__(self, sizes, checkpoint_every_nth_layer=0):
        super().__init__(sizes)
        self.checkpoint_every_nth_layer = checkpoint_every_nth_layer  # 0: plain backpropagation

    def forward_between_checkpoints(self, a, checkpoint_idx_start, layer_idx_end):
        """[a_s, ..., a_e] for a = a_s, s = checkpoint_idx_start and e = layer_idx_end."""
        ### BEGIN SOLUTION
        activations = [a]
        for i in range(checkpoint_idx_start, layer_idx_end):
            activations.append(layer_forward(self.weights[i], self.biases[i], activations[-1]))
        return activations
        ### END SOLUTION


# %% nbgrader={"grade_id": "test_forward_between_checkpoints", "grade": true, "points": 3}
def check_forward_between(sizes, start, end):
    np.random.seed(3)
    network = SegmentNetwork(sizes)
    official = npnet.NetworkWithCheckpointing(sizes)
    official.weights, official.biases = network.weights, network.biases
    a = np.random.default_rng(start).random((sizes[start], 4))
    call = f"forward_between_checkpoints(a_{start}, {start}, {end})"
    with labs.unchanged(a=a), labs.told(call):
        got = network.forward_between_checkpoints(a, start, end)
    right = official.forward_between_checkpoints(a, start, end)
    mistakes = {}
    for other in (start + 1, start - 1):
        if 0 <= other < len(official.weights) and official.weights[other].shape[1] == len(a):
            skewed = layer_forward(official.weights[other], official.biases[other], a)
            words = f"this is a_{start} run through weights[{other}], which takes a_{other}"
            mistakes[words] = skewed
    labs.check_arrays(got, right, f"{call}: a_{{}}", first=start, mistakes=mistakes)


square = [5] * 8
check_forward_between(square, 0, 3)
check_forward_between(square, 2, 5)
check_forward_between([6, 5, 4, 3, 2], 1, 4)
check_forward_between(square, 3, 3)  # nothing to run: only a_3
### BEGIN HIDDEN TESTS
check_forward_between(square, 6, 7)
check_forward_between([6, 5, 4, 3, 2], 0, 4)
### END HIDDEN TESTS
print("forward_between_checkpoints: right")

# %% [markdown]
# ## 4 Backpropagation with checkpoints
#
# ### Task 4: put it together (4 + 2 + 2 points)
#
# Write `backprop` for `checkpoint_every_nth_layer` $= n \ge 1$. The segments begin at the activations
# $a_0, a_n, a_{2n}, \dots$; the last may be shorter than the others.
#
# 1. *Forward*: run the layers up to where the last segment begins. Keep $a_n, a_{2n}, \dots$ and no
#    other. Then run the last segment, and keep all of it.
# 2. *Backward*, segment by segment, from the last to the first. The last one is there; each other is
#    restored with `forward_between_checkpoints`. Go backwards through the segment with `layer_backward`
#    (as `PlainNetwork` does, with `needs_gradient_in=i > 0`).
# 3. *Let go*: an activation is not needed any more after the backward step of the layer behind it. An
#    array is freed when nothing refers to it: no list, no dictionary, no name. `list.pop()` and
#    `dict.pop(key)` hand an entry over and forget it.
#
# Three tests follow, with points of their own: the gradients are those of plain backpropagation, bit for
# bit; no layer is run again without need; the memory is what it should be. Begin with something that is
# right, and then improve it.


# %% nbgrader={"grade_id": "backprop", "solution": true}
class NetworkWithCheckpointing(SegmentNetwork):
    """A network whose backprop keeps every n-th activation, and recomputes the others."""

    def backprop(self, x, y):
        """nabla_b, nabla_w: lists with an array a layer, summed over the batch. x, y: columns."""
        n = self.checkpoint_every_nth_layer
        if n == 0:
            return super().backprop(x, y)
        weights, biases = self.weights, self.biases
        depth = len(weights)
        nabla_b, nabla_w = [None] * depth, [None] * depth
        ### BEGIN SOLUTION
        last = (depth - 1) // n * n  # the last segment begins at this activation
        checkpoints = {0: x}
        a = x
        for i in range(last):
            a = layer_forward(weights[i], biases[i], a)  # a_{i+1}
            if (i + 1) % n == 0:
                checkpoints[i + 1] = a
        del a  # or this name would hold a checkpoint beyond its time

        segment = self.forward_between_checkpoints(checkpoints.pop(last), last, depth)
        gradient = self.cost_derivative(segment[-1], y)
        behind = None  # the checkpoint behind the segment, from which the one after it began
        for start in range(last, -1, -n):
            end = min(start + n, depth)
            if behind is not None:
                segment = self.forward_between_checkpoints(checkpoints.pop(start), start, end - 1)
                segment.append(behind)
            for i in reversed(range(start, end)):
                a_out = segment.pop()
                gradient, nabla_b[i], nabla_w[i] = layer_backward(
                    weights[i], segment[-1], a_out, gradient, needs_gradient_in=i > 0
                )
            behind = segment.pop()
        ### END SOLUTION
        return nabla_b, nabla_w


# %% nbgrader={"grade_id": "test_gradients", "grade": true, "points": 4}
### BEGIN HIDDEN TESTS
# From here on with the right forward_between_checkpoints: a mistake costs its points once.
def right_forward_between_checkpoints(self, a, checkpoint_idx_start, layer_idx_end):
    activations = [a]
    for i in range(checkpoint_idx_start, layer_idx_end):
        activations.append(layer_forward(self.weights[i], self.biases[i], activations[-1]))
    return activations


SegmentNetwork.forward_between_checkpoints = right_forward_between_checkpoints


### END HIDDEN TESTS
def two_networks(sizes, n, batch, seed=4):
    """Plain and checkpointed, with the same weights; and a batch, in columns."""
    np.random.seed(seed)
    plain, checkpointed = PlainNetwork(sizes), NetworkWithCheckpointing(sizes, n)
    checkpointed.weights, checkpointed.biases = plain.weights, plain.biases
    x, y = np.random.random((sizes[0], batch)), np.random.random((sizes[-1], batch))
    return plain, checkpointed, x, y


def check_gradients(sizes, n, batch=6):
    plain, checkpointed, x, y = two_networks(sizes, n, batch)
    depth, call = len(sizes) - 1, f"{len(sizes) - 1} layers, a checkpoint every {n}"
    with labs.unchanged(x=x, y=y, weights=plain.weights), labs.told(f"backprop ({call})"):
        nabla_b, nabla_w = checkpointed.backprop(x, y)
    right_b, right_w = plain.backprop(x, y)
    hints = {
        layer: f"Layer {layer} is the last of a segment, and the layers behind it are right: is its "
        f"output a_{layer}, and is the segment restored from the checkpoint a_{layer - n}?"
        for layer in range(n, depth, n or depth)
    }
    hints[depth] = (
        "It is the last layer, so the mistake is in the forward pass: is each checkpoint kept under its "
        "own index? The output of weights[i] is a_{i+1}"
    )
    how = {"exact": True, "batch": batch, "backwards": True, "hints": hints}
    labs.check_arrays(nabla_w, right_w, f"{call}: nabla_w of layer {{}}", **how)
    labs.check_arrays(nabla_b, right_b, f"{call}: nabla_b of layer {{}}", **how)


check_gradients([5] * 11, n=3)
check_gradients([5] * 10, n=3)  # 9 layers: the last segment is as long as the others
for n in range(6):
    check_gradients([6, 5, 4, 5, 3], n)
### BEGIN HIDDEN TESTS
check_gradients([784, 30, 30, 30, 30, 30, 30, 10], n=4, batch=100)
check_gradients([8, 3], n=1)
check_gradients([8, 3], n=2)
check_gradients([5] * 51, n=7)
### END HIDDEN TESTS
print("gradients: those of plain backpropagation, bit for bit")


# %% nbgrader={"grade_id": "test_forwards", "grade": true, "points": 2}
def check_forwards(depth, n):
    plain, checkpointed, x, y = two_networks([4] * (depth + 1), n, batch=2)
    with labs.told("backprop"), labs.counting(globals(), "layer_forward") as calls:
        answer = checkpointed.backprop(x, y)
    labs.check_computed(answer, (plain.biases, plain.weights), "backprop")
    enough = schedules.every_nth(depth, n).extra_forwards
    segments, last = (depth - 1) // n, depth - (depth - 1) // n * n
    mistakes = {
        "you recompute the last layer of each segment, and the whole last segment": depth,
        "you recompute the last layer of each segment, whose output is the next checkpoint": enough
        + segments,
        "you recompute the last segment, which can be kept from the forward pass": enough + last,
        "you recompute the last segment (but for its output), which can be kept": enough + last - 1,
    }
    call = f"{depth} layers, a checkpoint every {n}"
    labs.check_calls(len(calls) - depth, enough, "recomputed forwards", mistakes, name=call)


check_forwards(50, 8)
check_forwards(10, 3)
### BEGIN HIDDEN TESTS
check_forwards(51, 4)
check_forwards(50, 7)
### END HIDDEN TESTS
print(
    "forwards: no more than needed; for 50 layers and n = 7:",
    schedules.every_nth(50, 7).extra_forwards,
)


# %% nbgrader={"grade_id": "test_peak", "grade": true, "points": 2}
def check_peak(depth, n, batch=400, width=30):
    plain, checkpointed, x, y = two_networks([width] * (depth + 1), n, batch)
    one = x.nbytes  # every activation takes as much
    gradients = depth * (width * width + width) * 8
    segments = (depth - 1) // n
    limit = (
        segments + n + 6
    ) * one + gradients  # checkpoints, a segment, and what layer_backward takes
    words = "nearly every activation is alive at once: what still refers to those used already, or dropped?"
    more = "is a segment that was used, or an activation in it, still there while the next is restored?"
    mistakes = {more: limit, words: 0.8 * depth * one + gradients}
    call = f"the peak of backprop with {depth} layers, a checkpoint every {n},"
    with labs.told("backprop"):
        labs.check_peak(
            lambda: checkpointed.backprop(x, y),
            limit,
            call,
            mistakes,
            like=(plain.biases, plain.weights),
        )


check_peak(50, 7)
check_peak(40, 4)
### BEGIN HIDDEN TESTS
check_peak(60, 6)
### END HIDDEN TESTS
print("peak: checkpoints, one segment, and what one layer takes")

# %% [markdown]
# ## 5 On MNIST
#
# Four networks begin with the same weights: plain, and with a checkpoint after every layer, every 2 and
# every 4. They train on the first 20,000 images. If checkpointing changes nothing, their accuracies are equal after every epoch, and so are
# all their weights.

# %% nbgrader={"grade_id": "train", "locked": true}
sizes, epochs, images = [784, 30, 30, 30, 30, 10], 3, 20_000
if labs.grading():
    epochs, images = 1, 1000
np.random.seed(1)
first = PlainNetwork(sizes)
weights, biases = first.weights, first.biases
networks = {"plain": first}
for n in (1, 2, 4):
    networks[f"every {n}"] = NetworkWithCheckpointing(sizes, n)
    networks[f"every {n}"].weights, networks[f"every {n}"].biases = weights, biases
accuracies = {name: [] for name in networks}
for name, network in networks.items():
    for _ in range(epochs):
        network.SGD(
            (x_train[:images], y_train[:images]), 1, mini_batch_size=100, eta=3.0, log=False
        )
        accuracies[name].append(network.evaluate((x_test, y_test)))
    print(f"{name:>8}:", ", ".join(f"{accuracy:.4f}" for accuracy in accuracies[name]))

for network in networks.values():
    assert all(map(np.array_equal, network.weights, first.weights)), "the weights are not the same"
print("After", epochs * images // 100, "steps, all weights are the same, bit for bit.")
figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
plots.plot_accuracies(accuracies, ax)
plt.show()

# %% [markdown]
# ## 6 What it costs, what it saves
#
# Three networks, one training step each, with batches of 100: shallow, longer, very deep. The networks
# take turns, so that whatever else the machine is doing hits all of them alike, and the median is taken.
# Memory is the peak of `backprop` (without the data).


# %% nbgrader={"grade_id": "measure_costs", "locked": true}
def measure(sizes, intervals, batch=100):
    """Milliseconds of a training step, and peak bytes of backprop, for each n."""
    rounds = 2 if labs.grading() else 25
    networks = {n: NetworkWithCheckpointing(sizes, n) for n in intervals}
    pair, columns = (x_train[:batch], y_train[:batch]), (x_train[:batch].T, y_train[:batch].T)
    seconds = {n: [] for n in intervals}
    for round_number in range(rounds + 2):
        for n, network in networks.items():
            start = time.perf_counter()
            network.update_mini_batch(pair, eta=0.1)  # calls backprop
            if round_number >= 2:  # the first ones are warming up
                seconds[n].append(time.perf_counter() - start)
    milliseconds = {n: 1e3 * median(times) for n, times in seconds.items()}
    peaks = {n: measure_peak(networks[n].backprop, *columns).increase_bytes for n in intervals}
    return milliseconds, peaks


def name_of(n):
    return f"every {n}" if n else "plain"


architectures = {
    "784, 100, 10": ([784, 100, 10], [0, 1, 2, 4]),
    "784, 6 x 30, 10": ([784] + [30] * 6 + [10], [0, 1, 2, 4]),
    "784, 50 x 30, 10": ([784] + [30] * 50 + [10], [0, 1, 2, 4, 7, 10, 25]),
}
print("network           checkpoints   step (ms)   ratio   peak (kB)   ratio   layers run again")
for title, (sizes, intervals) in architectures.items():
    intervals = intervals[:2] if labs.grading() else intervals
    milliseconds, peaks = measure(sizes, intervals)
    for n in intervals:
        again = schedules.every_nth(len(sizes) - 1, n).extra_forwards
        print(
            f"{title:<18}{name_of(n):<12}{milliseconds[n]:>10.2f}{milliseconds[n] / milliseconds[0]:>9.2f}"
            f"{peaks[n] / 1e3:>11.0f}{peaks[n] / peaks[0]:>9.2f}{again:>13}"
        )

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
bars = {name_of(n).removeprefix("every "): n for n in intervals}
plots.plot_bars(
    {name: milliseconds[n] for name, n in bars.items()},
    axes[0],
    title="50 hidden layers: time of a step",
    ylabel="ms",
    labels=[f"{milliseconds[n] / milliseconds[0]:.2f}" for n in intervals],
)
plots.plot_bars(
    {name: peaks[n] / 1e3 for name, n in bars.items()},
    axes[1],
    title="50 hidden layers: peak memory of backprop",
    ylabel="kB",
    labels=[f"{peaks[n] / peaks[0]:.2f}" for n in intervals],
)
for ax in axes:
    ax.set_xlabel("a checkpoint every n layers (on the bars: ratio to plain)")
plt.show()

# %% [markdown]
# ### Task 5: the two formulae (3 points)
#
# The chain has $L$ = `depth` layers, and a checkpoint every $n$ of them. Write, for your `backprop`:
#
# * `extra_forwards(depth, n)`: how many times a layer is run again;
# * `most_held(depth, n)`: how many of the activations $a_1, \dots, a_L$ are held at most at any time.
#
# Begin with the number of checkpoints, $k = \lfloor (L-1)/n \rfloor$: they are $a_n, a_{2n}, \dots, a_{kn}$.
# There are two moments that can be the worst for the memory: when the last segment is complete, and when
# the segment before it has been restored. Check yourself with the diagram in part 3: there are 2 extra
# forwards, and at most 4 activations held.


# %% nbgrader={"grade_id": "formulae", "solution": true}
def extra_forwards(depth, n):
    """How many times a layer is run again."""
    ### BEGIN SOLUTION
    return (n - 1) * ((depth - 1) // n)
    ### END SOLUTION


def most_held(depth, n):
    """How many of a_1 ... a_depth are held at most."""
    ### BEGIN SOLUTION
    k = (depth - 1) // n
    with_last_segment = k + (depth - k * n)
    with_segment_before = k + n - 1 if k else 0  # a_n ... a_{kn}, and the n - 1 restored
    return max(with_last_segment, with_segment_before)
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_formulae", "grade": true, "points": 3}
def count_held(schedule):
    """The most activations held, the input not counted, by going through the schedule's actions."""
    held, most = set(), 0
    for kind, layer in schedule:
        (held.add if kind is npnet.schedule.FORWARD else held.discard)(layer)
        most = max(most, len(held))
    return most


def check_formulae(depth, n):
    schedule = schedules.every_nth(depth, n)
    k = (depth - 1) // n
    mistakes = {
        "You run the last layer of each segment again; its output is the next checkpoint": n * k,
        "You run every layer again; the last segment is kept, and so are the checkpoints": depth,
        "There is one segment too many: the last one is not run again": (n - 1) * (k + 1),
    }
    with labs.told("extra_forwards"):
        got = extra_forwards(depth, n)
    name = f"extra_forwards({depth}, {n})"
    labs.check_number(got, schedule.extra_forwards, name, mistakes=mistakes)
    mistakes = {
        "You count the checkpoint behind the restored segment twice": k + n,
        "At the end of the forward pass there is more: the last segment is complete": k + n - 1,
        "When a segment is restored there is more": k + (depth - k * n),
        "You count the checkpoints only": k,
        "You count one segment only": n,
    }
    if k == 0:
        mistakes = {"There is no checkpoint, and so no segment is restored": n - 1}
    with labs.told("most_held"):
        got = most_held(depth, n)
    labs.check_number(got, count_held(schedule), f"most_held({depth}, {n})", mistakes=mistakes)


for depth, n in [(20, 5), (6, 3), (50, 7), (51, 7), (50, 8), (50, 1), (9, 3), (5, 10)]:
    check_formulae(depth, n)
### BEGIN HIDDEN TESTS
for depth in range(1, 30):
    for n in range(1, 32):
        check_formulae(depth, n)
### END HIDDEN TESTS
print("formulae: right")

# %% [markdown]
# Now draw them for 51 layers. Few checkpoints mean long segments, many checkpoints mean many checkpoints:
# about $L/n + n$ activations are held. That is least where both are equal, at $n = \sqrt L$, and then
# it is $2\sqrt L$ instead of $L$. The price is less than one more forward pass, whatever $n$.

# %% nbgrader={"grade_id": "draw_formulae", "locked": true}
depth = 51
intervals = list(range(1, depth + 1))
held = [most_held(depth, n) for n in intervals]
again = [extra_forwards(depth, n) for n in intervals]
best = min(intervals, key=lambda n: (most_held(depth, n), extra_forwards(depth, n)))
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
ax.plot(intervals, held, ".-", label="activations held at most")
ax.plot(intervals, again, ".-", label="layers run again")
ax.axvline(depth**0.5, color="grey", linestyle=":", label=r"$n = \sqrt{L}$")
ax.set(title=f"{depth} layers", xlabel="a checkpoint every n layers", ylabel="number", ylim=0)
ax.legend()
plt.show()
print(f"The least memory is at n = {best}: {held[best - 1]} activations instead of {depth}, ")
print(
    f"for {again[best - 1]} layers run again: a forward pass and {again[best - 1] / depth:.0%} of another."
)

# %% [markdown]
# And here is one training step of the deep network as `npnet` runs it, action by action, with the bytes
# that are alive. Move the slider from plain (n = 1) to no checkpoint at all, and watch three things: the
# hill of the forward pass becomes a slope with one step a checkpoint; then come teeth, one for each
# segment restored; and when the teeth are too large, nothing is saved any more.

# %% nbgrader={"grade_id": "slide", "locked": true}
deep = npnet.Network([784] + [30] * 50 + [10])


def timeline(n):
    figure = plt.Figure(figsize=(8, 3.8), layout="constrained")
    return plots.plot_timeline(npnet.plan(deep, 1000, every_nth=n), ax=figure.add_subplot())


labs.slider(timeline, [1, 2, 4, 7, 10, 17, 25, 40, 51], "n", value=7)

# %% [markdown]
# ### Question 2 (2 points)
#
# Look at the table and the bars for 50 hidden layers.
#
# * Why does the shallow network not profit at all?
# * From $n = 4$ to $n = 10$ the measured memory stays the same, although your formula says 15, 13 and 14
#   activations. What is alive at the moment of the peak? (How many bytes are the gradients of all layers?)
# * Why does $n = 25$ cost hardly more time than $n = 10$?

# %% [markdown] nbgrader={"grade_id": "question_costs", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# The shallow network has one hidden layer: there is nothing between checkpoints to forget, and its memory
# is parameters' gradients anyway. In the deep one, the gradients of all layers take
# $8\,(784\cdot30 + 49\cdot30\cdot30 + 30\cdot10 + 50\cdot30 + 10) \approx 555$ kB, and all of them are alive
# at the end of the backward pass: with few activations left, the peak has moved there, and fewer activations
# elsewhere do not lower it. (Updating each layer as soon as its gradient is known would: npnet does.) The time
# is governed by the layers run again, $(n-1)\lfloor (L-1)/n\rfloor$: 45 for $n = 10$, 48 for $n = 25$,
# never more than one forward pass.
# ### END SOLUTION

# %% [markdown]
# ### Question 3 (2 points)
#
# Why are the gradients equal bit for bit, and not only up to rounding? Name two things that a network
# could contain, or a machine could do, after which they would not be.

# %% [markdown] nbgrader={"grade_id": "question_bits", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# A recomputation runs the same function on the same numbers in the same order, so it gives the same bits,
# and everything that follows is the same arithmetic on the same numbers. It would not be with random
# numbers drawn anew (dropout: lab 3), with a layer that has a state which the first run changes (batch
# normalization's running averages), with operations whose order of summation varies from run to run
# (atomic additions on a GPU, or another number of threads), or when the recomputation runs in another
# precision.
# ### END SOLUTION

# %% [markdown]
# ## What you have learnt
#
# * Plain backpropagation keeps all activations: memory proportional to batch times the sum of layer sizes.
# * The derivative of the sigmoid follows from its output, so $z$ need not be kept.
# * With a checkpoint every $n$ layers, about $L/n + n$ activations are held; $n = \sqrt L$ is best.
# * The time is that of less than one more forward pass: about a third more, if backward costs twice as
#   much as forward.
# * The gradients are the same, bit for bit. So are the accuracies.
# * An array lives as long as something refers to it; memory is saved only when the last reference goes.
#
# `npnet.NetworkWithCheckpointing` is the class you have written, made fast. Layers of different sizes, and
# a budget in bytes instead of $n$: lab 8.
#
# ## To read
#
# * M. Nielsen, *Neural Networks and Deep Learning*, Determination Press, 2015, chapter 2: the four
#   equations of backpropagation.
# * A. Griewank, "Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
#   differentiation", *Optimization Methods and Software* 1(1), 1992.
# * A. Griewank and A. Walther, "Algorithm 799: revolve: an implementation of checkpointing for the reverse
#   or adjoint mode of computational differentiation", *ACM Transactions on Mathematical Software* 26(1), 2000.
# * T. Chen, B. Xu, C. Zhang and C. Guestrin, "Training deep nets with sublinear memory cost", 2016,
#   arXiv:1604.06174: every $\sqrt L$ layers, for deep learning.
