# %% [markdown]
# # Lab 8: The best schedule for a budget
#
# A machine has so many bytes, and training has to fit. Which activations should be kept, which computed
# again, and when, so that it fits and as little as possible is computed twice? "Every $\sqrt L$ layers" is
# one answer. It is not the best one.
#
# You will play the game by hand, find out how far a given memory reaches, write the dynamic program that
# finds the best schedule for any chain and any budget, and check it against a search through everything
# that can be done. In the end you will beat it.
#
# | part | you write | points |
# | --- | --- | --- |
# | 1 Where $\sqrt L$ comes from, and what beats it | a question | 2 |
# | 2 The game, played by hand | a schedule for 7 layers and 3 activations | 2 + 2 |
# | 3 Layers that are all alike | `longest_chain`, `fewest_forwards` | 3 + 3 |
# | 4 Layers of all sizes | `cheapest`: the dynamic program; `actions_of`: its schedule | 4 + 3 |
# | 5 A real network | nothing: you watch; a question | 2 |
# | 6 The challenge | a schedule that beats the dynamic program; a question | 2 + 1 + 2 + 2 |
#
# It takes a good hour. Write where it says `YOUR CODE HERE` or `YOUR ANSWER HERE`. Below each task is
# a cell of tests: run it, and it says what is wrong. (There are more tests when the lab is graded.)

# %% nbgrader={"grade_id": "setup", "locked": true}
import heapq
import math
from functools import cache
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

import npnet
from npnet import labs, measure_peak, plots, schedules
from npnet.memory import format_bytes
from npnet.optimal import Optimum
from npnet.pricing import Chain
from npnet.schedule import BACKWARD, DROP, FORWARD, InvalidSchedule, Schedule

# %% [markdown]
# ## 1 Where $\sqrt L$ comes from, and what beats it
#
# A chain of $L$ layers computes $a_1, \dots, a_L$ from the input $a_0$. The backward pass of layer $l$
# needs $a_{l-1}$ and $a_l$. Let all activations be of the same size, and all layers cost the same.
#
# Keep a checkpoint every $n$ layers. Then about $L/n$ checkpoints are held, and while one segment is
# worked on, the $n$ activations inside it:
#
# $$m(n) = \frac{L}{n} + n, \qquad m'(n) = 1 - \frac{L}{n^2} = 0 \quad\text{at}\quad n = \sqrt L,
# \qquad m(\sqrt L) = 2\sqrt L.$$
#
# The price is one more forward pass at most: each layer is run again once.
#
# **But why stop here?** A segment is itself a chain of $\sqrt L$ layers, of which all activations are held
# while it is worked on. It could have checkpoints of its own. With $k$ *levels*, each cutting its
# segments into $n$ smaller ones, $n^k = L$, so $n = L^{1/k}$. Each level holds $n$ activations, and each
# level but the last costs another forward pass:
#
# $$\text{held} = k\,L^{1/k}, \qquad \text{run again} = (k - 1)\,L \text{ layers}.$$

# %% nbgrader={"grade_id": "levels", "locked": true}
depth = 1000
print(f"{depth} layers\nlevels   activations held   forward passes more")
levels = range(1, 11)
for k in levels:
    print(f"{k:>6}{k * depth ** (1 / k):>19.1f}{k - 1:>22}")
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
ax.semilogy(levels, [k * depth ** (1 / k) for k in levels], "o-", label=r"$k\,L^{1/k}$")
ax.annotate(
    r"$\sqrt{L}$: one level of checkpoints",
    (2, 2 * depth**0.5),
    (2.6, 150),
    arrowprops={"arrowstyle": "->"},
)
ax.set(
    title=f"{depth} layers, checkpoints within checkpoints",
    xlabel="levels k",
    ylabel="activations held",
)
ax.legend()
plt.show()

# %% [markdown]
# ### Question 1 (2 points)
#
# For which $k$ is $k\,L^{1/k}$ least, and what is it then? Derive it (take the logarithm). How do memory
# and time grow with $L$ at that $k$? What do you conclude from the table about more levels than that?

# %% [markdown] nbgrader={"grade_id": "question_levels", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# $\ln(k L^{1/k}) = \ln k + \frac{\ln L}{k}$ has the derivative $\frac1k - \frac{\ln L}{k^2}$, which is zero at
# $k = \ln L$. There $L^{1/k} = e$, so $e \ln L$ activations are held, and $\ln L - 1$ more forward passes are
# run: memory grows like $\log L$, time like $L \log L$. For 1000 layers that is $k \approx 7$, with 19 activations
# and 6 more forward passes. More levels than that cost more time *and* more memory: never do that. With fewer,
# one is traded for the other; the first steps (1000 to 63 activations for one pass, 63 to 30 for another) gain the most.
# ### END SOLUTION

# %% [markdown]
# ## 2 The game, played by hand
#
# So a schedule is worth thinking about. Forget the segments: here are the rules of the whole game.
#
# | move | what it does | allowed when | costs |
# | --- | --- | --- | --- |
# | `F3` | compute $a_3$ from $a_2$, and hold it | $a_2$ is held, and $a_3$ is not | one forward |
# | `D3` | drop $a_3$ | $a_3$ is held | nothing |
# | `B3` | the backward pass of layer 3; then $a_3$ is dropped, too | $a_2$ and $a_3$ are held, and layer 4 is done | (once for each layer, whatever you do) |
#
# $a_0$ is always there, and is not counted. You win when `B1` is done. The first forward of each layer is
# for free; each further one is a *recomputed* forward. What counts is: at most so many activations held **at
# any moment**, and few recomputed forwards. At the moment of `F3`, both $a_2$ and $a_3$ are held.
#
# The helpers below are for all of the lab. `Costs` says what the layers cost: here one unit each, later
# bytes. `price` goes through a schedule and adds up, `play` shows what happens.


# %% nbgrader={"grade_id": "rules", "locked": true}
class Costs(NamedTuple):
    """What the layers of a chain cost. Lists with L + 1 entries; entry l belongs to layer l, entry 0 to the input."""

    activation: list  # A_l: bytes of a_l
    waiting: list  # R_l: bytes that wait at l while layers below are run again: a_l and the gradient there
    backward: list  # B_l: bytes that the backward pass of l takes besides a_{l-1}: a_l, gradients, workspace
    forward: list  # f_l: the time that layer l takes to run forward


def simple(activation, forward):
    """Costs of a chain of which only the activations count: no gradients, no workspace."""
    sizes = [0, *activation]
    return Costs(sizes, [*sizes[:-1], 0], list(sizes), [0, *forward])


def uniform(depth):
    """Every activation takes one unit, every layer one unit of time."""
    return simple([1] * depth, [1] * depth)


def schedule_of(moves, depth):
    """A schedule, from a text such as "F1 F2 D1", or from a list of pairs such as (FORWARD, 1)."""
    if isinstance(moves, str):
        kinds = {"F": FORWARD, "D": DROP, "B": BACKWARD}
        moves = moves.upper()
        for move in moves.split():
            known = move[0] in kinds and move[1:].isdigit()
            assert known, f"{move!r}: expected moves such as F3, D3, B3"
        moves = [(kinds[move[0]], int(move[1:])) for move in moves.split()]
    return Schedule(moves, depth, "yours")


def price(schedule, costs):
    """The most bytes held at any moment, and the time of all recomputed forwards."""
    held, gradient, most, seen, again = set(), 0, 0, set(), 0
    for kind, layer in schedule:
        alive = sum(costs.activation[each] for each in held) + gradient
        if kind is FORWARD:
            alive += costs.activation[layer]
            held.add(layer)
            again += costs.forward[layer] if layer in seen else 0
            seen.add(layer)
        else:
            held.remove(layer)
        if kind is BACKWARD:
            alive += costs.backward[layer] - costs.activation[layer] - gradient
            gradient = costs.waiting[layer - 1] - costs.activation[layer - 1]
        most = max(most, alive)
    return most, again


def play(moves, costs):
    """Show a schedule, and what it takes; or what is wrong with it."""
    try:
        schedule = schedule_of(moves, len(costs.activation) - 1)
    except InvalidSchedule as error:
        print("Not yet:", error)
        return
    most, again = price(schedule, costs)
    print(schedule.diagram())
    print(f"\nmost held at any moment: {most}; recomputed: {again}")


# %% [markdown]
# Four layers, with a checkpoint at $a_2$. (`F` is computed, `R` recomputed, `o` held, `B` used by a backward
# pass and then freed, `.` not in memory.)

# %% nbgrader={"grade_id": "look_at_game", "locked": true}
play("F1 F2 D1 F3 F4 B4 B3 F1 B2 B1", uniform(4))

# %% [markdown]
# ### Task 1: seven layers, three activations (2 + 2 points)
#
# Now you. The chain has **7 layers**, and at most **3 activations** may be held at any moment. A checkpoint
# every $n$ layers does not fit, whatever $n$: that takes 4. The classical algorithm, *revolve*, fits, with 11
# recomputed forwards. You can do with much less.
#
# * 2 points if your schedule is valid, wins, and never holds more than 3.
# * 2 more if no schedule recomputes less. (The test tells you how many suffice.)
#
# Write the moves into the text, and run the cell again and again; it tells which move fails. Two things to
# think about: which two activations does the way up leave behind, besides $a_7$? And when all is done above one
# of them, what does the game look like that remains?


# %% nbgrader={"grade_id": "by_hand", "solution": true}
### BEGIN SOLUTION
by_hand = """
    F1 F2 D1 F3 D2 F4 D3
    F5 F6 D5 F7 B7
    F5 B6 B5
    F1 F2 D1 F3 B4 B3
    F1 B2 B1
"""
### END SOLUTION
play(by_hand, uniform(7))


# %% nbgrader={"grade_id": "test_by_hand", "grade": true, "points": 2}
def checked(moves, depth, name):
    """The schedule; an AssertionError says which move is wrong, and why."""
    try:
        return schedule_of(moves, depth)
    except (InvalidSchedule, TypeError) as error:
        raise AssertionError(f"{name}: {error} (moves are counted from 0)") from None


def check_fits(moves, costs, budget, name):
    most, again = price(checked(moves, len(costs.activation) - 1, name), costs)
    assert most <= budget, f"{name}: at some moment {most} are held, and {budget} are allowed"
    return again


check_fits(by_hand, uniform(7), 3, "by_hand")
### BEGIN HIDDEN TESTS
assert price(schedule_of(by_hand, 7), uniform(7))[0] <= 3
### END HIDDEN TESTS
print("by_hand: it fits")


# %% nbgrader={"grade_id": "test_by_hand_fewest", "grade": true, "points": 2}
def search(costs, budget):
    """Try everything that the rules allow: the least time of recomputed forwards within the budget.

    A state is what is held, and which backward pass is next. Dijkstra's algorithm visits the states in the
    order of the time spent so far, so that the first one in which all is done is the best.
    """
    depth = len(costs.activation) - 1
    queue, done = [(0, frozenset([0]), depth)], set()
    while queue:
        spent, held, at = heapq.heappop(queue)
        if at == 0:
            return spent - sum(costs.forward)
        if (held, at) in done:
            continue
        done.add((held, at))
        used = sum(costs.activation[layer] for layer in held)
        gradient = costs.waiting[at] - costs.activation[at] if at < depth else 0
        for layer in range(1, at + 1):
            if layer in held:
                heapq.heappush(queue, (spent, held - {layer}, at))
            elif layer - 1 in held and used + costs.activation[layer] + gradient <= budget:
                heapq.heappush(queue, (spent + costs.forward[layer], held | {layer}, at))
        others = used - costs.activation[at]
        if {at - 1, at} <= held and others + costs.backward[at] <= budget:
            heapq.heappush(queue, (spent, held - {at}, at - 1))
    return math.inf


labs.check_calls(
    check_fits(by_hand, uniform(7), 3, "by_hand"),
    search(uniform(7), 3),
    "recomputed forwards",
    name="by_hand",
    mistakes={
        "nearly. On the way up there is room for two others besides a_7: leave another pair behind": 6,
        "you run up from a_0 for nearly every layer. Keep a checkpoint in the middle": 11,
    },
)
### BEGIN HIDDEN TESTS
assert price(schedule_of(by_hand, 7), uniform(7)) == (3, 5)
### END HIDDEN TESTS
print("by_hand: nothing recomputes less. Tried:", "everything that the rules allow.")

# %% [markdown]
# Here is the game as a picture. Look for the pattern, because it is the whole secret: there is a **first
# checkpoint** that the way up leaves behind. Then the part *above* it is a game of its own, with less memory,
# since the checkpoint takes some. When that is won, the part *below* is a game of its own, too.

# %% nbgrader={"grade_id": "look_at_by_hand", "locked": true}
figure, ax = plt.subplots(figsize=(7.5, 6.2), layout="constrained")
plots.plot_schedule(schedule_of(by_hand, 7), ax)
plt.show()

# %% [markdown]
# ## 3 Layers that are all alike
#
# In 1992 Griewank asked: with $c$ slots for checkpoints, how long a chain can be reversed if no layer is run
# again more than $r$ times? His rules are a little stricter than ours. The input takes **one of the slots**;
# and each layer is run once more right before its backward pass (for free: that forward and the backward pass
# count as one), so that only $a_{l-1}$ has to be there for it.
#
# Call the longest chain $\beta(c, r)$. Its schedule begins with a run from the input to the first checkpoint.
#
# * The part **above** the checkpoint is a chain of its own. The checkpoint is its input. The slot of our
#   input is taken, all others are free.
# * Then comes the part **below**. All slots are free for it again. But its layers have been run once
#   already, on the way to the checkpoint.
# * With $r = 0$, nothing may be run on the way: then the chain has one layer only.
# * With $c = 1$, there is no slot but the input's: for each layer we run up from the input. Layer 1 is run
#   most often: $L - 1$ times.
#
# ### Task 2: how far does a memory reach? (3 points)
#
# Write $\beta(c, r)$, by recursion or by a formula.


# %% nbgrader={"grade_id": "longest_chain", "solution": true}
def longest_chain(slots, repeats):
    """The most layers that `slots` checkpoints (the input's is one) reverse, each run again `repeats` times at most."""
    ### BEGIN SOLUTION
    if repeats == 0:
        return 1
    if slots == 1:
        return repeats + 1
    above = longest_chain(slots - 1, repeats)
    below = longest_chain(slots, repeats - 1)
    return above + below
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_longest_chain", "grade": true, "points": 3}
def longest_by_trying(slots, repeats):
    """Make schedules of more and more layers, and look how often each layer is run."""
    depth = 1
    while max(schedules.revolve(depth + 1, slots).forwards.values()) <= repeats + 1:
        depth += 1
    return depth


def check_longest_chain(slots, repeats, mistakes=()):
    with labs.told("longest_chain"):
        got = longest_chain(slots, repeats)
    name = f"longest_chain({slots}, {repeats})"
    labs.check_number(got, longest_by_trying(slots, repeats), name, mistakes=dict(mistakes))


base = "With one slot, the input's, layer 1 of L layers is run again L - 1 times. So how many may there be"
both = "The part below has all slots again: those of the part above are free when its turn comes"
once = "The part above has not been run yet when its turn comes: nothing is taken off its repeats"
for slots in (1, 2, 3):
    check_longest_chain(slots, 0)
check_longest_chain(1, 4, {base: 1})
check_longest_chain(3, 2, {base: 6, both: 8, once: 4})
check_longest_chain(2, 4, {base: 5, both: 9, once: 11})
### BEGIN HIDDEN TESTS
check_longest_chain(4, 3, {base: 20, both: 20, once: 8})
check_longest_chain(5, 2)
check_longest_chain(3, 5)
check_longest_chain(8, 1)
### END HIDDEN TESTS
print("longest_chain: right. 7 slots and 7 repeats:", f"{longest_chain(7, 7):,} layers")

# %% [markdown]
# The recurrence is Pascal's triangle: $\beta(c, r) = \binom{c+r}{c}$. Memory and time are in it alike. If both grow
# together, the chain grows *exponentially*: $c = r$ reverses about $4^c / \sqrt{\pi c}$ layers. That is the
# logarithm of part 1, at a much better price: for 1000 layers and 6 more forward passes, levels within levels hold
# 19 activations. Here 7 slots do, $\binom{7+6}{7} = 1716$: segments of *unequal* length use each slot all the time.
#
# How many forwards does it take in all? Any first checkpoint may be tried. That is a *dynamic program*: the
# best way to do the whole consists of the best ways to do its parts.
#
# ### Task 3: the fewest forwards (3 points)
#
# Let $t(n, c)$ be the fewest recomputed forwards for $n$ layers and $c$ slots, by Griewank's rules.
#
# * One layer: nothing, $t(1, c) = 0$.
# * One slot: up from the input each time, $(n-1) + (n-2) + \dots + 1$ forwards.
# * Else: run $k$ layers to the first checkpoint, which takes $k$ forwards; then the part above, of $n - k$
#   layers, then the part below, of $k$ layers. How many slots has each? Take the best $k$ of $1, \dots, n - 1$.
#
# Write it by recursion. `@cache` keeps the results, so that each $t(n, c)$ is worked out once: without it, 30
# layers would take forever.


# %% nbgrader={"grade_id": "fewest_forwards", "solution": true}
@cache
def fewest_forwards(layers, slots):
    """The fewest recomputed forwards with which `slots` checkpoints (the input's is one) reverse so many layers."""
    ### BEGIN SOLUTION
    if layers == 1:
        return 0
    if slots == 1:
        return layers * (layers - 1) // 2
    return min(
        k + fewest_forwards(layers - k, slots - 1) + fewest_forwards(k, slots)
        for k in range(1, layers)
    )
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_fewest_forwards", "grade": true, "points": 3}
### BEGIN HIDDEN TESTS
# From here on with the right longest_chain: a mistake costs its points once.
def longest_chain(slots, repeats):
    return math.comb(slots + repeats, slots)


### END HIDDEN TESTS
def check_fewest_forwards(layers, slots, mistakes=()):
    with labs.told("fewest_forwards"):
        got = fewest_forwards(layers, slots)
    right = schedules.revolve(layers, slots).extra_forwards
    name = f"fewest_forwards({layers}, {slots})"
    labs.check_number(got, right, name, mistakes=dict(mistakes))


free = "While the part above is done, its slots are one less: our input keeps one"
back = "The part below has all slots again: the checkpoint behind it is not needed any more"
less = "To the checkpoint behind layer k, k layers are run, not k - 1"
check_fewest_forwards(1, 3)
check_fewest_forwards(5, 1)
check_fewest_forwards(2, 2, {less: 0})
check_fewest_forwards(7, 3, {free: 6, less: 4})
check_fewest_forwards(12, 3, {free: 11, back: 23, less: 14})
### BEGIN HIDDEN TESTS
check_fewest_forwards(20, 4, {free: 19, back: 42, less: 25})
for slots in (1, 2, 3, 5, 8, 20):
    for layers in (1, 2, 3, 9, 17, 30):
        check_fewest_forwards(layers, slots)
### END HIDDEN TESTS
print("fewest_forwards: right. 50 layers and 7 slots:", fewest_forwards(50, 7))

# %% [markdown]
# Griewank and Walther found a formula for it, $t(n, c) = r\,n - \binom{c+r}{c+1}$ with the smallest $r$ for
# which $\beta(c, r) \ge n$. Their program *revolve* needs no table. Let us compare, with the same memory, with
# a checkpoint every $n$ layers. What is the same memory? We count what is really held, with `price`.

# %% nbgrader={"grade_id": "draw_uniform", "locked": true}
depth = 60
print("50 layers, 7 slots: by the formula", 3 * 50 - math.comb(7 + 3, 7 + 1), "with r = 3")
every = [price(schedules.every_nth(depth, n), uniform(depth)) for n in range(2, depth + 1)]
binomial = [price(schedules.revolve(depth, c), uniform(depth)) for c in range(1, 31)]
yours = [fewest_forwards(depth, c) for c in range(1, 31)]
assert yours == [again for _, again in binomial], "your fewest_forwards is not that of revolve"
figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
ax.plot(*zip(*every, strict=True), "s", color="#2aa084", label="every n")
ax.plot(*zip(*binomial, strict=True), "^-", color="#e8862e", label="revolve, your fewest_forwards")
for repeats in (1, 2, 3):
    ax.axhline(repeats * depth, color="#bbbbbb", linewidth=0.8, zorder=0)
    ax.text(
        34,
        repeats * depth,
        f"{repeats} more forward pass{'es' * (repeats > 1)}",
        va="bottom",
        ha="right",
        fontsize=8,
    )
ax.set(
    title=f"{depth} layers, all alike",
    xlabel="activations held at most",
    ylabel="recomputed forwards",
)
ax.set(xlim=(0, 35), ylim=(0, 5.5 * depth))
ax.legend()
plt.show()

# %% [markdown]
# Revolve goes where "every n" cannot: 60 layers with 5 activations. But where both fit, it is *worse*, and even
# with memory for everything it runs nearly every layer twice! That is the rule of the forward right before
# each backward pass. It was made for simulations, where a step can be reversed only while it is at hand. Our
# dense layers need only $a_{l-1}$ and $a_l$, and these may be *held*. So we need a finer program. And layers
# are not all alike.
#
# ## 4 Layers of all sizes
#
# Now the layers differ, in bytes and in time. All that counts for a training step is in four lists, which you
# have seen in `Costs`:
#
# | | bytes of | in a real network |
# | --- | --- | --- |
# | $A_l$ | $a_l$ | batch $\cdot$ width $\cdot$ 8 |
# | $R_l$ | what waits at $l$ while layers below it are run again: $a_l$ and the gradient at $a_l$ | $2 A_l$; and $R_L = 0$, since on the way up neither is there |
# | $B_l$ | the backward pass of layer $l$, besides $a_{l-1}$: $a_l$, the gradients at $a_l$ and $a_{l-1}$, that of the weights | |
# | $f_l$ | (time, not bytes) one forward of layer $l$ | $2 \cdot$ batch $\cdot$ inputs $\cdot$ outputs flops |
#
# **The problem $(s, t, m)$**: the gradient has arrived at $a_t$, and $a_t$ is there, waiting. Do the
# backward passes of layers $t, t-1, \dots, s$. The activation $a_{s-1}$ is held, *and somebody else
# pays for it*. For all the rest there are $m$ bytes, also for what waits at $t$. (A problem with $t = L$ is on the
# way up: neither $a_L$ nor a gradient is there yet, so nothing waits.) Let $T(s, t, m)$ be the least time of the forwards that it
# takes, infinite if it cannot be done.
#
# *One layer*, $s = t$. Its backward pass must fit, $B_s \le m$. Then the time is $0$: $a_s$ is there. Only on
# the way up, $s = L$, it has to be computed: $f_L$.
#
# *More layers*: the way from $a_{s-1}$ up leaves a **first checkpoint** $a_k$ behind, the lowest, $s \le k < t$.
#
# ```
#         a_{s-1}   s . . . . . . . . k   k+1 . . . . . . . . . t
#         held by   ----- run ------> a_k                      waits: R_t
#         others    <--- part below --->  <---- part above ---->
#                        (s, k, ?)             (k+1, t, ?)
# ```
#
# 1. *Run* layers $s, \dots, k$, and drop each activation as soon as the next is there. It takes
#    $f_s + \dots + f_k$. It must fit: while layer $l$ runs, $a_{l-1}$ and $a_l$ are held (but for $l = s$ the
#    input $a_{s-1}$ is not ours to pay), and $R_t$ waits.
# 2. *The part above* is the problem $(k+1, t, ?)$. Its input $a_k$ is held, and it is you who pays.
# 3. *The part below* is $(s, k, ?)$. The gradient has arrived at $a_k$, and $a_k$ is there, waiting. Who pays now?
#
# Here is a small chain to try things on, with what `T(1, 6, m)` should be for some budgets $m$.

# %% nbgrader={"grade_id": "small_chain", "locked": true}
small = Costs(
    activation=[0, 1, 5, 4, 4, 3, 1],
    waiting=[0, 2, 6, 5, 5, 6, 0],
    backward=[0, 2, 7, 8, 6, 7, 6],
    forward=[0, 7, 8, 2, 1, 3, 2],
)
for name, values in small._asdict().items():
    print(f"{name:<12}", *[f"{value:>3}" for value in values])


def by_npnet(costs, budget):
    """The least time of all forwards, as npnet's planner finds it."""
    sizes, depth = costs.activation, len(costs.activation) - 1
    gradient = [waits - size for waits, size in zip(costs.waiting[:-1], sizes, strict=False)] + [0]
    rest = [all_ - a - g for all_, a, g in zip(costs.backward, sizes, gradient, strict=True)]
    nothing = [0] * (depth + 1)
    chain = Chain(sizes, nothing, gradient, nothing, rest, nothing, True, costs.forward, nothing)
    return float(Optimum(chain, budget).costs[-1])


print("\nbudget      ", *[f"{budget:>5}" for budget in (12, 14, 16, 18, 20, 23)])
print("T(1, 6, m)  ", *[f"{by_npnet(small, budget):>5g}" for budget in (12, 14, 16, 18, 20, 23)])

# %% [markdown]
# ### Task 4: the dynamic program (4 points)
#
# Write `cheapest(costs, s, t, m, table)`: $T(s, t, m)$. The dictionary `table` is your memory: put
# `table[s, t, m] = (time, k)` there, with the best $k$ (`None` for one layer, or where it cannot be done), and look there first
# whether it is known already. Infinite is `math.inf`. The answer for the whole chain is then
# `cheapest(costs, 1, L, budget, {})`.


# %% nbgrader={"grade_id": "cheapest", "solution": true}
def cheapest(costs, s, t, m, table):
    """The least time of all forwards that the problem (s, t, m) takes; table[s, t, m] = (time, k)."""
    ### BEGIN SOLUTION
    size, waiting, backward, forward = costs
    last = len(size) - 1
    if (s, t, m) in table:
        return table[s, t, m][0]
    best, choice = math.inf, None
    if s == t:
        if backward[s] <= m:
            best = forward[s] if s == last else 0
    else:
        run = 0
        for k in range(s, t):
            input_size = size[k - 1] if k > s else 0
            if input_size + size[k] + waiting[t] > m:
                break  # layer k cannot be run, so nothing behind it can
            run += forward[k]
            above = cheapest(costs, k + 1, t, m - size[k], table)
            below = cheapest(costs, s, k, m, table)
            if run + above + below < best:
                best, choice = run + above + below, k
    table[s, t, m] = best, choice
    return best
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_cheapest", "grade": true, "points": 4}
### BEGIN HIDDEN TESTS
def fewest_forwards(layers, slots):
    return schedules.revolve(layers, slots).extra_forwards


### END HIDDEN TESTS
def check_cheapest(costs, budget, mistakes=()):
    table, depth = {}, len(costs.activation) - 1
    name = f"L = {depth}, A = {costs.activation[1:]}, budget {budget}: cheapest(costs, 1, {depth}, {budget}, {{}})"
    endless = False
    with labs.told("cheapest"), labs.unchanged(**costs._asdict()):
        try:
            got = cheapest(costs, 1, depth, budget, table)
        except RecursionError:
            endless = True
    assert not endless, (
        f"{name}: it calls itself without end. Are both parts shorter than s ... t? (s <= k < t)"
    )
    labs.check_number(got, by_npnet(costs, budget), name, mistakes=dict(mistakes))
    words = f"{name}: table[1, {depth}, {budget}] should be (time, k)"
    entry = table.get((1, depth, budget))
    as_asked = isinstance(entry, tuple) and len(entry) == 2 and entry[0] == got
    assert as_asked, f"{words}, and is {entry}"
    assert entry[1] is None or 1 <= entry[1] < depth, (
        f"{words}, with k from 1 to {depth - 1}; k is {entry[1]}"
    )
    assert depth == 1 or got == math.inf or entry[1] is not None, f"{words}; k is None"
    return table


leaf = "You run a layer again before its backward pass. But a_s is there, waiting; only on the way up it is not"
asked = "It must fit, too: the backward pass of the one layer, B_s <= m"
theirs = "The input a_{s-1} is not yours to pay: while layer s runs, only a_s and what waits count"
key = "The budget m belongs into the table's key: the same layers take another time with another budget"
unheard = "While layers are run, what waits at t takes memory, too: R_t; and so does a_{l-1}, but for a_{s-1}"
other = "The part above has A_k less: the checkpoint is a_k, not a_{k-1}"
off = "The run to the checkpoint a_k takes f_s + ... + f_k, with both ends"
unpaid = (
    "The part above has less memory: its input a_k is held meanwhile, and it is you who pays for it"
)
twice = "You pay for a_k twice in the part below: there it is what waits at k, and is in R_k and B_k already"

check_cheapest(simple([5], [3]), 5)
check_cheapest(simple([5], [3]), 4)  # infinite
check_cheapest(simple([2, 2], [3, 4]), 4, {leaf: 10})
check_cheapest(small, 18, {leaf: 52, unheard: 28, off: 10, unpaid: 23, twice: 38, other: 24})
check_cheapest(small, 14, {asked: 31, unheard: 41})
check_cheapest(small, 16, {theirs: 41, key: 44})
for budget in (6, 12, 20, 30):
    check_cheapest(small, budget)
for budget in (3, 4, 7):
    check_cheapest(uniform(7), budget)
with labs.counting(globals(), "cheapest") as calls:
    table = check_cheapest(uniform(12), 6)
many = f"cheapest is called {len(calls):,} times for {len(table)} problems: look into the table before you solve one"
assert len(calls) <= 25 * len(table), many
### BEGIN HIDDEN TESTS
sizes, waits = [0, 2, 6, 3, 3, 4, 6, 3], [0, 3, 9, 6, 5, 5, 7, 0]
larger = Costs(sizes, waits, [0, 5, 10, 10, 10, 9, 9, 6], [0, 9, 9, 9, 1, 3, 8, 2])
check_cheapest(larger, 24, {leaf: 89, unheard: 46, off: 11, unpaid: 41, twice: 51})
rng = np.random.default_rng(8)
for _ in range(40):
    depth = int(rng.integers(1, 9))
    random = simple(rng.integers(1, 5, depth).tolist(), rng.integers(1, 9, depth).tolist())
    for (s, t, m), (time, k) in check_cheapest(random, int(rng.integers(3, 16))).items():
        if k is not None:
            parts = (
                cheapest(random, k + 1, t, m - random.activation[k], {}),
                cheapest(random, s, k, m, {}),
            )
            words = f"table[{s}, {t}, {m}]: with k = {k} it takes another time than {time}"
            assert time == sum(random.forward[s : k + 1]) + sum(parts), words
### END HIDDEN TESTS
print("cheapest: right")

# %% [markdown]
# How many problems are there? At most $L^2/2$ pairs, times the different values of $m$, each with up to $L$
# choices: $O(L^3)$ times the number of values. All values of $m$ are the budget less sums of $A_l$. So only
# multiples of the greatest common divisor of the $A_l$ matter, and the table is **exact**: no byte is rounded.
#
# ### Task 5: from the table to the schedule (3 points)
#
# The table tells the least time, and for each problem the $k$ that reaches it. Write
# `actions_of(costs, s, t, m, table)`: the list of actions that solves the problem $(s, t, m)$, as pairs
# such as `(FORWARD, 3)`, `(DROP, 3)`, `(BACKWARD, 3)`.
#
# * One layer: its backward pass; on the way up, run it before.
# * More: run layers $s, \dots, k$, dropping each activation but $a_{s-1}$ (not yours) and $a_k$ (the checkpoint)
#   once the next is there; then the actions of the part above; then those of the part below, with the same
#   budgets as in task 4. A backward pass frees its $a_l$ itself: no drop for that.


# %% nbgrader={"grade_id": "actions_of", "solution": true}
def actions_of(costs, s, t, m, table):
    """The list of actions that solves the problem (s, t, m), which `cheapest` has solved in `table`."""
    k = table[s, t, m][1]
    ### BEGIN SOLUTION
    last = len(costs.activation) - 1
    if s == t:
        first = [(FORWARD, s)] if s == last else []
        return [*first, (BACKWARD, s)]
    run = [(FORWARD, s)]
    for layer in range(s + 1, k + 1):
        run += [(FORWARD, layer), (DROP, layer - 1)]
    above = actions_of(costs, k + 1, t, m - costs.activation[k], table)
    below = actions_of(costs, s, k, m, table)
    return run + above + below
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_actions_of", "grade": true, "points": 3}
### BEGIN HIDDEN TESTS
# From here on with the right cheapest: a mistake costs its points once.
def cheapest(costs, s, t, m, table):
    if (s, t, m) not in table:
        best = math.inf, None
        if s == t:
            best = (
                (costs.forward[s] * (t == len(costs.activation) - 1), None)
                if costs.backward[s] <= m
                else best
            )
        for k in range(s, t):
            if (
                costs.activation[k] + (costs.activation[k - 1] if k > s else 0) + costs.waiting[t]
                > m
            ):
                break
            time = sum(costs.forward[s : k + 1]) + cheapest(costs, s, k, m, table)
            time += cheapest(costs, k + 1, t, m - costs.activation[k], table)
            best = (time, k) if time < best[0] else best
        table[s, t, m] = best
    return table[s, t, m][0]


### END HIDDEN TESTS
def best_schedule(costs, budget, name="yours"):
    """The schedule that `cheapest` and `actions_of` find for the budget, or None."""
    table, depth = {}, len(costs.activation) - 1
    if cheapest(costs, 1, depth, budget, table) == math.inf:
        return None
    return Schedule(actions_of(costs, 1, depth, budget, table), depth, name)


def check_actions_of(costs, budget):
    table, depth = {}, len(costs.activation) - 1
    promised = cheapest(costs, 1, depth, budget, table) - sum(costs.forward)
    name = f"L = {depth}, A = {costs.activation[1:]}, budget {budget}"
    with labs.told("actions_of"):
        actions = actions_of(costs, 1, depth, budget, table)
    assert isinstance(actions, list), (
        f"{name}: expected a list of actions, got {type(actions).__name__}"
    )
    backwards = [layer for kind, layer in actions if kind is BACKWARD]
    hint = ""
    if backwards != sorted(backwards, reverse=True):
        hint = ". The part above comes before the part below: the gradient comes from above"
    elif (FORWARD, depth) not in actions:
        hint = (
            f". On the way up, a_{depth} is not there: run layer {depth} before its backward pass"
        )
    try:
        schedule = Schedule(actions, depth)
    except InvalidSchedule as error:
        if "not held" in str(error) and not hint:
            hint = ". Do you drop what is not yours? Of the way up, a_k stays, and so does a_{s-1}"
        if "is held already" in str(error):
            hint = ". Did you drop it on the way up? Only a_k stays"
        raise AssertionError(f"{name}: {error}{hint}") from None
    most, again = price(schedule, costs)
    words = f"{name}: at some moment {most} bytes are held: which activation do you not drop"
    assert most <= budget, words
    labs.check_number(
        again,
        promised,
        f"{name}: the time of recomputed forwards (the table's is said to be right)",
    )


check_actions_of(simple([5], [3]), 5)
for budget in (2, 3):
    check_actions_of(uniform(2), budget)
for budget in (3, 4, 7):
    check_actions_of(uniform(7), budget)
for budget in (16, 18, 30):
    check_actions_of(small, budget)
### BEGIN HIDDEN TESTS
sizes, waits = [0, 2, 6, 3, 3, 4, 6, 3], [0, 3, 9, 6, 5, 5, 7, 0]
check_actions_of(Costs(sizes, waits, [0, 5, 10, 10, 10, 9, 9, 6], [0, 9, 9, 9, 1, 3, 8, 2]), 24)
check_actions_of(uniform(20), 5)
### END HIDDEN TESTS
print("actions_of: right. Seven layers, three activations, as your program plays them:")
print(best_schedule(uniform(7), 3))

# %% [markdown]
# Now your program against the others, on 30 equal layers:

# %% nbgrader={"grade_id": "draw_three", "locked": true}
depth, table = 30, {}
budgets = range(3, depth + 1)
optimal = [cheapest(uniform(depth), 1, depth, m, table) - depth for m in budgets]
every = [price(schedules.every_nth(depth, n), uniform(depth)) for n in range(2, depth + 1)]
binomial = [price(schedules.revolve(depth, c), uniform(depth)) for c in range(1, depth + 1)]
figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
ax.plot(*zip(*every, strict=True), "s", color="#2aa084", label="every n")
ax.plot(*zip(*binomial, strict=True), "^", color="#e8862e", label="revolve")
ax.plot(budgets, optimal, "o-", color="#3b6ea5", markersize=3.5, label="yours")
ax.set(
    title=f"{depth} layers, all alike",
    xlabel="activations held at most",
    ylabel="recomputed forwards",
)
ax.set(xlim=(0, depth + 1), ylim=(-6, 200))
ax.legend()
plt.show()
most = {"revolve": dict(binomial), "every n": {}, "yours": dict(zip(budgets, optimal, strict=True))}
for held, again in every:
    most["every n"][held] = min(again, most["every n"].get(held, math.inf))
print("activations ", *[f"{m:>4}" for m in range(3, 17)])
for name, found in most.items():
    print(f"{name:<12}", *[f"{found.get(m, '-'):>4}" for m in range(3, 17)])
print(f"problems solved for all {len(budgets)} budgets together: {len(table):,}")

# %% [markdown]
# Where there is memory for all, it recomputes nothing. From 4 activations on, nobody needs less; only some of "every n"
# are as good. But look at the **left end**: with 3 activations, revolve takes 126 forwards, and your "best" schedule 183!
#
# ### Is it really the best?
#
# Something is better at times, then. You have seen `search`, which tries everything that the rules allow. It knows no recursion, no checkpoints
# and no parts. Let it have a go at random chains of up to 7 layers, with random budgets.

# %% nbgrader={"grade_id": "compare_with_search", "locked": true}
rng = np.random.default_rng(1)
tally = {
    "both alike": 0,
    "neither finds a schedule": 0,
    "search finds one, yours does not": 0,
    "search is cheaper": 0,
}
for _ in range(20 if labs.grading() else 250):
    depth = int(rng.integers(3, 8))
    random = simple(rng.integers(1, 5, depth).tolist(), rng.integers(1, 7, depth).tolist())
    budget = int(rng.integers(max(random.activation) + 1, sum(random.activation) + 1))
    mine, least = (
        cheapest(random, 1, depth, budget, {}) - sum(random.forward),
        search(random, budget),
    )
    assert mine >= least, "the search tries everything, so nothing can be cheaper"
    if mine == least:
        tally["both alike" if least < math.inf else "neither finds a schedule"] += 1
    else:
        tally["search is cheaper" if mine < math.inf else "search finds one, yours does not"] += 1
for words, count in tally.items():
    print(f"{count:>4}  {words}")

# %% [markdown]
# Mostly both are alike. But at times the search is cheaper, or finds a schedule where your program finds none!
# Your program is not wrong: the test compared it with npnet's, which is proven. But *what* is proven has an
# adjective in it: optimal among **memory-persistent** schedules, in which a checkpoint, once kept, stays until its
# own backward pass is done. Revolve is not like that: it drops $a_k$ when all above it is done, before its own
# backward pass, and so has more room below. With very little memory that is worth the time to compute $a_k$ again.
# Remember that: in part 6 you will make use of it.
#
# ## 5 A real network
#
# An autoencoder for MNIST: 784 pixels are squeezed through 64 numbers, and restored. Its layers are of very
# different sizes. `npnet.plan` knows what each layer costs, to the byte; we put that into `Costs`.

# %% nbgrader={"grade_id": "real_network", "locked": true}
widths = [784, 512, 512, 256, 256, 128, 128, 64, 64, 128, 128, 256, 256, 512, 512, 784]
batch = 1024
network = npnet.Network(widths, rng=0)
plain = npnet.plan(network, batch)
chain = plain.chain
fixed = chain.fixed  # the parameters: they are always there
sizes, depth = list(chain.activation), chain.depth
first_gradient = max(chain.loss_bytes, chain.gradient[-1] + chain.backward_bytes[-1])  # by the loss
others = [
    *map(sum, zip(chain.gradient[:-1], chain.backward_bytes[:-1], strict=True)),
    first_gradient,
]
real = Costs(
    sizes,
    [*map(sum, zip(sizes[:-1], chain.gradient[:-1], strict=True)), 0],
    list(map(sum, zip(sizes, others, strict=True))),
    list(chain.forward_flops),
)
print(f"batch {batch}, float64; parameters {format_bytes(fixed)}\n")
print("layer   weights      output (a_l)      A_l        R_l        B_l       forward")
for number in range(1, depth + 1):
    weights, output = f"{widths[number]}x{widths[number - 1]}", f"({batch}, {widths[number]})"
    numbers = [format_bytes(each[number]) for each in real[:3]]
    print(
        f"{number:>3}     {weights:<12} {output:<13}" + "".join(f"{each:>11}" for each in numbers),
        end="",
    )
    print(f"{real.forward[number] / 1e6:>9.0f} Mflop")
print(
    f"\na plain step takes {format_bytes(price(schedules.none(depth), real)[0])} besides the parameters"
)
assert price(schedules.none(depth), real)[0] + fixed == plain.peak_bytes

# %% [markdown]
# The middle is small and quick, the ends are large and slow. Now the best schedules for all budgets, from one
# table. We compare with `npnet.plan` at some of them, and draw the **trade-off curve**: `plot_tradeoff` does it
# for the network, and your points go on top.

# %% nbgrader={"grade_id": "draw_tradeoff", "locked": true}
curve = npnet.tradeoff(network, batch)
step, table, points = chain.step_flops, {}, []
lowest, highest = curve.optimal[0].peak_bytes - fixed, plain.peak_bytes - fixed
count = 4 if labs.grading() else 24
for budget in np.linspace(lowest, highest, count).astype(int).tolist():
    again = cheapest(real, 1, depth, budget, table) - sum(real.forward)
    assert again == npnet.plan(network, batch, memory_budget=budget + fixed).recompute_flops
    points.append((budget + fixed, again / step))
print(f"{len(points)} budgets: you and npnet.plan agree at all of them, to the flop.")
figure, ax = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
plots.plot_tradeoff(curve, points, ax)
ax.get_legend().get_texts()[-1].set_text("yours")
plt.show()
one_less = npnet.plan(network, batch, every_nth=2)
same = npnet.plan(network, batch, memory_budget=one_less.peak_bytes)
print(f"every 2: {format_bytes(one_less.peak_bytes)}, {one_less.overhead:.1%} more flops;", end=" ")
print(f"the best schedule of that size: {same.overhead:.1%} more")

# %% [markdown]
# How to read it: the grey strip at the left is where **no** memory-persistent schedule fits. The curve is a
# staircase: between two steps, more memory buys nothing. And a point of another strategy above the curve is
# time wasted: straight below it is a schedule that is as small and recomputes less.
#
# Now choose a budget yourself. The slider goes from the least memory there is to that of plain training. Watch
# which activations the way up leaves behind, and where the peak is.

# %% nbgrader={"grade_id": "slide_budget", "locked": true}
megabytes = np.linspace(lowest + fixed, highest + fixed, 12)
megabytes = [math.ceil(budget / 1e5) / 10 for budget in megabytes]


def timeline(budget):
    figure = plt.Figure(figsize=(8, 3.8), layout="constrained")
    chosen = npnet.plan(network, batch, memory_budget=int(budget * 1e6))
    return plots.plot_timeline(chosen, ax=figure.add_subplot())


labs.slider(timeline, megabytes, "budget (MB)", value=megabytes[3])

# %% [markdown]
# And the same schedule, played action by action: above, what is in memory; below, the bytes alive until then. (It
# takes some seconds to draw.)

# %% nbgrader={"grade_id": "animate", "locked": true}
chosen = npnet.plan(network, batch, memory_budget=int(megabytes[3] * 1e6))


def still():
    figure = plt.Figure(figsize=(7.5, 7), layout="constrained")
    return plots.plot_schedule(chosen.schedule, figure.add_subplot())


labs.play(lambda: plots.animate_schedule(chosen, interval=500), still)

# %% [markdown]
# Is it true, too? We run a training step by *your* schedule, measure each byte that is allocated, and compare
# the network with one that was trained plainly.

# %% nbgrader={"grade_id": "run_it", "locked": true}
x = np.random.default_rng(2).random((batch, widths[0]))
schedule = best_schedule(real, chosen.memory_budget - fixed)
networks = {"plain": None, "yours": schedule}
for name, each in networks.items():
    networks[name] = trained = npnet.NetworkWithCheckpointing(
        widths, schedule=each or "none", rng=0
    )
    predicted = price(each or schedules.none(depth), real)[0]
    measured = measure_peak(trained.update_mini_batch, (x, x), 0.1).increase_bytes
    print(f"{name:>6}: predicted {format_bytes(predicted)}, measured {format_bytes(measured)}")
assert all(map(np.array_equal, networks["plain"].weights, networks["yours"].weights))
print("After the step, all weights are the same, bit for bit.")

# %% [markdown]
# The list can also be *recorded*. `npnet.CapturedStep` runs a step once on stand-ins, notes each NumPy call, and packs
# all arrays into one block of memory, the arena: two arrays share a place if they never live at the same time. Then
# it is your schedule that decides how large the arena has to be.

# %% nbgrader={"grade_id": "capture_it", "locked": true}
model = npnet.mlp(widths, "sigmoid", rng=0, dtype=np.float64)
for name, each in {"plain": "none", "yours": schedule}.items():
    captured = npnet.CapturedStep(model, npnet.MeanSquaredError(), npnet.SGD(0.1), each)
    captured(x, x)
    print(
        f"{name:>6}: an arena of {format_bytes(captured.arena_bytes)}, {captured.calls} NumPy calls"
    )

# %% [markdown]
# ### Question 2 (2 points)
#
# Look at the trade-off curve, the table of costs, and the timeline.
#
# * The first quarter of the memory that can be saved costs hardly any time, the last quarter a lot. Which layers
#   are recomputed first, and why these?
# * What is alive at the peak of the smallest schedule (move the slider to the left)? Why can no schedule go below
#   it, and what could be changed (not the schedule) to get there?

# %% [markdown] nbgrader={"grade_id": "question_curve", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# First recomputed is what has many bytes for little time, a large $A_l / f_l$. A layer's activation grows with its
# outputs, its time with inputs times outputs, so bytes per flop go like $1/\text{inputs}$: layers 7, 8 and 9 in the narrow
# middle come first, then 11 and 13, which make a wide activation from a narrower one. The last quarter means to run
# wide layers again, two times and more, and these are nearly all of the flops. At the peak of the smallest schedule
# there is the backward pass of layer 15, and of all activations only its own $a_{14}$ and $a_{15}$ are left; the rest are
# the loss, the gradients at $a_{15}$ and $a_{14}$, and that of the weights. Every schedule has to make this backward pass, so
# the greatest $A_{l-1} + B_l$ is a bound. A smaller batch with gradient accumulation, half precision, or a narrower
# layer lowers it.
# ### END SOLUTION

# %% [markdown]
# ## 6 The challenge: beat the dynamic program
#
# A chain of 9 layers, an encoder: the first activations are large, the later ones small. The sizes are in MB,
# the times in ms. Everything takes 27 MB. **You have 14.**

# %% nbgrader={"grade_id": "look_at_challenge", "locked": true}
encoder = simple([8, 6, 3, 2, 1, 1, 3, 1, 2], forward=[2, 2, 3, 9, 6, 2, 6, 3, 3])
encoder_budget = 14
print("layer    ", *[f"{layer:>3}" for layer in range(1, 10)])
print(
    "A_l (MB) ",
    *[f"{size:>3}" for size in encoder.activation[1:]],
    f"  in all {sum(encoder.activation)}",
)
print(
    "f_l (ms) ",
    *[f"{time:>3}" for time in encoder.forward[1:]],
    f"  in all {sum(encoder.forward)}\n",
)
for n in range(1, 10):
    most, again = price(schedules.every_nth(9, n), encoder)
    print(
        f"every {n}: {most:>3} MB, recomputed {again:>3} ms",
        "" if most > encoder_budget else "  fits",
    )

# %% [markdown]
# ### Task 6 (2 + 1 + 2 points)
#
# Hand in a schedule for `encoder`, as a text such as `"F1 F2 D1 ..."` or as a list of actions, found in
# any way you like: by hand, by your programs, by a new program.
#
# * 2 points if it fits into 14 MB, and recomputes less than the best "every n" that does.
# * 1 more if it recomputes no more than the best memory-persistent schedule, that of your dynamic program.
# * 2 more if it recomputes **less** than that.
#
# Begin with `play(best_schedule(encoder, encoder_budget), encoder)`, or as a picture,
# `plots.plot_schedule(best_schedule(encoder, encoder_budget)).figure`.
# Which layers does it run again, and *for what* does it run them? Is there a checkpoint that it would like to
# keep for a while, but cannot, because it would be in the way later? Nobody says that you must keep it. Or let
# `search` tell how it got there.


# %% nbgrader={"grade_id": "challenge", "solution": true}
### BEGIN SOLUTION
# a_3 is kept for backward 4, and dropped before layers 1 and 2 are run again: these take all 14 MB.
challenge = """
    F1 F2 D1 F3 D2 F4 F5 F6 F7 F8 F9 B9 B8 B7 B6 B5 B4
    D3 F1 F2 D1 F3 B3
    F1 B2 B1
"""
### END SOLUTION
play(challenge, encoder)

# %% nbgrader={"grade_id": "test_challenge", "grade": true, "points": 2}
again = check_fits(challenge, encoder, encoder_budget, "challenge")
assert again < 17, (
    f"challenge: it fits, and recomputes {again} ms. Every 2 fits, too, and recomputes 17"
)
### BEGIN HIDDEN TESTS
assert price(checked(challenge, 9, "challenge"), encoder)[1] < 17
### END HIDDEN TESTS
print(f"challenge: it fits, and recomputes {again} ms, less than every n")

# %% nbgrader={"grade_id": "test_challenge_optimal", "grade": true, "points": 1}
again = check_fits(challenge, encoder, encoder_budget, "challenge")
planned = by_npnet(encoder, encoder_budget) - sum(encoder.forward)
assert again <= planned, (
    f"challenge: it recomputes {again} ms; the best memory-persistent schedule {planned:g}"
)
### BEGIN HIDDEN TESTS
assert price(checked(challenge, 9, "challenge"), encoder)[1] <= 11
### END HIDDEN TESTS
print(f"challenge: it recomputes {again} ms; the best memory-persistent schedule {planned:g}")

# %% nbgrader={"grade_id": "test_challenge_beyond", "grade": true, "points": 2}
again = check_fits(challenge, encoder, encoder_budget, "challenge")
planned = by_npnet(encoder, encoder_budget) - sum(encoder.forward)
words = "drop a checkpoint before its own backward pass, when it is in the way, and compute it again later"
assert again < planned, (
    f"challenge: {again} ms is what the dynamic program takes; to do with less, {words}"
)
### BEGIN HIDDEN TESTS
assert price(checked(challenge, 9, "challenge"), encoder)[1] < 11
### END HIDDEN TESTS
print(
    f"challenge: it recomputes {again} ms, and beats the dynamic program, which takes {planned:g}."
)
print(f"Nothing at all takes less than {search(encoder, encoder_budget)} ms.")

# %% [markdown]
# ### Question 3 (2 points)
#
# * Why can the dynamic program of part 4 not find this schedule? Point at the term of the recurrence that forbids it.
# * Why does one search among memory-persistent schedules all the same? Compare the number of states of `search`
#   with the number of problems $(s, t, m)$, for 50 layers.

# %% [markdown] nbgrader={"grade_id": "question_persistent", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# In $T(k+1, t, m - A_k) + T(s, k, m)$, the checkpoint $a_k$ is charged during the whole part above, and waits, in $R_k$,
# during the whole part below until its own backward pass. The better schedule keeps $a_3$ through the part above, drops
# it right after, when layers 1 and 2 need all the memory ($8 + 6 = 14$), and makes it a second time. For the recurrence that is not
# a way to solve $(1, 3, 14)$, because there $a_3$ is there from the beginning and $R_3 = 3$ stays: $8 + 6 + 3 > 14$.
# So it keeps no $a_3$, and takes other, more expensive checkpoints. What could be held is any subset of the activations:
# $2^{50} \cdot 50$ states for 50 layers. The persistent ones have a structure: what is held is described by the interval and by the
# memory that is left: at most $50^2/2$ intervals times some thousand values of $m$. So the program ends in a second, the
# result is proven within its class; something better is rare where memory is not very tight. (And where the gradients
# count, as in real networks, it is rarer still that nothing persistent fits.)
# ### END SOLUTION

# %% [markdown]
# ## What you have learnt
#
# * Every $\sqrt L$ layers is the best *single* level of equal checkpoints. With levels within levels, memory grows
#   like $\log L$, time like $L \log L$.
# * $c$ slots and $r$ repeats reverse $\binom{c+r}{c}$ equal layers: revolve. Where the output of a layer suffices for its
#   backward pass, one can mostly do with less than revolve.
# * The best schedule consists of the best schedules of its two parts: the one above the first checkpoint, which pays for
#   it, and the one below, for which it waits. That is a dynamic program, exact to the byte.
# * From one table come the least memory, the whole trade-off curve, and each schedule on it.
# * What is large and quick to compute is recomputed first. A single layer's backward pass bounds the memory from below.
# * "Optimal" comes with a class. In a larger class, there can be something better; at a price for finding it.
#
# `npnet.plan(network, batch, memory_budget="20 MB")` is your program, with arrays in place of the dictionary, and for layers that
# save more than their output (dropout masks, GELU), where keeping *all that a layer saves* is a third choice. It is in
# `npnet/optimal.py`, in 200 lines. `NetworkWithCheckpointing(sizes, memory_budget="20 MB")` trains by it.
#
# ## To read
#
# * A. Griewank, "Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
#   differentiation", *Optimization Methods and Software* 1(1), 1992: part 3, and where it all began.
# * A. Griewank and A. Walther, "Algorithm 799: revolve: an implementation of checkpointing for the reverse
#   or adjoint mode of computational differentiation", *ACM Transactions on Mathematical Software* 26(1), 2000.
# * T. Chen, B. Xu, C. Zhang and C. Guestrin, "Training deep nets with sublinear memory cost", 2016,
#   arXiv:1604.06174: part 1, levels within levels included.
# * O. Beaumont, L. Eyraud-Dubois, J. Herrmann, A. Joly and A. Shilova, "Optimal checkpointing for heterogeneous chains:
#   how to train deep neural networks with limited memory", 2019, arXiv:1911.13214: part 4, and memory persistence.
# * P. Jain, A. Jain, A. Nrusimha, A. Gholami, P. Abbeel, K. Keutzer, I. Stoica and J. E. Gonzalez, "Checkmate: breaking the
#   memory wall with optimal tensor rematerialization", *MLSys*, 2020, arXiv:1910.02653: any graph, as an integer program.
