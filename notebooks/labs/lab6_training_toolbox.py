# %% [markdown]
# # Lab 6: A training toolbox
#
# Before a network learns anything, three decisions have been made: **where** its numbers live (CPU or
# GPU), **which** numbers it starts from (initialization), and **how many bits** each of them has
# (precision). Made well, nobody notices them. Made badly, they cost a factor of ten in time, or the
# network never learns, and no error says so.
#
# You will write each tool yourself, and try them on the records of 768 patients, of whom 268 were found to
# have diabetes within five years.
#
# | part | you write | points |
# | --- | --- | --- |
# | 1 Tensors | `make_tensors` | 3 |
# | 2 Time on a CPU and on a GPU | `seconds_of` | 3 |
# | 3 The first weights | `xavier_uniform`, `kaiming_normal`; a question | 4 + 2 |
# | 4 Sixteen bits | `lost_in_half`, `LossScaler`, `mixed_step`; a question | 2 + 3 + 5 + 2 |
# | 5 The whole toolbox | nothing: you watch; a question | 2 |
#
# It takes about an hour. Write where it says `YOUR CODE HERE` or `YOUR ANSWER HERE`. Below each task is
# a cell of tests: run it, and it says what is wrong. (There are more tests when the lab is graded.) You
# need no GPU: where there is none, the cells say what they skip.

# %% nbgrader={"grade_id": "setup", "locked": true}
import time
from functools import partial
from itertools import pairwise
from statistics import median
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

import npnet
from npnet import labs, measure_peak, plots, schedules
from npnet.backend import Backend
from npnet.initializers import calculate_gain, normal
from npnet.memory import format_bytes

plt.rcParams["figure.dpi"] = 80
features = ["pregnancies", "glucose", "blood pressure", "skin fold", "insulin", "body mass index"]
features += ["pedigree", "age"]
x, y = npnet.load_diabetes()
table = np.hstack([x, y])  # as it stands in the file: eight features, and whether it is diabetes
print(f"table: {table.shape}, {table.dtype}, {format_bytes(table.nbytes)}")
print(f"{'feature':<16}{'mean':>8}{'std':>8}   zeros")
for name, column in zip(features, table.T, strict=False):
    print(f"{name:<16}{column.mean():>8.1f}{column.std():>8.1f}{(column == 0).sum():>8}")

# %% [markdown]
# Nobody alive has a blood pressure of 0. In the columns 1 to 5 (glucose to body mass index; we count from
# 0) a zero stands for *not measured*. We put the median of the measured values there, and give every
# feature mean 0 and standard deviation 1. Medians, means and deviations come from the training rows
# alone: what is learnt from test rows, be it only a mean, is learnt from the future.

# %% nbgrader={"grade_id": "prepare", "locked": true}
rows = np.random.default_rng(0).permutation(len(table))
train, test = rows[:614], rows[614:]  # 80 %, 20 %
for column in range(1, 6):
    known = table[train, column][table[train, column] > 0]
    table[table[:, column] == 0, column] = np.median(known)
table[:, :8] -= table[train, :8].mean(axis=0)
table[:, :8] /= table[train, :8].std(axis=0)
print(f"train: {len(train)} rows, {table[train, 8].mean():.1%} diabetes")
print(f"test:  {len(test)} rows, {table[test, 8].mean():.1%} diabetes")
print(f"Who always says 'no' is right for {1 - table[test, 8].mean():.1%} of the test rows.")

# %% [markdown]
# ## 1 Tensors
#
# A *tensor* is an array with four properties that somebody has to decide: its **shape**, its **dtype**
# (the kind of number), its **device** (whose memory it is in), and whether it **owns** its memory or is a
# *view* of another's. Three of the four can be wrong without an error. Look at the first two:

# %% nbgrader={"grade_id": "broadcast", "locked": true}
flat, column = table[:, 8], table[:, 8:]
outputs = np.zeros((len(table), 1))  # what a network with one output gives
print(f"targets {flat.shape}:   outputs - targets has the shape {(outputs - flat).shape}")
print(f"targets {column.shape}: outputs - targets has the shape {(outputs - column).shape}")
wrong, right = (format_bytes((outputs - targets).nbytes) for targets in (flat, column))
print(f"{wrong} instead of {right}, and a mean over it is a number like any other.")
for dtype in (np.float64, np.float32):
    print(
        f"{np.dtype(dtype)}: {np.dtype(dtype).itemsize} bytes a number, eps {np.finfo(dtype).eps:.1e}"
    )
print(
    f"np.ones(3) is {np.ones(3).dtype}; with np.float32 weights: {(np.ones(3) * np.float32(1)).dtype}"
)

# %% [markdown]
# NumPy makes float64, frameworks for deep learning make float32, and one float64 array in a formula turns
# all that follows into float64: twice the memory, half the speed, on many GPUs a small fraction of it.
#
# ### Task 1: make the tensors (3 points)
#
# Write `make_tensors(table, backend)`: from a table, one row a patient, the last column the target, to
#
# * `x` of the shape (patients, features), and `y` of the shape **(patients, 1)**;
# * both **float32**, whatever the table is;
# * both with **memory of their own**: the table may change afterwards;
# * both on the device that `backend` names, `"numpy"` (the CPU) or `"cupy"` (a GPU).
#
# `npnet.to_backend(array, backend)` moves an array to a device. On the CPU it has nothing to do, and
# returns what it was given. The way to a GPU is a bus, the slowest part of the machine: let no byte travel
# that is thrown away on arrival.
#
# (The test has a GPU, even if your machine does not: a pretended one, that counts the bytes that arrive.)


# %% nbgrader={"grade_id": "make_tensors", "solution": true}
def make_tensors(table, backend="numpy"):
    """x (patients, features) and y (patients, 1): float32, with their own memory, on the device."""
    ### BEGIN SOLUTION
    single = table.astype(np.float32)  # a copy, made where the table is
    x = np.ascontiguousarray(single[:, :-1])
    y = np.ascontiguousarray(single[:, -1:])
    return npnet.to_backend(x, backend), npnet.to_backend(y, backend)
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_make_tensors", "grade": true, "points": 3}
class PretendedArray(np.ndarray):
    """An array on the pretended GPU."""


arrived = []  # bytes of each array that was moved there


def pretend_asarray(host):
    arrived.append(host.nbytes)
    return np.array(host).view(PretendedArray)


pretended = Backend("pretended", SimpleNamespace(asarray=pretend_asarray), PretendedArray, np.array)
npnet.register_backend("pretended", lambda: pretended)


def check_tensors(patients, columns, dtype, backend):
    values = np.random.default_rng(columns).integers(-9, 9, (patients, columns + 1)).astype(dtype)
    arrived.clear()
    with labs.unchanged(table=values), labs.told("make_tensors"):
        answer = make_tensors(values, backend)
    assert isinstance(answer, tuple), "make_tensors: return x and y, with a comma between"
    assert len(answer) == 2, f"make_tensors: return x and y, not {len(answer)} things"
    kind = PretendedArray if backend == "pretended" else np.ndarray
    for got, name, right in zip(answer, "xy", np.hsplit(values, [columns]), strict=True):
        labs.check_array(
            got, right.astype("f4"), f"{name}, from a table of {values.dtype}", exact=True
        )
        where = f"{name} is not on the device: backend is {backend!r}"
        assert type(got) is kind, where
        assert not np.shares_memory(got, values), (
            f"{name} is a view of the table: whoever changes the table changes {name}. Make a copy"
        )
    enough = 4 * values.size  # bytes
    words = f"{sum(arrived)} bytes travel to the device, {enough} suffice"
    if backend == "pretended":
        assert sum(arrived) <= enough, (
            f"{words}: make them float32 before they travel, and send each once"
        )


check_tensors(6, 8, np.float64, "numpy")
check_tensors(6, 8, np.float32, "numpy")
check_tensors(5, 3, np.float64, "pretended")
### BEGIN HIDDEN TESTS
check_tensors(768, 8, np.float64, "numpy")
check_tensors(2, 1, np.int64, "numpy")
check_tensors(9, 2, np.float32, "pretended")
### END HIDDEN TESTS
print("make_tensors: right")

# %% nbgrader={"grade_id": "all_devices", "locked": true}
for backend in ("numpy", "cupy"):
    if backend not in npnet.available_backends():
        print(f"{backend}: skipped, there is none here")
        continue
    for name, array in zip("xy", make_tensors(table, backend), strict=True):
        kind = f"{type(array).__module__}.{type(array).__name__}"
        print(f"{backend}: {name} {array.shape!s:>9} {array.dtype} {array.nbytes:>6} bytes, {kind}")
x, y = make_tensors(table)
x_train, y_train, x_test, y_test = x[train], y[train], x[test], y[test]

# %% [markdown]
# ## 2 Time on a CPU and on a GPU
#
# A GPU works *asynchronously*: a call only puts the work into a queue (a *launch*, a few microseconds),
# and returns. Who stops the clock then has measured the launch, and finds a GPU a thousand times faster
# than it is. And the first call of anything is slow: code is loaded, memory is fetched.
#
# ### Task 2: measure time (3 points)
#
# Write `seconds_of(work, wait, repeats, clock)`. `work()` starts the work, `wait()` returns when the
# device has finished all it was given, `clock()` says what time it is, in seconds. (Take no other clock: the
# test's device has a time of its own, in which every launch takes 1 second.)
#
# 1. Run the work once to warm up. That time does not count, nor does what the device had in its queue
#    before you came.
# 2. Then measure it `repeats` times, each from the start until it has *finished*.
# 3. Return the median of these times. (`median` is imported.) Why not the mean: one interruption by
#    another program spoils a mean, and leaves a median as it is.


# %% nbgrader={"grade_id": "seconds_of", "solution": true}
def seconds_of(work, wait=lambda: None, repeats=5, clock=time.perf_counter):
    """Seconds that the work takes: the median of some runs, after one to warm up."""
    ### BEGIN SOLUTION
    work()
    wait()  # what was in the queue before is done, too
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        wait()
        times.append(clock() - start)
    return median(times)
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_seconds_of", "grade": true, "points": 3}
class PretendedDevice:
    """A device with a queue and a clock of its own: a launch takes 1 second, a piece of work so many as listed."""

    def __init__(self, durations, queued=0):
        self.durations, self.queued, self.now, self.launches = list(durations), queued, 100, 0
        self.readings = 0

    def clock(self):
        self.readings += 1
        return self.now

    def work(self):
        assert self.launches < len(self.durations), (
            f"work() is called more than {len(self.durations)} times: once to warm up, and `repeats` times"
        )
        self.queued += self.durations[self.launches]
        self.launches += 1
        self.now += 1

    def wait(self):
        self.now += self.queued
        self.queued = 0


def check_seconds(durations, right, queued=0, **wrong):
    device = PretendedDevice(durations, queued)
    repeats = len(durations) - 1
    with labs.told("seconds_of"):
        got = seconds_of(device.work, device.wait, repeats, device.clock)
    said = {
        "mean": "This is the mean: the median is asked, which one slow run does not change",
        "best": "This is the fastest run: the median is asked",
        "total": "This is the time of all runs together",
        "cold": "The first run counts: it is there to warm up",
        "early": "The clock starts while the device is still busy with what it was given before: wait first",
        "launch": "This is the time of the launch: wait before you stop the clock",
    }
    mistakes = {said[name]: seconds for name, seconds in ({"launch": 1} | wrong).items()}
    if device.readings % 2:
        mistakes["A time is the difference of two readings of clock(), and of no other clock"] = got
    call = f"seconds_of, {repeats} runs of {durations[1:]} seconds, and 1 for each launch"
    labs.check_number(got, right, call, mistakes=mistakes)
    assert device.launches == len(durations), (
        f"seconds_of: work() is called {device.launches} times, expected {repeats + 1}: once to warm up, then `repeats` times"
    )


check_seconds([50, 6, 3, 1], 4, mean=13 / 3, best=2, total=13, cold=7)
check_seconds([50, 3, 2, 9], 4, mean=17 / 3, best=3, total=17, early=10)
### BEGIN HIDDEN TESTS
check_seconds([9, 1, 5, 7], 6, queued=1000, early=8)
check_seconds([9, 5, 5], 6, queued=7)
### END HIDDEN TESTS
print("seconds_of: right")

# %% [markdown]
# Now measure: the product of two square matrices of random float32 numbers, of many sizes, in
# GFLOP/s (a product of two $n \times n$ matrices is $2n^3$ operations). Where there is a GPU, it is measured, too, and
# so is the way there and back. (Read the shape of the curves; the heights are your machine's.)

# %% nbgrader={"grade_id": "measure_devices", "locked": true}
sizes = [4, 16, 64] if labs.grading() else [4, 8, 16, 32, 64, 128, 256, 512, 1024]
generator = np.random.default_rng(0)
speeds, milliseconds = {"CPU": []}, []
for n in sizes:
    a, b = (generator.random((n, n), np.float32) for _ in range(2))
    times = 1000 if n <= 64 else 1  # many at once, where one is too short for the clock

    def multiply(a=a, b=b, times=times):
        for _ in range(times):
            a @ b

    seconds = seconds_of(multiply) / times
    milliseconds.append(1e3 * seconds)
    speeds["CPU"].append(2 * n**3 / seconds / 1e9)

if "cupy" in npnet.available_backends():
    xp = npnet.get_backend("cupy").xp
    wait = xp.cuda.Stream.null.synchronize
    speeds |= {"GPU": [], "GPU, with the way there and back": []}
    for n in sizes:
        a, b = (generator.random((n, n), np.float32) for _ in range(2))
        c, d = xp.asarray(a), xp.asarray(b)
        there = seconds_of(partial(xp.matmul, c, d), wait)
        with_transfer = seconds_of(lambda a=a, b=b: xp.asnumpy(xp.asarray(a) @ xp.asarray(b)), wait)
        speeds["GPU"].append(2 * n**3 / there / 1e9)
        speeds["GPU, with the way there and back"].append(2 * n**3 / with_transfer / 1e9)
else:
    print("GPU: skipped, there is none here")
for n, ms, speed in zip(sizes, milliseconds, speeds["CPU"], strict=True):
    print(f"CPU, {n:>4} x {n:<4} {ms:>10.4f} ms {speed:>8.2f} GFLOP/s")

figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, values in speeds.items():
    ax.loglog(sizes, values, "o-", label=name)
ax.set(title="product of two n x n matrices, float32", xlabel="n", ylabel="GFLOP/s")
ax.set_xticks(sizes, map(str, sizes))
ax.minorticks_off()
ax.axvline(32, color="grey", linestyle=":", label="our widest layer")
ax.legend()
plt.show()

# %% [markdown]
# On the left the time is that of a *call*, and the arithmetic is free: a matrix of 4 or of 16 costs the
# same. On the right it is arithmetic. A GPU has the same curve, further to the right and higher: more
# microseconds a call, a hundred times the arithmetic. Our network with 32 units is far on the left: a GPU
# would *lose* there. With 5000 x 5000, as is often shown, it wins by a factor of ten to a hundred. Both are true.
#
# `npnet device` on the command line makes this comparison for one size.
#
# ## 3 The first weights
#
# Here is our network, as it is often set up for these data, each layer with weights of its own kind:
#
# | layer | shape of $W$ | initialization |
# | --- | --- | --- |
# | 1 | (32, 8) | Xavier, uniform, with the gain of ReLU, $\sqrt 2$ |
# | 2 | (16, 32) | Kaiming, normal |
# | 3 | (1, 16) | normal, standard deviation 0.02 |
#
# Where do such rules come from? A unit sums `fan_in` products. If weights and inputs are independent with mean 0, then
#
# $$\operatorname{Var}(z) = \text{fan\_in} \cdot \operatorname{Var}(w) \cdot \operatorname{E}(a^2).$$
#
# For the signal to be as large behind the layer as before it, $\operatorname{Var}(w) = 1/\text{fan\_in}$. ReLU sets one half of
# its inputs to 0, and so halves $\operatorname{E}(z^2)$; hence the factor 2 in **Kaiming's** rule,
#
# $$w \sim N(0, \sigma^2), \qquad \sigma^2 = \frac{2}{\text{fan\_in}}.$$
#
# Backwards the same is true of gradients with `fan_out` in its place. **Xavier's** rule is a compromise of both, with a
# *gain* for the nonlinearity ($\sqrt 2$ for ReLU); in its uniform form
#
# $$w \sim U(-r, r), \qquad \operatorname{Var}(w) = \text{gain}^2 \cdot \frac{2}{\text{fan\_in} + \text{fan\_out}}.$$
#
# The variance of $U(-r, r)$ is $r^2/3$. The shape of a weight is (outputs, inputs).
#
# ### Task 3: two initializers (4 points)
#
# Write `xavier_uniform(shape, generator, gain)` and `kaiming_normal(shape, generator)`. Draw from the
# generator you are given, all numbers with one call of `generator.uniform(low, high, shape)`, or of
# `generator.standard_normal(shape)`: then your numbers are those of the test, one by one.


# %% nbgrader={"grade_id": "initializers", "solution": true}
def xavier_uniform(shape, generator, gain=1.0):
    """Weights of the shape (outputs, inputs), uniform in (-r, r)."""
    ### BEGIN SOLUTION
    fan_out, fan_in = shape
    r = gain * np.sqrt(6 / (fan_in + fan_out))
    return generator.uniform(-r, r, shape)
    ### END SOLUTION


def kaiming_normal(shape, generator):
    """Weights of the shape (outputs, inputs), normal, for a layer with ReLU."""
    ### BEGIN SOLUTION
    sigma = np.sqrt(2 / shape[1])
    return sigma * generator.standard_normal(shape)
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_initializers", "grade": true, "points": 4}
def check_initializer(own, name, official, shape, wrong, **options):
    with labs.told(name):
        got = own(shape, np.random.default_rng(1), **options)
    right = official(shape, np.random.default_rng(1), **options)
    call = f"{name}({shape}{''.join(f', {key}={value:.3g}' for key, value in options.items())})"
    if np.shape(got) == shape:
        unit = right / np.abs(right).max()
        ratio = float(np.vdot(unit, got) / np.vdot(unit, unit))
        assert np.allclose(got, ratio * unit), (
            f"{call}: these are not the generator's numbers: draw all with one call, and only from it"
        )
    labs.check_array(got, right, call, mistakes={words: each() for words, each in wrong.items()})


def check_xavier(shape, gain):
    def draw(shape=shape, **options):
        return npnet.initializers.xavier_uniform(shape, np.random.default_rng(1), **options)

    right, kaiming = draw(gain=gain), npnet.initializers.kaiming_uniform
    reach = right[0, 0] / np.random.default_rng(1).uniform(-1, 1, shape)[0, 0]
    wrong = {
        "the variance of U(-r, r) is r ** 2 / 3, not r ** 2": lambda: right / 3**0.5,
        "r is a length, and you give its square: take the root": lambda: right * reach,
        "this is Kaiming's rule, which takes fan_in alone": (
            lambda: kaiming(shape, np.random.default_rng(1))
        ),
    }
    if gain != 1:
        wrong["the gain is missing"] = lambda: draw()
        wrong["the gain is there twice: it belongs before the root, or squared within"] = lambda: (
            draw(gain=gain**2)
        )
        wrong["the gain is under the root, but not squared"] = lambda: draw(gain=gain**0.5)
    check_initializer(
        xavier_uniform, "xavier_uniform", npnet.initializers.xavier_uniform, shape, wrong, gain=gain
    )


def check_kaiming(shape):
    def draw(**options):
        return npnet.initializers.kaiming_normal(shape, np.random.default_rng(1), **options)

    wrong = {
        "you take fan_out, shape[0]; a unit sums fan_in products": lambda: draw(mode="fan_out"),
        "the factor 2 for ReLU is missing": lambda: draw(nonlinearity="linear"),
        "you multiply by the variance; the standard deviation is its root": (
            lambda: draw() * (draw() / np.random.default_rng(1).standard_normal(shape))
        ),
        "this is Xavier's rule, with both fans": (
            lambda: npnet.initializers.xavier_normal(shape, np.random.default_rng(1))
        ),
    }
    official = npnet.initializers.kaiming_normal
    check_initializer(kaiming_normal, "kaiming_normal", official, shape, wrong)


check_xavier((32, 8), calculate_gain("relu"))
check_xavier((16, 16), 1.0)
check_kaiming((16, 32))
check_kaiming((5, 5))
### BEGIN HIDDEN TESTS
check_xavier((3, 50), calculate_gain("tanh"))
check_kaiming((50, 3))
check_kaiming((1, 16))
### END HIDDEN TESTS
print("xavier_uniform, kaiming_normal: right")

# %% [markdown]
# Our three layers, with your initializers. Are the standard deviations those of the formulae? (They are
# estimated from 256, 512 and 16 numbers: expect a few per cent, and more in the last line.)

# %% nbgrader={"grade_id": "three_layers", "locked": true}
generator = np.random.default_rng(42)
relu_xavier = partial(xavier_uniform, gain=calculate_gain("relu"))
small_normal = partial(normal, std=0.02)
expected = {"Xavier, uniform": (2 * 2 / (8 + 32)) ** 0.5, "Kaiming, normal": (2 / 32) ** 0.5}
expected["normal, 0.02"] = 0.02
layers = [
    npnet.Dense(8, 32, "relu", initializer=relu_xavier, rng=generator),
    npnet.Dense(32, 16, "relu", initializer=kaiming_normal, rng=generator),
    npnet.Linear(16, 1, initializer=small_normal, rng=generator),
]
print("layer  initialization    shape of W     mean     std   std expected")
for number, (layer, (name, std)) in enumerate(zip(layers, expected.items(), strict=True), 1):
    w = layer.weight.value
    print(f"{number:>5}  {name:<17}{w.shape!s:>11}{w.mean():>9.4f}{w.std():>8.4f}{std:>12.4f}")

# %% [markdown]
# In three layers nearly any rule does. Depth is where it matters: 20 layers of 64 units with ReLU, our
# patients at one end, and a gradient of ordinary size at the other.

# %% nbgrader={"grade_id": "depth", "locked": true}
rules = {
    "normal, 1": partial(normal, std=1.0),
    "Kaiming, normal": kaiming_normal,
    "Xavier, uniform, gain 1": xavier_uniform,
    "normal, 0.02": small_normal,
}
numbers = range(1, 21)


def through_20_layers(rule):
    """Standard deviations: of a_1 ... a_20, and of the gradients at a_20 ... a_1."""
    model = npnet.mlp([8] + [64] * 20, "relu", "relu", initializer=rule, rng=3)
    a, saved, forwards, backwards = x_train, [], [], []
    for layer in model.layers:
        a, kept = layer.forward(a)
        saved.append(kept)
        forwards.append(a.std())
    gradient = np.random.default_rng(4).standard_normal(a.shape, np.float32)
    for layer, kept in zip(reversed(model.layers), reversed(saved), strict=True):
        backwards.append(gradient.std())
        gradient = layer.backward(gradient, kept)
    return forwards, backwards


figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True)
for name, rule in rules.items():
    forwards, backwards = through_20_layers(rule)
    axes[0].semilogy(numbers, forwards, ".-", label=name)
    axes[1].semilogy(numbers, backwards[::-1], ".-", label=name)
    print(f"{name:<24} std of a_1: {forwards[0]:.1e}, of a_20: {forwards[-1]:.1e}; ", end="")
    print(f"of the gradient at a_1: {backwards[-1]:.1e}")
axes[0].set(title="activations, on the way forward", ylabel="standard deviation")
axes[1].set(title="gradients, on the way back")
for ax in axes:
    ax.axhspan(1e-22, 6e-8, color="grey", alpha=0.15)
    ax.set(xlabel="layer", xticks=[1, 5, 10, 15, 20], ylim=(1e-22, 1e18))
    ax.text(1, 1e-21, "0 in float16", color="dimgrey")
axes[0].legend(loc="upper left", fontsize=8)
plt.show()

# %% [markdown]
# Look for the right standard deviation yourself: move the slider. How narrow is the region in which 20 layers can be trained? And what does
# Kaiming's rule say for 64 units?

# %% nbgrader={"grade_id": "slide_std", "locked": true}


def signal(std):
    figure = plt.Figure(figsize=(7, 3.4), layout="constrained")
    ax = figure.add_subplot()
    forwards, backwards = through_20_layers(partial(normal, std=std))
    ax.semilogy(numbers, forwards, ".-", label="activations")
    ax.semilogy(numbers, backwards[::-1], ".-", label="gradients")
    ax.axhspan(1e-9, 6e-8, color="grey", alpha=0.15, label="0 in float16")
    ax.axhspan(6.5e4, 1e9, color="tab:red", alpha=0.15, label="infinite in float16")
    ax.set(title=f"normal, standard deviation {std}", xlabel="layer", ylabel="standard deviation")
    ax.set(xticks=[1, 5, 10, 15, 20], ylim=(1e-9, 1e9))
    ax.legend(fontsize=8, ncols=2, loc="upper left")
    return ax


labs.slider(
    signal, [0.02, 0.05, 0.1, 0.125, 0.15, 0.177, 0.2, 0.25, 0.35, 0.5, 1.0], "std", value=0.1
)

# %% [markdown]
# ### Question 1 (2 points)
#
# * By which factor does the standard deviation of the activations change from layer to layer with N(0, 0.02²) and 64 units? Derive it
#   from the formula above, and compare with the picture (20 layers).
# * Why does Xavier's rule without a gain fall by another factor here, and by which?
# * What would happen to the network if all its weights began at 0? And if only those of the last layer did?

# %% [markdown] nbgrader={"grade_id": "question_depth", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# E(z²) = fan_in Var(w) E(a²), and ReLU keeps half of it: a factor $0.02\sqrt{64/2} = 0.113$ a layer, and
# $0.113^{19} \approx 10^{-18}$ from $a_1$ to $a_{20}$, which is what the picture shows. Xavier with gain 1 and
# equal fans has Var(w) = 1/64, so that ReLU's half is not made up for: $1/\sqrt2$ a layer, $0.0014$ over 19.
# With all weights 0, all hidden activations are 0, and so are all gradients but that of the last bias: nothing but the bias
# is ever learnt. (With equal weights other than 0 all units of a layer learn the same.) With 0 in the last layer only, the
# first step changes that layer alone, whose inputs are not 0; from the second step on gradients flow
# through it to the others. That is a good start, and often used.
# ### END SOLUTION

# %% [markdown]
# ## 4 Sixteen bits
#
# Half the bits take half the memory, half the time on the bus, and on a GPU with *tensor cores* a small
# part of the time of a product. Here is what they can say, and what they cannot:

# %% nbgrader={"grade_id": "sixteen_bits", "locked": true}
print("dtype     bytes   largest   smallest (normal)   smallest (at all)   eps")
for dtype in (np.float64, np.float32, np.float16):
    info, name = np.finfo(dtype), np.dtype(dtype).name
    print(
        f"{name:<10}{np.dtype(dtype).itemsize:>5}{info.max:>10.1e}{info.smallest_normal:>20.1e}"
        f"{info.smallest_subnormal:>20.1e}{info.eps:>6.0e}"
    )
half = np.float16
with np.errstate(over="ignore"):
    print(f"too large:      half(70000) = {half(70000)}")
print(f"too small:      half(2e-8)  = {half(2e-8)}")
print(f"few digits:     half(2048) + half(1) = {half(2048) + half(1)}")
print(f"lost update:    half(0.5) - half(1e-4) = {half(0.5) - half(1e-4)}")

# %% [markdown]
# The last line is why *weights* are not kept in half precision: a small update of a large weight is
# rounded away, again and again. The second line endangers *gradients*, which are small numbers.
#
# Three rules make training in half precision work (Micikevicius et al., 2018):
#
# 1. The weights stay in float32, as *master weights*. Each step computes with float16 copies of them.
# 2. The loss is multiplied by a large factor, the *scale*, before the backward pass. By the chain rule all gradients
#    are multiplied by it, and leave the region where float16 has nothing but 0. They are divided by it
#    again in float32, before the update.
# 3. A sum of many products is accumulated in float32.
#
# ### Task 4: what is lost (2 points)
#
# Write `lost_in_half(gradients, scale)`, for a list of float32 arrays: multiply by the scale, make the
# products float16, and look at what became of them. Return two *numbers of numbers*, over all arrays together: how
# many were not 0 and have become 0, and how many were finite and have become infinite. (NumPy may warn of an overflow: it
# is what we are looking for.)


# %% nbgrader={"grade_id": "lost_in_half", "solution": true}
def lost_in_half(gradients, scale=1.0):
    """How many numbers vanish, and how many overflow, if scale * gradients is stored in float16."""
    ### BEGIN SOLUTION
    vanished = overflowed = 0
    for gradient in gradients:
        stored = (gradient * np.float32(scale)).astype(np.float16)
        vanished += int(((stored == 0) & (gradient != 0)).sum())
        overflowed += int((np.isinf(stored) & np.isfinite(gradient)).sum())
    return vanished, overflowed
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_lost_in_half", "grade": true, "points": 2}
def check_lost(gradients, scale, right, words):
    call = f"lost_in_half({gradients}, {scale:g})"
    gradients = [np.array(each, np.float32) for each in gradients]
    with np.errstate(all="ignore"), labs.unchanged(gradients=gradients), labs.told(call):
        answer = lost_in_half(gradients, scale)
    pair = isinstance(answer, (tuple, list, np.ndarray)) and len(answer) == 2
    assert pair, f"{call}: return two numbers, vanished and overflowed"
    for got, expected, name, said in zip(
        answer, right, ("vanished", "overflowed"), words, strict=True
    ):
        labs.check_number(got, expected, f"{call}: {name}", mistakes=said)


was_zero = "A number that was 0 before has not vanished"
last = "This is the count of the last array alone"
divided = "Multiply by the scale; you divide"
unscaled = "This is the count without the scale"
check_lost([[1e-9, 0.0, 1.0], [2e-8, 1e3]], 1, (2, 0), [{was_zero: 3, last: 1}, {}])
check_lost(
    [[1e-12, 3e-9, 1e-5, 1.0], [2e-8, 100.0]],
    1024,
    (1, 1),
    [{unscaled: 3, divided: 4}, {unscaled: 0}],
)
check_lost(
    [[[1e5, -1e5], [1.0, 0.0]], [-7e4]],
    1,
    (0, 3),
    [{was_zero: 1}, {last: 1, "-inf is infinite, too": 1}],
)
### BEGIN HIDDEN TESTS
check_lost(
    [[np.inf, 1.0], [1e6]], 1, (0, 1), [{}, {"What was infinite before has not overflowed": 2}]
)
check_lost([[-1e-9], [0.0]], 2.0**16, (0, 0), [{}, {}])
### END HIDDEN TESTS
print("lost_in_half: right")

# %% [markdown]
# Now a real gradient: our network, its patients, one backward pass in float32. To see the danger with a
# small network, we give the loss a small weight, `WEIGHT` = 1e-5. In large models gradients are as small without that: the loss
# is a mean over thousands of samples and a sum over many tasks, and near the end nearly every sample is predicted well. Here is what float16
# makes of it, for every scale:

# %% nbgrader={"grade_id": "gradient_histogram", "locked": true}
WEIGHT = 1e-5
loss_function = npnet.BCEWithLogits()  # binary cross-entropy, of the output before the sigmoid


def first_weights():
    """W_1, b_1, W_2, b_2, W_3, b_3 in float32, always the same."""
    generator = np.random.default_rng(42)
    model = npnet.mlp([8, 32, 16, 1], "relu", initializer="kaiming_normal", rng=generator)
    return [parameter.value for parameter in model.parameters()]


def passes(weights, x, y, scale, dtype):
    """The loss, and scale * WEIGHT * gradient: all arrays are stored in dtype, all sums are float32.

    So do the tensor cores of a GPU: they multiply float16, and add in float32.
    """

    def product(a, b):
        return (a.astype(np.float32) @ b.astype(np.float32)).astype(dtype)

    activations, depth = [x.astype(dtype)], len(weights) // 2
    for i in range(depth):
        z = product(activations[-1], weights[2 * i].T) + weights[2 * i + 1]
        activations.append(np.maximum(z, 0) if i < depth - 1 else z)
    loss, delta = loss_function.value_and_gradient(activations[-1].astype(np.float32), y)
    gradients = [None] * len(weights)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is expected here
        delta = (delta * np.float32(scale * WEIGHT)).astype(dtype)
        for i in reversed(range(depth)):
            if i < depth - 1:
                delta = delta * (activations[i + 1] > 0)
            gradients[2 * i] = product(delta.T, activations[i])
            gradients[2 * i + 1] = delta.astype(np.float32).sum(axis=0).astype(dtype)
            delta = product(delta, weights[2 * i])
    return float(loss), gradients


_, gradients = passes(first_weights(), x_train, y_train, 1.0, np.float32)
logits = npnet.mlp([8, 32, 16, 1], "relu", initializer="kaiming_normal", rng=42).predict(x_train)
_, first = loss_function.value_and_gradient(
    logits, y_train
)  # the delta that the way back begins with
first *= np.float32(WEIGHT)  # (614, 1)
numbers = np.concatenate([gradient.ravel() for gradient in gradients])
numbers = numbers[numbers != 0]
exponents = np.arange(-10, 50, 1 if not labs.grading() else 20)
with np.errstate(over="ignore"):
    lost = np.array([lost_in_half(gradients, 2.0 ** int(k)) for k in exponents]) / numbers.size
    lost_first = np.array([lost_in_half([first], 2.0 ** int(k))[0] for k in exponents]) / first.size
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
axes[0].hist(np.log2(np.abs(numbers)), bins=np.arange(-50, -8), color="tab:blue", zorder=3)
axes[0].axvspan(-60, -25, color="tab:red", alpha=0.12, label="0 in float16")
axes[0].axvspan(-25, -14, color="tab:orange", alpha=0.12, label="some bits lost (subnormal)")
axes[0].axvspan(-14, 0, color="tab:green", alpha=0.12, label="all bits")
axes[0].set(
    title="the gradient of our network", xlabel="log2 of the size of a number", xlim=(-50, 0)
)
axes[0].set(ylabel="how many numbers")
axes[0].set_ylim(0, 1.45 * axes[0].get_ylim()[1])
axes[0].legend(fontsize=8, loc="upper left")
axes[1].plot(exponents, 100 * lost[:, 0], label="gradient: vanish")
axes[1].plot(exponents, 100 * lost[:, 1], label="gradient: overflow")
axes[1].plot(exponents, 100 * lost_first, "C0:", label="first delta: vanish")
axes[1].set(title="lost in float16", xlabel="log2 of the scale", ylabel="% of the numbers")
axes[1].legend(fontsize=8)
plt.show()
fine = exponents[lost.sum(axis=1) == lost.sum(axis=1).min()]
print(f"{numbers.size} numbers other than 0; without scaling {lost_in_half(gradients)[0]} vanish")
print(f"of the {first.size} numbers of the first delta, {lost_in_half([first])[0]} vanish")
print(f"least of the gradient is lost with a scale of 2^{fine[0]} to 2^{fine[-1]}")

# %% [markdown]
# A gradient is a sum over all patients, and larger than what it is the sum of. The dotted curve shows the array with which the
# backward pass begins, $\partial C/\partial z_3$, one number a patient: without scaling *all* of it is 0, and
# so is everything that is computed from it. What counts is the smallest array on the way, not the gradient at the end.
#
# ### Task 5: a scale that finds itself (3 points)
#
# There is a wide range of good scales. But it moves during the training, and nobody wants to draw this
# picture for each network. So the scale is found by trial, *dynamically*:
#
# * A gradient that is not finite says: too large. Then the step is skipped, the scale is **halved**, and the
#   count of good steps starts anew.
# * After `growth_interval` good steps **in a row**, the scale is **doubled**: perhaps there is room. Then
#   the count starts anew, too.
#
# Write the method `update(finite)`, which is called once after each step.


# %% nbgrader={"grade_id": "loss_scaler", "solution": true}
class LossScaler:
    """The factor for the loss, which finds itself."""

    def __init__(self, scale=2.0**16, growth_interval=2000):
        self.scale, self.growth_interval = scale, growth_interval
        self.good_steps = 0  # in a row

    def update(self, finite):
        """Change self.scale after a step; finite: whether all its gradients were."""
        ### BEGIN SOLUTION
        if not finite:
            self.scale /= 2
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale *= 2
            self.good_steps = 0
        ### END SOLUTION


# %% nbgrader={"grade_id": "test_loss_scaler", "grade": true, "points": 3}
def official_scales(pattern, scale, interval):
    """What npnet.GradScaler does when gradients are finite where the pattern has a +."""
    scaler, optimizer, scales = (
        npnet.GradScaler(scale, growth_interval=interval),
        npnet.SGD(0.0),
        [],
    )
    for sign in pattern:
        parameter = npnet.Parameter(np.zeros(1, np.float32))
        parameter.gradient = np.array([1.0 if sign == "+" else np.inf], np.float32)
        scaler.step(optimizer, [parameter])
        scaler.update()
        scales.append(scaler.get_scale())
    return np.array(scales)


def check_scaler(pattern, interval, scale=16.0, mistakes=None):
    with labs.told("LossScaler"):
        scaler, scales = LossScaler(scale, growth_interval=interval), []
        for sign in pattern:
            scaler.update(sign == "+")
            scales.append(scaler.scale)
    wrong = {words: np.array(each, float) for words, each in (mistakes or {}).items()}
    name = f"the scale after each step, beginning with {scale:g}, growth_interval {interval}, steps {pattern} (- is overflow)"
    got = np.array(scales)
    right = official_scales(pattern, scale, interval)
    if not np.array_equal(got, right):
        words = next((words for words, each in wrong.items() if np.array_equal(got, each)), "")
        first = int(np.argmax(got != right))
        words = words or f"after step {first + 1} it is {got[first]:g}, expected {right[first]:g}"
        raise AssertionError(f"{name}: {words}")


grows_on = "after it was doubled, the count of good steps starts anew"
check_scaler(
    "+++++++",
    3,
    mistakes={
        grows_on: [16, 16, 32, 64, 128, 256, 512],
        "it is doubled once, and never again: does the count start anew?": [16, 16, 32, 32, 32, 32, 32],
        "it is doubled one step too late": [16, 16, 16, 32, 32, 32, 32],
        "it is halved where it should be doubled": [16, 16, 8, 8, 8, 4, 4],
        "it is doubled after every good step, not after growth_interval of them": [
            32, 64, 128, 256, 512, 1024, 2048,
        ],
    },
)  # fmt: skip
check_scaler(
    "++-++-+++",
    3,
    mistakes={
        "good steps must be in a row: an overflow starts the count anew": [
            16, 16, 8, 16, 16, 8, 8, 16, 16,
        ],
        "after an overflow it stays as it is": [16, 16, 16, 16, 16, 16, 16, 16, 32],
        "an overflow doubles it": [16, 16, 32, 32, 32, 64, 64, 64, 128],
    },
)  # fmt: skip
### BEGIN HIDDEN TESTS
check_scaler("--++++-+-++-+++++", 2)
check_scaler("-" * 5 + "+" * 20, 1)
check_scaler("++++-" * 4, 5, 1024.0)
### END HIDDEN TESTS
print("LossScaler: right")

# %% [markdown]
# ### Task 6: a step in mixed precision (5 points)
#
# Put it together. `mixed_step(master, backward, scaler, update)` gets
#
# * `master`: a list of float32 arrays;
# * `backward(weights, scale)`: runs both passes with the weights you give it, and returns the list of gradients of
#   scale times the loss, in the dtype of the weights;
# * `scaler`: it has `scaler.scale` and `scaler.update(finite)`, as yours;
# * `update(gradients)`: the optimizer. It changes the master weights by these gradients, which must be
#   float32, and those of the loss itself.
#
# Do what the rules say, in the right order, and **skip** the update if any number of any gradient is infinite or NaN. Tell the
# scaler in both cases. Return whether the update was done. Think about where you divide: in float16 what was saved is lost again.


# %% nbgrader={"grade_id": "mixed_step", "solution": true}
def mixed_step(master, backward, scaler, update):
    """One step in mixed precision; True if the weights were updated, False if the step was skipped."""
    ### BEGIN SOLUTION
    halves = [weight.astype(np.float16) for weight in master]
    gradients = backward(halves, scaler.scale)
    gradients = [gradient.astype(np.float32) / np.float32(scaler.scale) for gradient in gradients]
    finite = all(np.isfinite(gradient).all() for gradient in gradients)
    if finite:
        update(gradients)
    scaler.update(finite)
    return bool(finite)
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_mixed_step", "grade": true, "points": 5}
class NotingScaler:
    """Notes what it is told; its scale changes at once."""

    def __init__(self, scale):
        self.scale, self.told = scale, []

    def update(self, finite):
        self.told.append(bool(finite))
        self.scale *= 8


def check_mixed(scale, gradients, shapes=((3, 2), (3,))):
    """gradients: those of the loss, small multiples of 2**-26, so that float16 holds scale times them without rounding."""
    master = [np.linspace(-1.1, 1.3, int(np.prod(s))).astype("f4").reshape(s) for s in shapes]
    gradients = [
        np.asarray(each, np.float32).reshape(s) for each, s in zip(gradients, shapes, strict=True)
    ]
    scaler, asked, updates = NotingScaler(scale), [], []

    def backward(weights, factor):
        asked.append(([np.array(each) for each in weights], factor))
        return [(each * np.float32(factor)).astype(np.float16) for each in gradients]

    def update(given):
        updates.append([np.array(each) for each in given])

    with np.errstate(all="ignore"), labs.unchanged(master=master), labs.told("mixed_step"):
        done = mixed_step(master, backward, scaler, update)
    assert len(asked) == 1, f"mixed_step: call backward once, not {len(asked)} times"
    weights, factor = asked[0]
    right = [each.astype("f2") for each in master]
    for i, (got, half) in enumerate(zip(weights, right, strict=True)):
        assert got.dtype == np.float16, (
            f"backward gets weights of {got.dtype}: it works with float16 copies of the master weights"
        )
        labs.check_array(got, half, f"the copy of weight {i} that backward gets", exact=True)
    labs.check_number(factor, scale, "the scale that backward gets")
    finite = all(np.isfinite(each).all() for each in gradients)
    if not finite:
        assert not updates, (
            "the weights are updated although a gradient is not finite (infinite or NaN, in any array): skip this step"
        )
    else:
        assert updates, "update was not called, though all gradients are finite"
        assert len(updates) == 1, f"update was called {len(updates)} times in a step"
        with np.errstate(all="ignore"):
            early = [(each.astype("f2")) for each in gradients]
        for i, (got, each) in enumerate(zip(updates[0], gradients, strict=True)):
            mistakes = {
                "it still carries the scale: divide by it": each * np.float32(scale),
                "it is divided in float16, where small numbers become 0 again: make it float32 first": (
                    early[i].astype("f4")
                ),
                "it is divided twice": each / np.float32(scale),
                "it is divided by another scale than backward got: tell the scaler after you have divided": (
                    each / 8
                ),
            }
            labs.check_array(got, each, f"gradient {i} that update gets", mistakes=mistakes)
    assert scaler.told, "scaler.update was not called: tell the scaler in both cases"
    assert scaler.told == [finite], (
        f"scaler.update was called with {scaler.told}, expected [{finite}]"
    )
    words = f"mixed_step: return {finite} here, whether the update was done, not {done!r}"
    assert isinstance(done, (bool, np.bool_)), words
    assert done == finite, words


tiny = 2.0**-26  # half of the smallest number that float16 has
some = np.array([3, -1, 1, 7, -5, 1]) * tiny
check_mixed(2.0**16, [some, [tiny, -tiny, 5 * tiny]])
check_mixed(2.0**16, [[np.inf, 0, 0, 0, 0, 0], [tiny, tiny, tiny]])
### BEGIN HIDDEN TESTS
check_mixed(2.0**16, [some, [0, np.nan, 0]])
check_mixed(2.0**16, [some, [0, 0, -np.inf]])
check_mixed(2.0**10, [64 * some, [0, 0, 0]])
check_mixed(2.0**20, [np.arange(4) * tiny, np.arange(4) * tiny], ((2, 2), (4, 1)))
### END HIDDEN TESTS
print("mixed_step: right")

# %% [markdown]
# Four trainings with the same first weights, by plain gradient descent on all training patients, with
# your `mixed_step` and `LossScaler`: in float32; in half precision without scaling; with dynamic scaling, once from
# the usual $2^{16}$, and once from $2^{40}$, which is far too large. (The learning rate is $0.2 / $ `WEIGHT`, to make up for the
# weight of the loss.)

# %% nbgrader={"grade_id": "train_four", "locked": true}
steps = 12 if labs.grading() else 400


def accuracy(weights, x, y):
    a = x
    for i in range(0, len(weights), 2):
        z = a @ weights[i].T + weights[i + 1]
        a = np.maximum(z, 0) if i < len(weights) - 2 else z
    return float(((a > 0) == (y > 0.5)).mean())


def train_network(scaler, dtype):
    """Losses and scales, step by step; the test accuracy at the end; how many steps were skipped."""
    master, losses, scales, skipped = first_weights(), [], [], 0

    def update(gradients):
        for weight, gradient in zip(master, gradients, strict=True):
            weight -= np.float32(0.2 / WEIGHT) * gradient

    def backward(weights, scale):
        loss, gradients = passes(weights, x_train, y_train, scale, dtype)
        losses.append(loss)
        return gradients

    for _ in range(steps):
        scales.append(scaler.scale)
        if dtype == np.float32:
            update(backward(master, 1.0))
        else:
            skipped += not mixed_step(master, backward, scaler, update)
    return losses, scales, accuracy(master, x_test, y_test), skipped


class FixedScale:
    """No scaling."""

    scale = 1.0

    def update(self, finite):
        pass


runs = {
    "float32": train_network(FixedScale(), np.float32),
    "half, no scaling": train_network(FixedScale(), np.float16),
    "half, from 2^16": train_network(LossScaler(2.0**16, growth_interval=20), np.float16),
    "half, from 2^40": train_network(LossScaler(2.0**40, growth_interval=20), np.float16),
}
print("                    loss at first   at last   test accuracy   steps skipped")
for name, (losses, _, score, skipped) in runs.items():
    print(f"{name:<18}{losses[0]:>15.4f}{losses[-1]:>10.4f}{score:>14.1%}{skipped:>15}")
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for i, (name, (losses, scales, _, _)) in enumerate(runs.items()):
    axes[0].plot(losses, ["-", "-", "--", ":"][i], linewidth=[4, 2, 2, 2][i], alpha=0.8, label=name)
    if i > 1:
        axes[1].plot(np.log2(scales), color=f"C{i}", label=name)
axes[0].set(title="training loss", xlabel="step", ylabel="binary cross-entropy")
axes[1].set(title="the scale finds itself", xlabel="step", ylabel="log2 of the scale")
for ax in axes:
    ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# ### Question 2 (2 points)
#
# * Explain both curves on the right: why do they climb in stairs, and why are there needles on the upper one, but not on the lower?
#   Find in the picture of Task 4 where they have to stop.
# * Why is it harmless that some steps are skipped, and why must the gradient of *all* layers be dropped if one number of one layer
#   overflows?
# * bfloat16 has the exponents of float32 (8 bits of them) and 8 bits of precision. Which of the three rules does it still need?

# %% [markdown] nbgrader={"grade_id": "question_scale", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# After 20 good steps in a row it is doubled, until some number overflows: the largest gradient, or a delta on
# the way to it, exceeds 65504. Then it is halved, the step is lost, and 20 steps later it is tried again. From
# $2^{40}$ it falls by a factor of 2 with each of the first steps until none overflows. The stop is where
# the curve "overflow" leaves 0 in the right picture of Task 4. As gradients shrink during training, it moves up.
# A skipped step costs time only: the next one begins from the same weights with a smaller
# scale, and one in 20 at most is lost. A gradient with some layers left out is not the gradient of the loss, and infinities
# (and NaN, from infinity minus infinity) would spoil the weights, or the optimizer's averages, for good.
# bfloat16 does not need the scale, since gradients do not leave its range; it needs master weights all the more (an eps of 1/128),
# and sums in float32.
# ### END SOLUTION

# %% [markdown]
# ## 5 The whole toolbox
#
# In `npnet` (as in other frameworks) the tools are ready, and work together: initialization, half
# precision with a scaler, accumulation over several batches (lab 4), and checkpointing (labs 1 to 3). Here is a network that
# is deep enough for memory to matter, 24 hidden layers of 64, and one update with all 614 training patients. What
# is its peak? Accumulation runs batches of 154, and adds up their gradients; the last batch is shorter, and counts by its number of patients.

# %% nbgrader={"grade_id": "toolbox_memory", "locked": true}
sizes = [8] + [64] * 24 + [1]
chain = len(sizes) - 1


def peak_of(half=False, every=0, batch=614):
    """Bytes of one update with all patients, weights and the optimizer's memory not counted."""
    model = npnet.mlp(sizes, "relu", initializer=kaiming_normal, rng=0)
    used = npnet.mixed_precision(model) if half else model
    schedule = schedules.every_nth(chain, every) if every else schedules.none(chain)
    optimizer, scaler = npnet.Adam(1e-3), npnet.GradScaler() if half else None

    def step():
        pairs = npnet.batches(x_train, y_train, batch, shuffle=False)
        terms = {"scaler": scaler, "streaming": False}
        npnet.accumulated_step(used, loss_function, optimizer, schedule, pairs, 614, **terms)

    step()  # the optimizer makes its memory
    return measure_peak(step).increase_bytes


peaks = {
    "plain": peak_of(),
    "half": peak_of(half=True),
    "every 5th": peak_of(every=5),
    "4 batches": peak_of(batch=154),
    "all three": peak_of(half=True, every=5, batch=154),
}
gradient_bytes = sum(4 * (n * m + m) for n, m in pairwise(sizes))
for name, peak in peaks.items():
    print(f"{name:<10} {format_bytes(peak):>9}   {peak / peaks['plain']:.2f}")
print(f"of it, the gradients of all layers: {format_bytes(gradient_bytes)}")
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
plots.plot_bars(
    {name: peak / 1e6 for name, peak in peaks.items()},
    ax,
    title="peak of one update, 24 hidden layers, 614 patients",
    ylabel="MB",
    labels=[f"{peak / peaks['plain']:.2f}" for peak in peaks.values()],
)
ax.axhline(gradient_bytes / 1e6, color="black", linestyle=":", label="gradients of all layers")
ax.set_xlabel("on the bars: ratio to plain")
ax.legend()
plt.show()

# %% [markdown]
# And do they all learn? The exercise's network with its three initializations, trained by `npnet.fit` with Adam, batches of 128, an
# update every 4 of them. 614 patients are 5 batches, the last one of 102: the second window of each epoch is *partial*, with one
# batch in it. (Its update follows 102 patients only, and its loss counts as much as the other's in the mean of the epoch: hence the jags.)

# %% nbgrader={"grade_id": "toolbox_train", "locked": true}
epochs = 2 if labs.grading() else 100


def fit_network(half, schedule, scaler):
    generator = np.random.default_rng(7)
    model = npnet.Sequential(
        npnet.Dense(8, 32, "relu", initializer=relu_xavier, rng=generator),
        npnet.Dense(32, 16, "relu", initializer=kaiming_normal, rng=generator),
        npnet.Linear(16, 1, initializer=small_normal, rng=generator),
    )
    used = npnet.mixed_precision(model, half_products=True) if half else model
    options = {
        "schedule": schedule,
        "scaler": scaler,
        "accumulation_steps": 4,
        "rng": 8,
        "log": False,
    }
    optimizer = npnet.Adam(2e-3)
    history = npnet.fit(
        used, (x_train, y_train), loss=loss_function, optimizer=optimizer,
        epochs=epochs, batch_size=128, **options,
    )  # fmt: skip
    score = float(((used.predict(x_test) > 0) == (y_test > 0.5)).mean())
    return history, score, model.parameters()[0].value


tools = {
    "float32": fit_network(False, "none", None),
    "+ checkpoints": fit_network(False, "sqrt", None),
    "+ half, scaler": fit_network(True, "sqrt", npnet.GradScaler()),
}
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
for i, (name, (history, score, w)) in enumerate(tools.items()):
    losses = [epoch.loss for epoch in history.epochs]
    ax.plot(
        range(1, epochs + 1), losses, ["-", "--", ":"][i], linewidth=[5, 2.5, 2.5][i], label=name
    )
    print(
        f"{name:<15} last loss {losses[-1]:.4f}, test accuracy {score:.1%}, W_1[0, 0] = {w[0, 0]:.7f}"
    )
ax.set(
    title="accumulation over 4 batches of 128, Adam", xlabel="epoch", ylabel="mean training loss"
)
ax.legend()
plt.show()
same = np.array_equal(tools["float32"][2], tools["+ checkpoints"][2])
print("with checkpoints the weights are", "the same, bit for bit" if same else "not the same: why?")

# %% [markdown]
# ### Question 3 (2 points)
#
# * Which of the tools change the numbers of a training, and which do not? Say for each (half precision, checkpoints, accumulation, a GPU)
#   what changes and why.
# * "All three" is not the product of the three ratios. What is left, and which tool would reduce *that*?
# * You train a network of 4 GB of float32 weights with Adam. How many bytes are weights, gradients and Adam's memory, before a single activation?
#   What do half-precision copies of the weights change about that?

# %% [markdown] nbgrader={"grade_id": "question_tools", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# Half precision rounds activations (and on a GPU products): other numbers, about three digits of each. Checkpoints repeat the same arithmetic:
# no bit changes. Accumulation adds the same gradients in another order: equal up to rounding (and only if batches
# count by their size). A GPU sums in another order, too: equal up to rounding.
# What is left are the gradients of all layers, which neither precision of activations nor checkpoints nor accumulation touch, and what one layer
# takes at work. Updating each layer during the backward pass, as npnet does without a scaler or accumulation ("streaming"), frees each
# gradient at once.
# 4 GB weights + 4 GB gradients + 8 GB Adam (two averages) = 16 GB. Half copies of the weights *add* 2 GB, if all are made at once: mixed precision saves activations
# and time, not weights.
# ### END SOLUTION

# %% [markdown]
# PyTorch, where it is installed, has the same tools by the same names. A last comparison:

# %% nbgrader={"grade_id": "pytorch", "locked": true}
try:
    import torch
except ImportError:
    print("PyTorch: skipped, it is not installed (and not needed)")
else:
    torch.manual_seed(42)
    xavier, kaiming = torch.empty(32, 8), torch.empty(16, 32)
    torch.nn.init.xavier_uniform_(xavier, gain=torch.nn.init.calculate_gain("relu"))
    torch.nn.init.kaiming_normal_(kaiming, mode="fan_in", nonlinearity="relu")
    print(
        f"std of Xavier (32, 8):   torch {xavier.std():.3f}, yours {layers[0].weight.value.std():.3f}"
    )
    print(
        f"std of Kaiming (16, 32): torch {kaiming.std():.3f}, yours {layers[1].weight.value.std():.3f}"
    )
    logits = torch.linspace(-3, 3, 7).reshape(7, 1).requires_grad_()
    targets = torch.tensor([[0.0], [1.0], [1.0], [0.0], [1.0], [0.0], [1.0]])
    torch.nn.functional.binary_cross_entropy_with_logits(logits, targets).backward()
    _, gradient = loss_function.value_and_gradient(logits.detach().numpy(), targets.numpy())
    difference = np.abs(gradient - logits.grad.numpy()).max()
    print(f"gradient of binary cross-entropy: largest difference {difference:.1e}")

# %% [markdown]
# ## What you have learnt
#
# * A tensor has a shape, a dtype, a device and an owner; a target of the shape (n,) for (n, 1) makes an $n \times n$ matrix of a difference,
#   and no error.
# * A GPU's clock is read after waiting for it, and after a run to warm up. Small matrices cost calls, large ones arithmetic.
# * A layer multiplies the signal's standard deviation by $\sqrt{\text{fan\_in} \operatorname{Var}(w)}$, ReLU by $1/\sqrt2$ more; what is not 1 becomes a power in the depth.
# * float16 has few exponents and few digits: master weights against the few digits, a scaled loss against the few exponents, sums in float32.
# * A dynamic scale climbs until something overflows, skips that step, and tries again.
# * Half precision changes the numbers a little; checkpoints do not at all.
#
# ## To read
#
# * X. Glorot and Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks", *AISTATS*, 2010: Xavier's rule.
# * K. He, X. Zhang, S. Ren and J. Sun, "Delving deep into rectifiers: surpassing human-level performance on ImageNet classification",
#   *ICCV*, 2015, arXiv:1502.01852: Kaiming's rule.
# * P. Micikevicius et al., "Mixed precision training", *ICLR*, 2018, arXiv:1710.03740: master weights, loss scaling, sums in float32.
# * D. Goldberg, "What every computer scientist should know about floating-point arithmetic", *ACM Computing Surveys* 23(1), 1991.
# * J. W. Smith et al., "Using the ADAP learning algorithm to forecast the onset of diabetes mellitus", *Proceedings of the Annual Symposium on Computer
#   Application in Medical Care*, 1988: the data.
