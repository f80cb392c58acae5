# %% [markdown]
# # Lab 5: Sources of randomness
#
# Run a training twice, and the results differ. Some of that is wanted: weights, the order of the data, dropout are
# random. Some of it is not, and has nothing to do with random numbers at all. Who wants to find a mistake, to compare
# two methods, or to recompute what was not kept (checkpointing!) has to know where each difference comes from.
#
# You will find the sources one by one, shut them, and end with trainings that give **the same bits** again. And you
# will see what no seed can promise.
#
# | part | you write | points |
# | --- | --- | --- |
# | 1 Seeds | `seed_everything` | 3 |
# | 2 A stream for each purpose | `stream`; a question | 4 + 2 |
# | 3 The same bits | `fingerprint` | 3 |
# | 4 Without any random number | `sum_in_pieces`, `sum_in_any_order`; a question | 3 + 2 + 2 |
# | 5 A training that can be repeated | `careful_training`; a question | 4 + 2 |
#
# It takes about an hour. Write where it says `YOUR CODE HERE` or `YOUR ANSWER HERE`. Below each task is
# a cell of tests: run it, and it says what is wrong. (There are more tests when the lab is graded.)

# %% nbgrader={"grade_id": "setup", "locked": true}
import builtins
import copy
import hashlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
import zlib
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np

import npnet
from npnet import labs

patients, diabetes = npnet.load_diabetes(standardize=True)
print(f"patients: {patients.shape}, {patients.dtype}; diabetes: {diabetes.shape}, 0 or 1")


# %% nbgrader={"grade_id": "helpers", "locked": true}
# What the tests need. There is no need to read it.
@contextmanager
def streams_kept():
    """Put the global streams and PYTHONHASHSEED back to where they were."""
    before = random.getstate(), np.random.get_state(), os.environ.get("PYTHONHASHSEED")
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        os.environ.pop("PYTHONHASHSEED", None)
        if before[2] is not None:
            os.environ["PYTHONHASHSEED"] = before[2]


@contextmanager
def hash_refused(name):
    """Nobody may call hash() of a string, or of bytes, meanwhile."""
    original = builtins.hash

    def refusing(value):
        if isinstance(value, (str, bytes)):
            raise AssertionError(
                f"{name}: hash() of a string or of bytes is another number in every process: take zlib.crc32 or hashlib"
            )
        return original(value)

    builtins.hash = refusing
    try:
        yield
    finally:
        builtins.hash = original


# %% [markdown]
# ## 1 Seeds
#
# The same input, twice the same network: 5 inputs, 1500 hidden units, 1 output.

# %% nbgrader={"grade_id": "look_at_outputs", "locked": true}
x = np.random.default_rng(0).normal(size=(1, 5))
for _ in range(2):
    model = npnet.mlp([5, 1500, 1], dtype=np.float64)
    print(model.predict(x))

# %% [markdown]
# Each network draws its weights anew. A pseudorandom generator is a machine that computes: from its *state* follow the
# next number and the next state. A *seed* sets the state. From the same seed come the same numbers.
#
# But there is not *one* generator. In a Python process there are at least these:
#
# | source | what draws from it | seeded by |
# | --- | --- | --- |
# | `random` | Python code: `random.shuffle`, `random.random` | `random.seed(seed)` |
# | NumPy's global stream | `np.random.rand`, `np.random.shuffle`; `npnet.Network` | `np.random.seed(seed)` |
# | a `numpy.random.Generator` | whoever is given it: `rng=` in npnet | `np.random.default_rng(seed)` makes it |
# | hashes of strings | the order in a **set** of strings; not a `dict`, which keeps the order of insertion | the environment variable `PYTHONHASHSEED`, read when Python **starts** |
# | the GPU's generators | CuPy, `torch.cuda`: each device has its own | `cupy.random.seed`, `torch.cuda.manual_seed_all` |
#
# The last but one surprises most people. Three Python processes, one after the other:

# %% nbgrader={"grade_id": "look_at_hashes", "locked": true}
code = "print(hash('dropout') % 1000, list({'weights', 'order', 'dropout', 'noise'}))"


def in_a_new_process(code, **environment):
    """What a new Python process prints that runs this code, with these environment variables."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONHASHSEED", *environment)
    }
    process = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return process.stdout.strip()


for _ in range(3):
    print(in_a_new_process(code))
print("with PYTHONHASHSEED=0:")
for _ in range(2):
    print(in_a_new_process(code, PYTHONHASHSEED="0"))

# %% [markdown]
# ### Task 1: seed everything (3 points)
#
# Write `seed_everything(seed)`. It seeds Python's `random` and NumPy's global stream, sets `PYTHONHASHSEED` in
# `os.environ` (a **string**; it is too late for this process, but child processes inherit it), and returns a new
# `numpy.random.Generator` for everything that can be given one. (`npnet.set_seed` does all this, and CuPy's, for npnet.
# Here you write it yourself.)


# %% nbgrader={"grade_id": "seed_everything", "solution": true}
def seed_everything(seed):
    """Seed `random`, NumPy's global stream and the hashes of child processes; return a new Generator."""
    ### BEGIN SOLUTION
    random.seed(seed)
    np.random.seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)
    return np.random.default_rng(seed)
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_seed_everything", "grade": true, "points": 3}
def numbers_after(seed):
    """What each source gives after seed_everything(seed)."""
    with labs.told(f"seed_everything({seed})"), labs.counting(vars(npnet), "set_seed") as calls:
        generator = seed_everything(seed)
    assert not calls, "write it yourself, without npnet.set_seed"
    assert isinstance(generator, np.random.Generator), (
        f"return a numpy.random.Generator (np.random.default_rng makes one), not {type(generator).__name__}"
    )
    return {
        "Python's random": [random.random() for _ in range(3)],
        "NumPy's global stream": np.random.rand(3).tolist(),
        "the Generator that you return": generator.random(3).tolist(),
        "os.environ['PYTHONHASHSEED']": os.environ.get("PYTHONHASHSEED"),
    }


def check_seeds(seed, other):
    with streams_kept():
        os.environ.pop("PYTHONHASHSEED", None)
        first, again, different = numbers_after(seed), numbers_after(seed), numbers_after(other)
        for source, numbers in first.items():
            assert numbers is not None, f"{source} is not set: new processes hash strings at random"
            assert numbers == again[source], (
                f"{source}: after seed_everything({seed}), twice, it gives {numbers[0]:.4f} and {again[source][0]:.4f}: it "
                "is not seeded"
            )
            assert numbers != different[source], (
                f"{source}: seeds {seed} and {other} give the same: is a fixed number in the place of the seed?"
            )
        word = first["os.environ['PYTHONHASHSEED']"]
        assert word == str(seed), (
            f"os.environ['PYTHONHASHSEED'] is {word!r}, expected {str(seed)!r}"
        )


check_seeds(123, 124)
with streams_kept():
    seed_everything(123)
    code = "import os; print(os.environ['PYTHONHASHSEED'], hash('dropout'))"
    hash_seed = os.environ["PYTHONHASHSEED"]
    assert in_a_new_process(code, PYTHONHASHSEED=hash_seed) == in_a_new_process(
        code, PYTHONHASHSEED=hash_seed
    )
### BEGIN HIDDEN TESTS
check_seeds(0, 1)
check_seeds(2**32 - 1, 0)
### END HIDDEN TESTS
print("seed_everything: right")

# %% [markdown]
# Now the two networks again. `npnet.set_seed` seeds npnet's own stream, too, which everything with `rng=None` draws from:

# %% nbgrader={"grade_id": "look_at_seeded", "locked": true}
for _ in range(2):
    print("seeded:", npnet.set_seed(123))
    model = npnet.mlp([5, 1500, 1], dtype=np.float64)
    print(model.predict(x))

# %% [markdown]
# ## 2 A stream for each purpose
#
# One seed at the top of the program, one stream for everything: is all well then? As long as nobody changes anything.
# A stream has *one* state, and whoever draws from it moves it on for all others. Here somebody adds one line to a
# program, a harmless look at a random sample:

# %% nbgrader={"grade_id": "look_at_one_stream", "locked": true}
for look in (False, True):
    rng = np.random.default_rng(123)
    if look:
        rng.integers(768)  # "let us look at some patient"
    weights = rng.normal(size=(2, 3))
    order = rng.permutation(10)
    print("with the new line:   " if look else "without the new line:", weights[0].round(3), order)

# %% [markdown]
# Every weight is another (they have moved on by one), and so is the order of the data. If the results get better: is it
# the change you made, or the new weights? A comparison like this is worth nothing. The remedy is a stream *for each
# purpose*: one for weights, one for
# the order, one for dropout; and, in order that a training which is broken off can be gone on with in epoch 7, a new one
# for each epoch. None of them is drawn from another. Each follows from (seed, purpose, epoch) alone.
#
# ### Task 2: streams (4 points)
#
# Write `stream(seed, name, epoch=0)`: a new `numpy.random.Generator`, the same numbers for the same three arguments, in
# any process, on any day; and other numbers as soon as one of the three is another.
#
# * `np.random.default_rng` takes a **list** of whole numbers $\ge 0$ as well, and mixes them well: lists that differ
#   give streams that have nothing to do with each other.
# * So a name has to become a number. Not with `hash`: you saw why. `zlib.crc32` takes bytes (`name.encode()`), and
#   computes a checksum, always the same.
# * Adding things up is tempting, `seed + epoch`, say. Then epoch 1 of seed 0 is epoch 0 of seed 1, and "five
#   independent runs" with the seeds 0 to 4 share most of their random numbers.
# * Global streams stay as they are.


# %% nbgrader={"grade_id": "stream", "solution": true}
def stream(seed, name, epoch=0):
    """A new Generator, a function of the three arguments.

    Args:
        seed: a whole number >= 0, of the whole run.
        name: a string: what the numbers are for, such as "dropout".
        epoch: a whole number >= 0.
    """
    ### BEGIN SOLUTION
    return np.random.default_rng([seed, zlib.crc32(name.encode()), epoch])
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_stream", "grade": true, "points": 4}
def first_numbers(*arguments):
    call = f"stream{arguments}"
    before = random.getstate(), np.random.get_state()[1:3]
    with hash_refused("stream"), labs.told(call):
        generator = stream(*arguments)
    assert isinstance(generator, np.random.Generator), (
        f"{call}: expected a numpy.random.Generator, got {type(generator).__name__}"
    )
    numbers = tuple(generator.integers(2**63, size=4).tolist())
    after = random.getstate(), np.random.get_state()[1:3]
    same = (
        before[0] == after[0]
        and before[1][1] == after[1][1]
        and np.array_equal(before[1][0], after[1][0])
    )
    assert same, (
        f"{call} changes a global stream, which others draw from: make a generator of your own"
    )
    return numbers


def check_streams(seeds, names, epochs):
    seen = {}
    for arguments in itertools.product(seeds, names, epochs):
        numbers = first_numbers(*arguments)
        assert numbers == first_numbers(*arguments), (
            f"stream{arguments}, called twice, begins differently: make a new generator each time, from the arguments "
            "alone"
        )
        if numbers in seen:
            other = seen[numbers]
            differing = [
                what
                for what, one, two in zip(("seed", "name", "epoch"), arguments, other, strict=True)
                if one != two
            ]
            reason = {
                ("seed",): "the seed makes no difference",
                (
                    "name",
                ): "are there different numbers for different names, with the same letters in another order, too?",
                ("epoch",): "the epoch makes no difference",
                (
                    "seed",
                    "epoch",
                ): "seed and epoch are added up: give them as two numbers in a list, so that runs do not overlap",
            }.get(
                tuple(differing),
                f"{' and '.join(differing)} run into each other: give them as a list",
            )
            raise AssertionError(
                f"stream{other} and stream{arguments} are the same stream: {reason}"
            )
        seen[numbers] = arguments
    assert first_numbers(seeds[0], names[0]) == first_numbers(seeds[0], names[0], 0), (
        "epoch is 0 where it is not given"
    )


check_streams([0, 1, 2], ["weights", "order", "dropout", "pudrot"], [0, 1, 2])
check_streams([123], ["ab", "ba", "abc", ""], [0, 7])
check_streams([1, 11], ["a", "1a", "a1"], [1, 11])
### BEGIN HIDDEN TESTS
check_streams([5, 6, 10**12], ["x", "y", "order", "redro"], [0, 1, 5, 10])
### END HIDDEN TESTS
print("stream: right")

# %% [markdown]
# npnet goes one step further with dropout. A layer has a *key*, each training step a *number*, and the mask is a function
# of the two, by a generator that is made for this (Philox: it *counts*, and enciphers the counter, so that it can begin
# anywhere). A layer that is run again in the same step gets the same mask without anybody having kept a state. That is
# why checkpointing with dropout is exact (lab 3).
#
# ### Question 1 (2 points)
#
# * In a program that seeds once, at the top, two networks are made one after the other. Do they have the same weights? If
#   the whole program is run again, what is the same, and what is not? So what does `set_seed` before each of the two
#   networks change?
# * Two methods are to be compared with the seeds 0 to 9. Why should the random numbers of both be the same for each
#   seed as far as possible, and how does `stream` help?

# %% [markdown] nbgrader={"grade_id": "question_streams", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# No: the second continues the stream where the first left it. But the whole program, run again, gives the same two networks
# again: it is reproducible, although the two differ. Seeding before each makes both begin from the same state, so the two
# are equal (as wanted when they are to be compared, and a mistake when they are to be an ensemble).
# With the same weights, order and masks the difference between the methods is not hidden behind the differences between
# draws: a paired comparison has a smaller variance. With one stream for everything, a method that draws one number more
# gets other weights and another order from there on; with a stream for each purpose and epoch all else stays the same.
# ### END SOLUTION

# %% [markdown]
# ## 3 The same bits
#
# Are two models the same? `np.allclose` says that they are similar. We want to know about every bit, and we want to write
# it down, in a log, in order to compare with a run on another day. So we need a short text that changes as soon as
# anything changes: a *fingerprint*. SHA-256 gives 256 bits for any sequence of bytes, as 64 hexadecimal digits:

# %% nbgrader={"grade_id": "look_at_sha", "locked": true}
digest = hashlib.sha256()
digest.update(b"any bytes, ")
digest.update(
    np.arange(3.0).tobytes()
)  # the numbers' bytes, row by row, however they lie in memory
print(digest.hexdigest())

# %% [markdown]
# ### Task 3: fingerprint (3 points)
#
# Write `fingerprint(arrays)` for a dictionary {name: array}. It returns 64 hexadecimal digits. They are the same
# exactly where names, dtypes, shapes and **all bits of all numbers** are the same. Neither the order of the dictionary
# matters, nor whether an array lies in memory row by row or column by column.


# %% nbgrader={"grade_id": "fingerprint", "solution": true}
def fingerprint(arrays):
    """SHA-256 of names, dtypes, shapes and numbers, as a text of 64 hexadecimal digits."""
    ### BEGIN SOLUTION
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name}: {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_fingerprint", "grade": true, "points": 3}
def printed(arrays):
    with hash_refused("fingerprint"), labs.unchanged(**arrays), labs.told("fingerprint"):
        text = fingerprint(arrays)
    assert isinstance(text, str), (
        f"fingerprint: return a text (hexdigest), not {type(text).__name__}"
    )
    assert len(text) == 64, (
        f"fingerprint: expected 64 hexadecimal digits, got {len(text)}: {text[:80]!r}"
    )
    return text


def changed(array, index, value):
    array = array.copy()
    array.flat[index] = value
    return array


def check_fingerprint(weight, bias):
    """weight: (m, n), m != n, a large one; bias: (n,)."""
    right = {"0.weight": weight, "0.bias": bias}
    text, middle = printed(right), weight.size // 2
    bit = changed(weight, middle, np.nextafter(weight.flat[middle], np.inf, dtype=weight.dtype))
    same = {
        "the same arrays": copy.deepcopy(right),
        "the dictionary in another order": {"0.bias": bias, "0.weight": weight},
        "the weight column by column in memory (Fortran order)": right
        | {"0.weight": np.asfortranarray(weight)},
    }
    for what, arrays in same.items():
        assert printed(arrays) == text, (
            f"fingerprint: {what}: it is another, but should be the same"
        )
    zeros, minus = changed(bias, 0, 0.0), changed(bias, 0, -0.0)
    swapped = weight.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    other = {
        "in the middle of a large array one number is 1 larger (str and repr of a large array leave out its middle)": (
            right,
            right | {"0.weight": changed(weight, middle, weight.flat[middle] + 1)},
        ),
        "one number differs in its last bit (is something rounded, or printed?)": (
            right,
            right | {"0.weight": bit},
        ),
        "two rows of the weight change places (is something summed up?)": (
            right,
            right | {"0.weight": swapped},
        ),
        "0.0 becomes -0.0": (right | {"0.bias": zeros}, right | {"0.bias": minus}),
        "the shape is another, with the same numbers": (
            right,
            right | {"0.weight": weight.reshape(weight.shape[::-1])},
        ),
        "the dtype is another, with the same bytes": (
            right,
            right | {"0.bias": bias.view(np.int64 if bias.dtype == np.float64 else np.int32)},
        ),
        "a name is another": (right, {"1.weight": weight, "0.bias": bias}),
        "the arrays of two names change places": (
            {"0.bias": bias, "1.bias": bias + 1},
            {"0.bias": bias + 1, "1.bias": bias},
        ),
    }
    for what, (one, two) in other.items():
        assert printed(one) != printed(two), (
            f"fingerprint: {what}, and the fingerprint stays the same"
        )


rng = np.random.default_rng(0)
check_fingerprint(rng.normal(size=(60, 40)), rng.normal(size=40))
### BEGIN HIDDEN TESTS
check_fingerprint(
    rng.normal(size=(50, 31)).astype(np.float32), rng.normal(size=31).astype(np.float32)
)
check_fingerprint(rng.normal(size=(2000, 3)), rng.normal(size=3))
### END HIDDEN TESTS
print("fingerprint: right")

# %% [markdown]
# With it we look at a whole training, dropout, shuffling and all. What changes the bits of the result, and what does not?


# %% nbgrader={"grade_id": "measure_trainings", "locked": true}
def trained(seed=123, batch_size=64, before=None, dtype=np.float64, **options):
    """The fingerprint of a model that was trained for 3 epochs."""
    npnet.set_seed(seed)
    if before is not None:
        before()
    model = npnet.Sequential(
        npnet.Dense(8, 32, "tanh", dtype=dtype),
        npnet.Dropout(0.2),
        npnet.Dense(32, 16, "tanh", dtype=dtype),
        npnet.Linear(16, 1, dtype=dtype),
    )
    npnet.fit(
        model,
        (patients.astype(dtype), diabetes.astype(dtype)),
        loss=npnet.BCEWithLogits(),
        optimizer=npnet.Adam(0.01),
        epochs=3,
        batch_size=batch_size,
        log=False,
        **options,
    )
    return fingerprint(model.state_dict())


runs = {
    "as it is": {},
    "once more": {},
    "another seed": {"seed": 124},
    "with a checkpoint at sqrt(L)": {"schedule": "sqrt"},
    "updated after the backward pass, not during it": {"streaming": False},
    "recorded and replayed (capture)": {"capture": True},
    "32 at a time, an update every 2 (lab 4)": {"batch_size": 32, "accumulation_steps": 2},
    "float32": {"dtype": np.float32},
    "somebody drew from random and np.random before": {
        "before": lambda: (random.random(), np.random.rand())
    },
    "somebody made a layer that nobody uses before": {"before": lambda: npnet.Linear(2, 2)},
}
prints = {name: trained(**options) for name, options in runs.items()}
for name, text in prints.items():
    print(f"{name:<50}{text[:12]}  {'the same' if text == prints['as it is'] else 'OTHER BITS'}")

# %% [markdown]
# Checkpoints change no bit, nor does the replay of a recorded step: the same operations on the same numbers in the same
# order. Two micro-batches of 32 do (and dropout draws other masks, too). An additional layer, which nobody uses, changes
# all: it drew from the stream that all share.
#
# ## 4 Without any random number
#
# Now to differences that have nothing to do with seeds. Every number has 24 significant bits in float32, 53 in float64,
# and after **each** addition the result is rounded to these. So
#
# $$(a + b) + c \ne a + (b + c)$$
#
# in general. In float32, $2^{24} + 1 = 2^{24}$: the 1 is lost. (The exact sum lies in the middle between two numbers
# of float32, and the even one is taken.) But $1 + 1 = 2$, and $2^{24} + 2$ is exact.

# %% nbgrader={"grade_id": "look_at_rounding", "locked": true}
big, small = np.float32(2**24), np.float32(1)
print(f"(2^24 + 1) + 1 = {(big + small) + small:.0f}")
print(f"2^24 + (1 + 1) = {big + (small + small):.0f}")
print(f"0.1 + 0.2 + 0.3 in float64: {(0.1 + 0.2) + 0.3!r} or {0.1 + (0.2 + 0.3)!r}")

# %% [markdown]
# ### Task 4: sums (3 + 2 points)
#
# When $T$ threads add up an array, each takes a piece, and in the end the $T$ partial sums are added. Write
# `sum_in_pieces(x, pieces)`: cut the one-dimensional array `x` into `pieces` contiguous pieces (`np.array_split` does),
# add up each from left to right, then add up the partial sums from left to right. All in the **dtype of `x`**, rounding
# after each addition, and return a number of this dtype.
#
# Not with `np.sum`: that does *not* add from left to right. It adds in pairs, in order that errors grow more slowly.
# `np.cumsum` goes from left to right, or write a loop.
#
# Try it on paper first: $x = (2^{24}, 1, 1, 1, 1, 1, 1, 1)$ in float32, with 1, 2, 4 and 8 pieces.
#
# Then write `sum_in_any_order(x)`, which has **the same bits** however the elements of `x` are arranged. Its error may be at
# most $10^{-4}\sum_i |x_i|$. Think of two ways: bring the elements into an order that depends on their values alone; or
# compute the sum exactly, and round once (`math.fsum` does this). Return a number of the dtype of `x`, too.


# %% nbgrader={"grade_id": "sums", "solution": true}
def sum_in_pieces(x, pieces):
    """The sum of x, (n,), as ``pieces`` threads compute it: each a piece, from left to right, then all partial sums."""
    ### BEGIN SOLUTION
    partial = [np.cumsum(piece)[-1] for piece in np.array_split(x, pieces)]
    return np.cumsum(np.array(partial, x.dtype))[-1]
    ### END SOLUTION


def sum_in_any_order(x):
    """The sum of x, (n,), with the same bits for every order of its elements."""
    ### BEGIN SOLUTION
    return x.dtype.type(math.fsum(x))
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_sum_in_pieces", "grade": true, "points": 3}
def check_pieces(x, pieces, right=None, name="x"):
    call = f"sum_in_pieces({name}, {pieces})"
    with labs.unchanged(x=x), labs.told(call):
        got = sum_in_pieces(x, pieces)
    assert np.ndim(got) == 0, f"{call}: expected a number, got an array of shape {np.shape(got)}"
    kind = getattr(got, "dtype", type(got).__name__)
    assert kind == x.dtype, (
        f"{call}: its dtype is {kind}, expected {x.dtype}: stay in the dtype of x"
    )
    parts = np.array_split(x, pieces)
    mistakes = {
        "This is the sum of partial sums by np.sum, which adds in pairs, not from left to right": sum(
            (part.sum() for part in parts[1:]), parts[0].sum()
        ),
        "The pieces are not contiguous: the first is the beginning of x, the last its end": sum(
            (part.sum() for part in [x[i::pieces] for i in range(1, pieces)]), x[::pieces].sum()
        ),
        "This is np.sum(x), which adds in pairs, not from left to right": x.sum(),
        "This is the exact sum: it was added up in a higher precision": x.dtype.type(math.fsum(x)),
        "This is the sum from left to right without pieces": np.add.accumulate(x)[-1],
    }
    words_and_numbers = {words: float(wrong) for words, wrong in mistakes.items()}
    labs.check_number(float(got), float(right), call, mistakes=words_and_numbers)


x8 = np.array([2**24, 1, 1, 1, 1, 1, 1, 1], np.float32)
for pieces, right in {1: 2**24, 2: 2**24 + 4, 4: 2**24 + 6, 8: 2**24}.items():
    check_pieces(x8, pieces, right, "(2^24, 1, 1, 1, 1, 1, 1, 1)")
check_pieces(np.array([1, 2, 3, 4, 5], np.float64), 2, 15, "(1, 2, 3, 4, 5)")
check_pieces(np.array([2**24, -(2**24), 1, 1], np.float32), 2, 2, "(2^24, -2^24, 1, 1)")
x9 = np.array([1, 1, 1, 1, 2**24, 1, 1, 1, 1], np.float32)
check_pieces(x9, 2, 2**24 + 8, "(1, 1, 1, 1, 2^24, 1, 1, 1, 1)")


### BEGIN HIDDEN TESTS
def loop_sum(numbers):
    total = numbers[0]
    for number in numbers[1:]:
        total = total + number
    return total


for dtype in (np.float32, np.float64):
    x1000 = np.random.default_rng(1).normal(size=1003).astype(dtype)
    for pieces in (1, 2, 3, 7, 16):
        check_pieces(
            x1000, pieces, loop_sum([loop_sum(part) for part in np.array_split(x1000, pieces)])
        )
### END HIDDEN TESTS
print("sum_in_pieces: right")


# %% nbgrader={"grade_id": "test_sum_in_any_order", "grade": true, "points": 2}
def check_any_order(x, name):
    rng, seen = np.random.default_rng(2), {}
    exact = math.fsum(x.tolist())
    for trial in range(40):
        mixed = x if trial == 0 else rng.permutation(x)
        with labs.unchanged(x=mixed), labs.told("sum_in_any_order"):
            got = sum_in_any_order(mixed)
        assert np.ndim(got) == 0, (
            f"sum_in_any_order: expected a number, got an array of shape {np.shape(got)}"
        )
        kind = getattr(got, "dtype", type(got).__name__)
        assert kind == x.dtype, f"sum_in_any_order: its dtype is {kind}, expected {x.dtype}"
        error = abs(float(got) - exact)
        assert error <= 1e-4 * math.fsum(np.abs(x).tolist()), (
            f"sum_in_any_order({name}) is {got!r}, but the exact sum is {exact!r}"
        )
        seen.setdefault(got.tobytes(), float(got))
    if len(seen) > 1:
        least, most = min(seen.values()), max(seen.values())
        reason = "the sum is rounded after each addition, and the order decides how"
        if most - least < 1e-6 * np.abs(x).sum():
            reason += ". (A higher precision makes that smaller and rarer; it does not end it)"
        raise AssertionError(
            f"sum_in_any_order({name}): 40 orders of the same numbers give {len(seen)} different sums, from {least!r} to "
            f"{most!r}: {reason}"
        )


rng = np.random.default_rng(3)
check_any_order(rng.normal(size=500).astype(np.float32), "500 normal numbers, float32")
wide = np.concatenate([rng.normal(size=100) * 2.0**k for k in (0, 20, 40, 50)])
check_any_order(
    np.concatenate([wide, -wide[100:]]).astype(np.float32),
    "numbers of very different sizes, float32",
)
### BEGIN HIDDEN TESTS
check_any_order(wide, "numbers of very different sizes, float64")
check_any_order(np.array([2**24, 1, 1], np.float32), "(2^24, 1, 1)")
### END HIDDEN TESTS
print("sum_in_any_order: right")

# %% [markdown]
# How much does the order matter? 10,000 numbers, float32, in 1000 random orders: from left to right, in 16 pieces, and by
# `np.sum`. The unit is the distance between neighbouring numbers of float32 at this place (*unit in the last place*, ulp).

# %% nbgrader={"grade_id": "measure_orders", "locked": true}
rng = np.random.default_rng(0)
numbers, orders = rng.random(10_000, dtype=np.float32), 20 if labs.grading() else 1000
exact = math.fsum(numbers)
ulp = float(np.spacing(np.float32(exact)))
errors = {"left to right": [], "in 16 pieces": [], "np.sum (in pairs)": []}
for _ in range(orders):
    mixed = rng.permutation(numbers)
    errors["left to right"].append((float(sum_in_pieces(mixed, 1)) - exact) / ulp)
    errors["in 16 pieces"].append((float(sum_in_pieces(mixed, 16)) - exact) / ulp)
    errors["np.sum (in pairs)"].append((float(np.sum(mixed)) - exact) / ulp)
for name, values in errors.items():
    print(
        f"{name:<20}{len(set(values)):>4} different sums in {orders} orders, at most {max(map(abs, values)):.1f} ulp off"
    )

figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
for ax, (name, values) in zip(axes, errors.items(), strict=True):
    ax.hist(values, bins=25, color="C0")
    ax.axvline(0, color="black", linestyle=":", label="exact")
    ax.set(title=name, xlabel="error (ulp)")
axes[0].set_ylabel(f"orders (of {orders})")
axes[0].legend()
plt.show()

# %% [markdown]
# ### Threads, and the library underneath
#
# A matrix product is nothing but sums. NumPy leaves it to a library (BLAS: OpenBLAS, MKL, Accelerate), which chooses how
# to cut them: by the number of threads, by the processor (wider vector registers add up more columns at a time), by the
# shapes. So we multiply the **same** matrices in new processes with other settings. No random number is drawn in
# between; the columns are four products, each as the first digits of its fingerprint:

# %% nbgrader={"grade_id": "measure_blas", "locked": true}
code = """
import hashlib, json
import numpy as np
found = {}
for n, k, m, kind in [(64, 64, 64, "f4"), (256, 784, 128, "f4"), (100, 784, 30, "f8"), (512, 512, 512, "f8")]:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((n, k)).astype(kind), rng.standard_normal((k, m)).astype(kind)
    found[f"({n}, {k}) x ({k}, {m}) {kind}"] = hashlib.sha256((a @ b).tobytes()).hexdigest()[:8]
print(json.dumps(found))
"""
settings = {
    "1 thread": {"OPENBLAS_NUM_THREADS": "1"},
    "1 thread, again": {"OPENBLAS_NUM_THREADS": "1"},
    "2 threads": {"OPENBLAS_NUM_THREADS": "2"},
    "2 threads, again": {"OPENBLAS_NUM_THREADS": "2"},
    "1, as for Haswell (2013)": {"OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Haswell"},
    "1, as for Nehalem (2008)": {"OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Nehalem"},
}
site = os.pathsep.join(
    path for path in sys.path if path
)  # where NumPy is, for a process that is started without site
found = {}
for name, setting in itertools.islice(settings.items(), 2 if labs.grading() else None):
    found[name] = json.loads(in_a_new_process(code, PYTHONPATH=site, **setting))
products = list(found["1 thread"])
print(" " * 26 + "".join(f"{product:>27}" for product in products))
for name, row in found.items():
    marks = (
        row[each] + ("  " if row[each] == found["1 thread"][each] else " *") for each in products
    )
    print(f"{name:<26}" + "".join(f"{mark:>27}" for mark in marks))
print("* other bits than with 1 thread")

# %% [markdown]
# What you see depends on your machine: other processors, other libraries (with MKL or Accelerate, `OPENBLAS_...` changes
# nothing), even another version have other patterns. Where stars are is not the point. The points are: with the same
# setting there are the same bits again; with another setting there may be others, for *some* shapes; and no seed has a
# say in it.
#
# Nor are rows of a product independent of each other, bit by bit. The first row of `x @ w`, alone or in larger batches:

# %% nbgrader={"grade_id": "measure_rows", "locked": true}
rng = np.random.default_rng(0)
x, w = (
    rng.standard_normal((256, 784), dtype=np.float32),
    rng.standard_normal((784, 100), dtype=np.float32),
)
alone = x[:1] @ w  # (1, 100)
for rows in (1, 2, 4, 16, 64, 256):
    first = (x[:rows] @ w)[:1]
    print(
        f"in a batch of {rows:>3}: {np.mean(first == alone):>4.0%} of the numbers have the same bits; "
        f"largest difference {np.abs(first - alone).max():.1e}"
    )

# %% [markdown]
# The same sample, the same weights, other companions in the batch: other bits. A service that answers questions by a
# language model puts together whoever asks at the same time, and so the answer may depend on how many others ask.
#
# On a GPU there is one more source: thousands of threads that add to one number in whatever order they come (*atomic*
# additions). Then even the same call, twice in one process, may have different bits. Deterministic algorithms fix an order; they
# are slower. In PyTorch: `torch.use_deterministic_algorithms(True)`, and `torch.backends.cudnn.benchmark = False`, for cuDNN
# otherwise *measures* which algorithm is fastest today.
#
# ### Question 2 (2 points)
#
# * A colleague has your code, your data, your seed, the same versions of everything; and other numbers behind the sixth
#   digit. Name three causes that have nothing to do with random numbers. Is it a mistake in somebody's program?
# * Why does none of them disturb checkpointing, which computes an activation *again*, and needs the same bits?

# %% [markdown] nbgrader={"grade_id": "question_blas", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# Another number of threads (cores of the machine, or an environment variable); another processor, for which BLAS chooses
# other kernels (vector width, fused multiply-add); another BLAS; another batch size or another shape, memory layout or
# alignment; a GPU with atomic additions, or with an algorithm chosen by measuring. It is no mistake: each result is a
# correctly rounded sum in some order, and the error bound holds for all of them. What can be promised is: the same bits
# in the same environment, and similar numbers elsewhere.
# Checkpointing computes again in the same process, on the same machine, with the same shapes, number of threads and library,
# and so in the same order (as long as the operations are deterministic, which on a GPU has to be chosen).
# ### END SOLUTION

# %% [markdown]
# ## 5 A training that can be repeated
#
# What becomes of one bit? Two trainings, alike but for **one** weight that differs in its last bit at the beginning, and
# the distance between all their weights, step by step:


# %% nbgrader={"grade_id": "measure_one_bit", "locked": true}
def train_for(steps, dtype, learning_rate, seed=0, nudged=None, watch=None):
    """The training loss of all patients at the end. Unit ``nudged`` has one weight that is larger by a bit.

    ``watch`` is called with all weights after each step.
    """
    model = npnet.mlp([8, 32, 32, 1], "tanh", dtype=dtype, rng=seed)
    if nudged is not None:
        w = model.layers[0].weight.value
        w[nudged, 0] = np.nextafter(w[nudged, 0], dtype(np.inf))
    loss, rng = npnet.BCEWithLogits(), np.random.default_rng(seed)
    step = npnet.CapturedStep(model, loss, npnet.SGD(learning_rate, 0.9), "none")
    x, y = patients.astype(dtype), diabetes.astype(dtype)
    for _ in range(steps):
        rows = rng.integers(len(x), size=64)
        step(x[rows], y[rows])
        if watch is not None:
            watch(np.concatenate([parameter.value.ravel() for parameter in model.parameters()]))
    return float(loss(model.predict(x), y))


steps, few = (20, 2) if labs.grading() else (700, 10)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", width_ratios=[3, 2])
for dtype, learning_rate, style in [
    (np.float32, 0.5, "C1-"),
    (np.float64, 0.5, "C0-"),
    (np.float32, 0.05, "C1:"),
]:
    one, two = [], []
    train_for(steps, dtype, learning_rate, watch=one.append)
    train_for(steps, dtype, learning_rate, nudged=0, watch=two.append)
    distances = np.linalg.norm(np.subtract(two, one), axis=1) / np.linalg.norm(one, axis=1)
    name = f"{np.dtype(dtype)}, learning rate {learning_rate}"
    axes[0].semilogy(range(1, steps + 1), distances, style, label=name)
    print(f"{name:<30} after the first step {distances[0]:.1e}, after the last {distances[-1]:.1e}")
axes[0].set(
    title="one bit, one weight", xlabel="step", ylabel="distance, relative", ylim=(1e-19, 1e6)
)
axes[0].legend(loc="upper left", fontsize=8)

ends = {}
for rate in (0.5, 0.05):
    ends[f"other bit,\nrate {rate}"] = [
        train_for(steps, np.float32, rate, nudged=i) for i in range(few)
    ]
    ends[f"other seed,\nrate {rate}"] = [
        train_for(steps, np.float32, rate, seed=i) for i in range(few)
    ]
for i, (name, values) in enumerate(ends.items()):
    axes[1].plot([i] * few, values, "o", alpha=0.5, color="C1" if "bit" in name else "C2")
axes[1].set_xticks(range(4), ends, fontsize=8)
axes[1].set(title=f"{few} trainings each", ylabel="training loss at the end", xlim=(-0.5, 3.5))
plt.show()

# %% [markdown]
# With the large learning rate the training is *chaotic*: the difference grows exponentially, until the two have nothing to
# do with each other. float64 begins nine decimal digits lower, and gets there all the same, later. With the small learning
# rate the difference stays where it is. So "only rounding errors" may be the whole difference between two results; and a
# bit, then, is as good as another seed (right picture). It is a reason to want the same bits when one is looking for a
# mistake, and a reason not to believe a result that was seen with one seed.
#
# ### Task 5: repair it (4 points)
#
# Here is a training by somebody careless. `read_folder` stands for `os.listdir`: the names of 8 files, in **any** order, for
# a file system promises none. `read_file` gives the patients in a file: rows of a table that all share.


# %% nbgrader={"grade_id": "careless_training", "locked": true}
table, labels = patients.copy(), diabetes.copy()


def read_folder():
    """The names of the files, in any order."""
    names = [f"patients-{i}.csv" for i in range(8)]
    random.SystemRandom().shuffle(names)  # draws from the operating system: no seed reaches it
    return names


def read_file(name):
    """x, (96, 8), and y, (96, 1): views of `table` and `labels`, not copies."""
    first = 96 * int(name.removeprefix("patients-").removesuffix(".csv"))
    return table[first : first + 96], labels[first : first + 96]


def careless_training(seed):
    np.random.seed(seed)
    model = npnet.Sequential(npnet.Dense(8, 16, "tanh"), npnet.Dropout(0.2), npnet.Linear(16, 1))
    parts = [read_file(name) for name in read_folder()]
    for x, _ in parts:
        x += 0.05 * np.random.standard_normal(x.shape)  # a little noise, against overfitting
    x = np.concatenate([x for x, _ in parts]).astype(np.float32)
    y = np.concatenate([y for _, y in parts]).astype(np.float32)
    settings = {
        "loss": npnet.BCEWithLogits(),
        "optimizer": npnet.Adam(0.02),
        "epochs": 4,
        "batch_size": 64,
    }
    npnet.fit(model, (x, y), log=False, **settings)  # in a random order
    return model


for _ in range(2):
    print(npnet.to_host(careless_training(seed=1).layers[-1].weight.value)[0, :4])
table[:], labels[:] = patients, diabetes

# %% [markdown]
# Write `careful_training(seed)`: the same training, that is with noise on the data, random weights, dropout, a random order
# and the same settings, all of them from `seed`. Called twice with the same seed it gives the same bits, whatever the
# operating system says, whatever was drawn or trained before; called with another seed it gives another model. What is
# shared stays as it is.
#
# There are four things to find. One of them is in none of the lines above: dropout's masks depend on the *number of the
# training step*, and npnet counts on from training to training, until `npnet.set_seed` sets it back to 0.


# %% nbgrader={"grade_id": "careful_training", "solution": true}
def careful_training(seed):
    """As careless_training; the same bits for the same seed."""
    ### BEGIN SOLUTION
    npnet.set_seed(seed)
    model = npnet.Sequential(npnet.Dense(8, 16, "tanh"), npnet.Dropout(0.2), npnet.Linear(16, 1))
    parts = [read_file(name) for name in sorted(read_folder())]
    x = np.concatenate([x for x, _ in parts])
    x = (x + 0.05 * np.random.standard_normal(x.shape)).astype(np.float32)
    y = np.concatenate([y for _, y in parts]).astype(np.float32)
    settings = {
        "loss": npnet.BCEWithLogits(),
        "optimizer": npnet.Adam(0.02),
        "epochs": 4,
        "batch_size": 64,
    }
    npnet.fit(model, (x, y), log=False, **settings)
    return model
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_careful_training", "grade": true, "points": 4}
### BEGIN HIDDEN TESTS
# With the right fingerprint and stream: a mistake costs its points once.
def fingerprint(arrays):
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(
            f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode() + arrays[name].tobytes()
        )
    return digest.hexdigest()


def stream(seed, name, epoch=0):
    return np.random.default_rng([seed, zlib.crc32(name.encode()), epoch])


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)
    return np.random.default_rng(seed)


### END HIDDEN TESTS
class Name(str):
    """A text whose hash is another in each training, as it is in each process."""

    __slots__ = ()
    factor = 1

    def __hash__(self):
        return zlib.crc32(self.encode()) * Name.factor % 2**32


disturbances = itertools.count(1000)
unsorted = read_folder


def model_after(seed, *held):
    """The model, after a disturbance of all sources but those that are held."""
    number = next(disturbances)
    order = np.random.default_rng(0 if "folder" in held else number).permutation(8)
    Name.factor = 1 if "folder" in held else 2 * number + 1
    names = [Name(f"patients-{i}.csv") for i in order]
    if "npnet" in held:
        npnet.set_seed(0)
    else:
        npnet.set_seed(number)
        npnet.random.set_next_step(0 if "steps" in held else number)
    random.seed(0 if "global" in held else number)
    np.random.seed(0 if "global" in held else number)
    globals()["read_folder"] = lambda: list(names)
    try:
        with (
            streams_kept(),
            hash_refused("careful_training"),
            labs.unchanged(table=table, labels=labels),
            labs.told(f"careful_training({seed})"),
        ):
            return careful_training(seed)
    finally:
        globals()["read_folder"] = unsorted


def same_when_held(seed, *held):
    return len({fingerprint(model_after(seed, *held).state_dict()) for _ in range(2)}) == 1


reasons = {
    "folder": "the order of the files is that of read_folder, which promises none, or that of a set, which has none: sort the "
    "names",
    "steps": "dropout's masks depend on the number of the step, which goes on from the training before: npnet.set_seed "
    "begins at 0 again",
    "global": "random or np.random is drawn from without having been seeded",
    "npnet": "weights, order or dropout draw from npnet's own stream, which np.random.seed does not reach: npnet.set_seed "
    "seeds it, or give them rng=",
}


def check_training(seed, other):
    model = model_after(seed)
    assert isinstance(model, npnet.Sequential), f"return the model, not {type(model).__name__}"
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds == ["Dense", "Dropout", "Linear"], (
        f"the model has the layers {kinds}, expected those of careless_training: what is random stays, from the seed"
    )
    if not same_when_held(seed):
        for count in range(1, 5):
            for held in itertools.combinations(reasons, count):
                if same_when_held(seed, *held):
                    found = "; and ".join(reasons[each] for each in held)
                    raise AssertionError(
                        f"careful_training({seed}), called twice, gives different bits: {found}"
                    )
        raise AssertionError(
            f"careful_training({seed}), called twice, gives different bits: there is a generator without a seed, or the time"
        )
    one, two = (fingerprint(model_after(each).state_dict()) for each in (seed, other))
    assert one != two, (
        f"seeds {seed} and {other} give the same model: is a fixed number in the place of the seed?"
    )
    logits = model.eval().predict(patients.astype(np.float32))
    value = float(npnet.BCEWithLogits()(logits, diabetes.astype(np.float32)))
    assert value < 0.6, (
        f"the loss of all patients is {value:.3f} after the training: it has not learnt; are x and y in step?"
    )


check_training(1, 2)
### BEGIN HIDDEN TESTS
check_training(0, 123)
first_layers = {fingerprint({"w": model_after(seed).layers[0].weight.value}) for seed in (1, 2, 3)}
assert len(first_layers) == 3, "the first layer's weights do not depend on the seed"
### END HIDDEN TESTS
print("careful_training: the same bits for the same seed")

# %% [markdown]
# ### Question 3 (2 points)
#
# * A paper reports the accuracy of a method with seed 42, in an environment in which every bit can be reproduced. What does
#   the reader know, and what not? What should be reported?
# * Deterministic algorithms on a GPU can be much slower. Name one situation in which you would switch them on, and one in
#   which you would not.

# %% [markdown] nbgrader={"grade_id": "question_seeds", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# The reader can get the same number again, which shows that it was not invented, and helps to find mistakes. Whether the
# method is better is not known: the spread between seeds may be larger than the difference to the other method, and seed 42
# may be a lucky one (or chosen). To report: several seeds, fixed beforehand, mean and spread (or all values), for
# both methods with the same seeds; besides versions, machine and settings.
# On: when looking for a mistake that occurs in step 7000; when a change of the code should not change the result (tests, a new
# version of a library); when a training that was broken off has to end as if it had not been; when activations are
# recomputed by operations that would differ otherwise. Off: in long trainings whose result is judged over several seeds
# anyway, where time is what counts.
# ### END SOLUTION

# %% [markdown]
# ### PyTorch, for comparison
#
# The same list there, where PyTorch is installed. (`set_seed` of npnet does not know of PyTorch.)


# %% nbgrader={"grade_id": "compare_pytorch", "locked": true}
def set_seed_pytorch(seed):
    npnet.set_seed(seed)  # random, NumPy, PYTHONHASHSEED
    torch.manual_seed(seed)  # the CPU's generator
    torch.cuda.manual_seed_all(seed)  # every GPU's; without one, nothing
    torch.backends.cudnn.deterministic = True  # only algorithms with a fixed order of additions
    torch.backends.cudnn.benchmark = False  # no choosing among algorithms by measuring


try:
    import torch
except ImportError:
    print("PyTorch is not installed: comparison skipped.")
else:
    for _ in range(2):
        set_seed_pytorch(123)
        print(torch.nn.Linear(5, 1)(torch.ones(1, 5)).item())

# %% [markdown]
# ## What you have learnt
#
# * A process has many sources of random numbers. Each has to be seeded, before the first draw; hashes of strings before
#   Python starts.
# * A stream for each purpose and epoch, by (seed, purpose, epoch): then a change here does not change the numbers there, and
#   runs do not overlap.
# * "The same" means the same bits; a fingerprint of names, dtypes, shapes and bytes shows it, and can be written down.
# * Floating-point sums depend on their order. Threads, processor, library, batch size choose it, and no seed does.
# * Checkpointing recomputes the same operations in the same order: no bit changes. Accumulation adds in another order.
# * State that is left over (shared arrays, a count of steps) and what comes from outside (the order of files) is input, too.
# * Training can be chaotic: one bit may become another result. Reproduce one run to find mistakes; report several seeds.
#
# In npnet: `npnet.set_seed`, `rng=` everywhere, `npnet.random` (dropout by counter), `determinism_check=True` in
# `npnet.fit`, which compares each recomputation with what it recomputes.
#
# ## To read
#
# * D. Goldberg, "What every computer scientist should know about floating-point arithmetic", *ACM Computing Surveys*
#   23(1), 1991.
# * N. J. Higham, "The accuracy of floating point summation", *SIAM Journal on Scientific Computing* 14(4), 1993: orders
#   of summation, and what they do to the error.
# * J. Demmel and H. D. Nguyen, "Fast reproducible floating-point summation", *Proceedings of the 21st IEEE Symposium on
#   Computer Arithmetic*, 2013: sums with the same bits on any number of processors.
# * J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", *SC '11*, 2011:
#   generators that count (Philox).
# * P. Henderson, R. Islam, P. Bachman, J. Pineau, D. Precup and D. Meger, "Deep reinforcement learning that matters", *AAAI*,
#   2018, arXiv:1709.06560: what a seed can do to a result.
# * H. He and Thinking Machines Lab, "Defeating nondeterminism in LLM inference", *Connectionism*, 2025: products whose rows
#   do not depend on the rest of the batch.
# * X. Bouthillier, P. Delaunay, M. Bronzi et al., "Accounting for variance in machine learning benchmarks", *MLSys*, 2021.
