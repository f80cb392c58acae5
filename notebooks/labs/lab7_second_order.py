# %% [markdown]
# # Lab 7: Second order
#
# The gradient says which way is down. It does not say how far: that depends on how fast the slope
# changes, on the *curvature*. All curvatures together are the **Hessian** $H$, the matrix of second
# derivatives of the loss, and for $n$ parameters it has $n^2$ numbers: for the small MNIST network of lab 1 that is nearly 6 GB, for
# a large language model more than all the memory there is.
#
# Nobody needs them. What one needs is $Hv$, the derivative of the gradient in one direction $v$; and
# that costs about as much as two gradients, takes no more than a few times their memory, and works under every checkpointing schedule. You
# will derive it by hand, and build two methods on it: a step that uses the gradient of the gradient, and Newton's.
#
# | part | you write | points |
# | --- | --- | --- |
# | 1 A Hessian that fits on a line | `gradient_and_hessian` | 3 |
# | 2 The gradient of the gradient | `hvp_by_differences`, `tangent_forward`, `hvp` | 2 + 2 + 4 |
# | 3 A step with curvature | `curvature_step`, `shrink_factor`; a question | 3 + 2 + 2 |
# | 4 Newton's view | `newton_direction`; a question | 5 + 2 |
# | 5 What it costs | nothing: you watch; a question | 2 |
#
# It takes an hour, or a little more. Write where it says `YOUR CODE HERE` or `YOUR ANSWER HERE`. Below each task is
# a cell of tests: run it, and it says what is wrong. (There are more tests when the lab is graded.)

# %% nbgrader={"grade_id": "setup", "locked": true}
import matplotlib.pyplot as plt
import numpy as np

import npnet
from npnet import MeanSquaredError, labs, measure_peak, plots
from npnet.curvature import flatten, unflatten
from npnet.memory import format_bytes

plt.rcParams["figure.dpi"] = 75
x, y = npnet.make_linear(200, noise=0.2, low=-1, high=3, rng=0)
print(f"x: {x.shape}, y: {y.shape}, {x.dtype}; y = 2 x + 3, and noise with standard deviation 0.2")

# %% [markdown]
# ## 1 A Hessian that fits on a line
#
# We fit a straight line $\hat y = w x + b$ to $N$ points near $y = 2x + 3$. The loss is the mean of the squared
# differences,
#
# $$L(w, b) = \frac1N \sum_i (w x_i + b - y_i)^2.$$
#
# With $\theta = (w, b)$ the gradient and the Hessian are
#
# $$g = \begin{pmatrix} \partial L/\partial w \\ \partial L/\partial b \end{pmatrix}, \qquad
# H = \begin{pmatrix} \partial^2 L/\partial w^2 & \partial^2 L/\partial w\,\partial b \\
# \partial^2 L/\partial b\,\partial w & \partial^2 L/\partial b^2 \end{pmatrix}.$$
#
# ### Task 1: derive both by hand (3 points)
#
# Write `gradient_and_hessian(w, b, x, y)`, with `w` and `b` two numbers, `x` and `y` arrays of the shape (N, 1). It
# returns $g$, an array of the shape (2,), and $H$, an array of the shape (2, 2).


# %% nbgrader={"grade_id": "gradient_and_hessian", "solution": true}
def gradient_and_hessian(w, b, x, y):
    """g (2,) and H (2, 2) of the mean squared error of the line w x + b."""
    ### BEGIN SOLUTION
    error = w * x + b - y  # (N, 1)
    g = 2 * np.array([(error * x).mean(), error.mean()])
    h = 2 * np.array([[(x * x).mean(), x.mean()], [x.mean(), 1.0]])
    return g, h
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_gradient_and_hessian", "grade": true, "points": 3}
def line(w, b):
    """The line as a layer of npnet."""
    layer = npnet.Linear(1, 1, dtype=np.float64)
    layer.weight.value[:], layer.bias.value[:] = w, b
    return layer


def check_line(w, b, x, y):
    with labs.unchanged(x=x, y=y), labs.told("gradient_and_hessian"):
        answer = gradient_and_hessian(w, b, x, y)
    assert isinstance(answer, tuple), "gradient_and_hessian: return g and H, with a comma between"
    assert len(answer) == 2, f"gradient_and_hessian: return g and H, not {len(answer)} things"
    model, loss = line(w, b), MeanSquaredError()
    right_g = flatten(npnet.value_and_grad(model, loss, x, y)[1])
    right_h = npnet.hessian(model, loss, x, y)
    half = "the factor 2 from the square is missing"
    swapped = "it is in the order (b, w): w comes first"
    labs.check_array(
        answer[0], right_g, "g", batch=len(x), mistakes={half: right_g / 2, swapped: right_g[::-1]}
    )
    mistakes = {
        half: right_h / 2,
        "the mixed derivatives are missing: the slope along w depends on b": np.diag(
            np.diag(right_h)
        ),
        swapped: right_h[::-1, ::-1],
        "this is g times its transpose: the Hessian is the derivative of g, not its square": np.outer(
            right_g, right_g
        ),
    }
    labs.check_array(answer[1], right_h, "H", batch=len(x), mistakes=mistakes)


check_line(0.5, -1.0, x, y)
check_line(2.0, 3.0, x[:3], y[:3])
### BEGIN HIDDEN TESTS
check_line(0.0, 0.0, x[:50] - 4, y[:50])
check_line(-7.0, 2.0, 10 * x, y)
### END HIDDEN TESTS
print("gradient_and_hessian: right")

# %% [markdown]
# The loss is a paraboloid, and its Hessian is the same everywhere. Its eigenvectors are the axes of the ellipses
# around the minimum; along each of them the loss is a parabola, and the eigenvalue is its curvature.

# %% nbgrader={"grade_id": "look_at_loss", "locked": true}
g, H = gradient_and_hessian(-1.0, 0.0, x, y)
values, vectors = np.linalg.eigh(H)
best = np.array([-1.0, 0.0]) - np.linalg.solve(H, g)  # where the gradient is 0
print("H =", np.array2string(H, precision=3, prefix="H = "))
print(
    f"eigenvalues {values[0]:.3f} and {values[1]:.3f}, condition number {values[1] / values[0]:.1f}"
)
print(f"minimum at w = {best[0]:.3f}, b = {best[1]:.3f}")


def contours(ax):
    ws, bs = np.meshgrid(np.linspace(-1.6, 4.6, 80), np.linspace(-0.8, 6.2, 80))
    offsets = np.stack([ws - best[0], bs - best[1]])
    surface = 0.5 * np.einsum("iab,ij,jab->ab", offsets, H, offsets)
    ax.contour(ws, bs, surface, levels=np.geomspace(0.05, 60, 12), colors="lightgrey", linewidths=1)
    ax.plot(*best, "k*", markersize=9, label="minimum")
    ax.set(xlabel="w", ylabel="b", aspect="equal")


figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
contours(ax)
for value, vector, color in zip(values, vectors.T, ("tab:blue", "tab:red"), strict=True):
    ends = np.stack([best - vector, best + vector], axis=1) * 1.0
    ax.plot(*ends, color=color, linewidth=2.5, label=f"eigenvector, curvature {value:.2f}")
ax.set_title("mean squared error of the line w x + b")
ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=9)
plt.show()

# %% [markdown]
# ## 2 The gradient of the gradient
#
# Now a network. With $n$ parameters in one vector $\theta$, the gradient is a function $g(\theta)$ from vectors to
# vectors, and its derivative in the direction $v$ is a vector again:
#
# $$Hv = \lim_{\varepsilon\to0} \frac{g(\theta + \varepsilon v) - g(\theta)}{\varepsilon}.$$
#
# No matrix occurs in this. The quick way to compute it is to take a small $\varepsilon$. Better than the difference to
# one side is the *central difference*: the step to the right minus the step to the left, over the distance
# between them. Its error is of the order $\varepsilon^2$ instead of $\varepsilon$.
#
# ### Task 2: by differences (2 points)
#
# Write `hvp_by_differences(gradient, theta, v, eps)` with two calls of the function `gradient`; `theta` and `v` are vectors (n,).


# %% nbgrader={"grade_id": "hvp_by_differences", "solution": true}
def hvp_by_differences(gradient, theta, v, eps):
    """About H v at theta: the central difference of the gradient in the direction v."""
    ### BEGIN SOLUTION
    return (gradient(theta + eps * v) - gradient(theta - eps * v)) / (2 * eps)
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_hvp_by_differences", "grade": true, "points": 2}
def check_differences(n, eps):
    """With a gradient A (theta * theta) a central difference is exact."""
    rng = np.random.default_rng(n)
    matrix, theta, v = rng.normal(size=(n, n)), rng.normal(size=n), rng.normal(size=n)
    calls = []

    def gradient(at):
        calls.append(at)
        return matrix @ (at * at)

    with labs.unchanged(theta=theta, v=v), labs.told("hvp_by_differences"):
        got = hvp_by_differences(gradient, theta, v, eps)
    right = matrix @ (2 * theta * v)
    mistakes = {
        "this is the difference to one side: take the central one": right + eps * matrix @ (v * v),
        "the distance between the two points is 2 eps": 2 * right,
        "divide by the distance of the two points": 2 * eps * right,
        "the difference is the wrong way round": -right,
    }
    name = f"hvp_by_differences, with eps = {eps:g}"
    labs.check_array(got, right, name, mistakes=mistakes, tolerance=1e-6)
    labs.check_calls(len(calls), 2, "calls of gradient", name=name)


check_differences(4, 0.1)
check_differences(6, 0.01)
### BEGIN HIDDEN TESTS
check_differences(1, 0.5)
check_differences(20, 1e-3)
### END HIDDEN TESTS
print("hvp_by_differences: right")

# %% [markdown]
# How good is that? We take a network with a hidden layer of 16 units, and compare with the exact $Hv$ (which you will
# have in a moment), for every $\varepsilon$.

# %% nbgrader={"grade_id": "differences_error", "locked": true}
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
exponents = np.arange(-12, 0.5, 0.5)
for dtype in (np.float64, np.float32):
    model, loss = npnet.mlp([1, 16, 1], "tanh", dtype=dtype, rng=1), MeanSquaredError()
    batch = x.astype(dtype), y.astype(dtype)
    parameters = model.named_parameters()
    start = {name: each.value.copy() for name, each in parameters.items()}
    v = unflatten(model, np.random.default_rng(2).normal(size=flatten(start).size))

    def gradient(theta, model=model, batch=batch):
        for name, value in unflatten(model, theta).items():
            model.named_parameters()[name].value = value
        return flatten(npnet.value_and_grad(model, MeanSquaredError(), *batch)[1])

    exact = flatten(npnet.hessian_vector_product(model, loss, *batch, v).product)
    theta, direction = flatten(start), flatten(v)
    errors = []
    for k in exponents:
        about = hvp_by_differences(gradient, theta, direction, dtype(10.0**k))
        errors.append(np.linalg.norm(about - exact) / np.linalg.norm(exact))
    name, best_eps = np.dtype(dtype).name, 10 ** exponents[int(np.argmin(errors))]
    print(f"{name}: least relative error {min(errors):.0e}, at eps = {best_eps:.0e}")
    ax.loglog(10**exponents, errors, "o-", label=name)
ax.set(title="H v by central differences", xlabel="eps", ylabel="relative error", ylim=(1e-13, 1e6))
ax.text(2e-12, 1e-11, "rounding:\nthe difference is all noise", fontsize=9, color="dimgrey")
ax.text(0.02, 1e-11, "not small\nenough", fontsize=9, color="dimgrey")
ax.legend(loc="upper right")
plt.show()

# %% [markdown]
# There is a best $\varepsilon$, nobody knows it beforehand, and even there a third of the digits is lost. In
# float32 that is too little for what follows. So: exactly.
#
# ### By hand
#
# Let $\theta$ move, with the velocity $v$: at the time $t$ it is at $\theta + t v$. Everything that is computed from $\theta$
# moves, too. We write a dot for its velocity, the *tangent*: $\dot a = \mathrm{d}a/\mathrm{d}t$ at $t = 0$. The gradient moves with the velocity
# $\dot g = Hv$: that is all we want. So take the forward and the backward pass, line by line, and differentiate each line.
# You need two rules,
#
# $$(AB)^{\textstyle\cdot} = \dot A B + A \dot B, \qquad \bigl(f(z)\bigr)^{\textstyle\cdot} = f'(z) \odot \dot z.$$
#
# The network has one hidden layer; samples are rows. The parameters are $W_1$ (hidden, inputs), $b_1$ (hidden,), $W_2$
# (outputs, hidden), $b_2$ (outputs,); the tangents of these are given: they are the four parts of $v$, in the same shapes.
#
# | forward | | backward | |
# | --- | --- | --- | --- |
# | $z = x W_1^\top + b_1$ | (N, hidden) | $\delta_o = \frac{2}{N \cdot \text{outputs}} (o - y)$ | (N, outputs) |
# | $a = \tanh z$ | (N, hidden) | $g_{W_2} = \delta_o^\top a, \quad g_{b_2} = \sum \delta_o$ | as $W_2$, $b_2$ |
# | $o = a W_2^\top + b_2$ | (N, outputs) | $\delta_a = \delta_o W_2$ | (N, hidden) |
# | | | $\delta_z = \delta_a \odot (1 - a^2)$ | (N, hidden) |
# | | | $g_{W_1} = \delta_z^\top x, \quad g_{b_1} = \sum \delta_z$ | as $W_1$, $b_1$ |
#
# (The sums are over the batch.) In code:


# %% nbgrader={"grade_id": "first_order", "locked": true}
def forward(theta, x):
    """a (N, hidden) and o (N, outputs)."""
    w1, b1, w2, b2 = theta
    a = np.tanh(x @ w1.T + b1)
    return a, a @ w2.T + b2


def gradient_of(theta, x, y):
    """The loss, and its gradient: four arrays in the shapes of theta's."""
    a, o = forward(theta, x)
    delta_o = 2 / y.size * (o - y)
    delta_a = delta_o @ theta[2]
    delta_z = delta_a * (1 - a * a)
    gradient = [delta_z.T @ x, delta_z.sum(axis=0), delta_o.T @ a, delta_o.sum(axis=0)]
    return float(((o - y) ** 2).mean()), gradient


def to_parts(vector, theta):
    """A vector (n,) in the shapes of theta."""
    ends = np.cumsum([each.size for each in theta])
    parts = np.split(vector, ends[:-1])
    return [part.reshape(each.shape) for part, each in zip(parts, theta, strict=True)]


def to_vector(parts):
    """Arrays as one vector (n,)."""
    return np.concatenate([np.ravel(part) for part in parts])


# %% [markdown]
# ### Task 3: the forward pass moves (2 points)
#
# Write `tangent_forward(theta, v, x)`: it returns $a, \dot a, o, \dot o$. The data do not move: $\dot x = 0$.


# %% nbgrader={"grade_id": "tangent_forward", "solution": true}
def tangent_forward(theta, v, x):
    """a, its tangent, o, its tangent, when theta moves with the velocity v.

    theta: a list of W_1, b_1, W_2, b_2. v: a list of their tangents, in the same shapes.
    """
    ### BEGIN SOLUTION
    v1, c1, v2, c2 = v
    a, o = forward(theta, x)
    z_dot = x @ v1.T + c1
    a_dot = (1 - a * a) * z_dot
    o_dot = a_dot @ theta[2].T + a @ v2.T + c2
    return a, a_dot, o, o_dot
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_tangent_forward", "grade": true, "points": 2}
def problem(inputs, hidden, outputs, batch):
    """theta, v, x, y of a random network."""
    rng = np.random.default_rng(inputs + 10 * hidden)
    shapes = [(hidden, inputs), (hidden,), (outputs, hidden), (outputs,)]
    theta, v = ([rng.normal(size=shape) for shape in shapes] for _ in range(2))
    return theta, v, rng.normal(size=(batch, inputs)), rng.normal(size=(batch, outputs))


def velocity(function, theta, v):
    """The tangent of function(theta), exactly, by a complex step (Squire and Trapp, 1998)."""
    moved = [each + 1e-30j * tangent for each, tangent in zip(theta, v, strict=True)]
    return np.imag(function(moved)) * 1e30


def check_tangent_forward(*sizes):
    theta, v, x, _ = problem(*sizes)
    with labs.unchanged(theta=theta, v=v, x=x), labs.told("tangent_forward"):
        answer = tangent_forward(theta, v, x)
    assert isinstance(answer, tuple), "tangent_forward: return four arrays, with commas between"
    assert len(answer) == 4, f"tangent_forward: return four arrays, not {len(answer)}"
    a, o = forward(theta, x)
    right = [a, velocity(lambda at: forward(at, x)[0], theta, v), o]
    right.append(velocity(lambda at: forward(at, x)[1], theta, v))

    def without(*parts):
        """The tangents if these parts of v were 0."""
        still = [each * (i not in parts) for i, each in enumerate(v)]
        return [velocity(lambda at, k=k: forward(at, x)[k], theta, still) for k in (0, 1)]

    mistakes = [
        {},
        {
            "the bias b_1 moves, too": without(1)[0],
            "W_1 moves, too": without(0)[0],
            "the derivative of tanh is missing": right[1] / (1 - a * a),
            "the derivative of tanh is 1 - a ** 2; this is a (1 - a), the sigmoid's": (
                right[1] / (1 + a) * a
            ),
        },
        {},
        {
            "the product a W_2 has two factors that move: the term with the tangent of W_2 is missing": (
                without(2)[1]
            ),
            "the product a W_2 has two factors that move: the term with the tangent of a is missing": (
                without(0, 1)[1]
            ),
            "the bias b_2 moves, too": without(3)[1],
        },
    ]
    names = ["a", "the tangent of a", "o", "the tangent of o"]
    for got, expected, name, words in zip(answer, right, names, mistakes, strict=True):
        labs.check_array(got, expected, name, mistakes=words)


check_tangent_forward(3, 5, 2, 4)
check_tangent_forward(1, 4, 1, 6)
### BEGIN HIDDEN TESTS
check_tangent_forward(4, 4, 4, 4)
check_tangent_forward(2, 1, 3, 1)
### END HIDDEN TESTS
print("tangent_forward: right")

# %% [markdown]
# ### Task 4: the backward pass moves (4 points)
#
# Write `hvp(theta, v, x, y)`: it calls `tangent_forward`, then goes through the right column of the table, and returns
# $Hv$: the tangents of $g_{W_1}, g_{b_1}, g_{W_2}, g_{b_2}$, in this order, in the shapes of the parameters. Write $\dot\delta_o$
# first, then $\dot\delta_a$, $\dot\delta_z$. Ask yourself in each line: what moves in it? (The targets $y$ do not.)


# %% nbgrader={"grade_id": "hvp", "solution": true}
def hvp(theta, v, x, y):
    """H v: four arrays in the shapes of theta's: W_1, b_1, W_2, b_2. v: four arrays in the same shapes."""
    a, a_dot, o, o_dot = tangent_forward(theta, v, x)
    ### BEGIN SOLUTION
    w2, v2 = theta[2], v[2]
    scale = 2 / y.size
    delta_o, delta_o_dot = scale * (o - y), scale * o_dot
    g_w2_dot = delta_o_dot.T @ a + delta_o.T @ a_dot
    g_b2_dot = delta_o_dot.sum(axis=0)
    delta_a = delta_o @ w2
    delta_a_dot = delta_o_dot @ w2 + delta_o @ v2
    slope, slope_dot = 1 - a * a, -2 * a * a_dot
    delta_z_dot = delta_a_dot * slope + delta_a * slope_dot
    return [delta_z_dot.T @ x, delta_z_dot.sum(axis=0), g_w2_dot, g_b2_dot]
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_hvp", "grade": true, "points": 4}
### BEGIN HIDDEN TESTS
# From here on with the right tangent_forward: a mistake costs its points once.
def tangent_forward(theta, v, x):
    a, o = forward(theta, x)
    a_dot = (1 - a * a) * (x @ v[0].T + v[1])
    return a, a_dot, o, a_dot @ theta[2].T + a @ v[2].T + v[3]


### END HIDDEN TESTS
def model_of(theta):
    """The network of npnet with these parameters."""
    (hidden, inputs), outputs = theta[0].shape, len(theta[3])
    model = npnet.mlp([inputs, hidden, outputs], "tanh", dtype=np.float64, rng=0)
    for parameter, value in zip(model.parameters(), theta, strict=True):
        parameter.value = value.copy(order="K")
    return model


def hvp_by_npnet(theta, v, x, y):
    model = model_of(theta)
    vector = dict(zip(model.named_parameters(), v, strict=True))
    return list(
        npnet.hessian_vector_product(model, MeanSquaredError(), x, y, vector).product.values()
    )


def what_stands_still(theta, v, x, y):
    """What comes out if something that moves is taken to stand still; words -> four arrays."""
    a_now, o_now = forward(theta, x)

    def gradient(at, still):
        a, o = forward(at, x)
        if still == "delta_o":
            o = o_now
        delta_o = 2 / y.size * (o - y)
        a_above = a_now if still == "a" else a
        delta_a = delta_o @ (theta[2] if still == "w2" else at[2])
        a_slope = a_now if still == "slope" else a
        delta_z = delta_a * (1 - a_slope * a_slope)
        return [delta_z.T @ x, delta_z.sum(axis=0), delta_o.T @ a_above, delta_o.sum(axis=0)]

    said = {
        "a": "in delta_o^T a both factors move: the term with the tangent of a is missing",
        "w2": "in delta_o W_2 both factors move: the term with the tangent of W_2 is missing",
        "slope": "the slope 1 - a ** 2 moves, too: its tangent is missing (the second derivative of tanh)",
        "delta_o": "delta_o moves, since o does: its tangent is missing",
    }
    parts = range(4)
    return {
        words: [velocity(lambda at, i=i, s=still: gradient(at, s)[i], theta, v) for i in parts]
        for still, words in said.items()
    }


def check_hvp(*sizes):
    theta, v, x, y = problem(*sizes)
    with labs.unchanged(theta=theta, v=v, x=x, y=y), labs.told("hvp"):
        answer = hvp(theta, v, x, y)
    assert isinstance(answer, (list, tuple)), "hvp: return a list of four arrays"
    assert len(answer) == 4, f"hvp: return four arrays, not {len(answer)}"
    right, wrong = hvp_by_npnet(theta, v, x, y), what_stands_still(theta, v, x, y)
    names = ["W_1", "b_1", "W_2", "b_2"]
    for i in (3, 2, 1, 0):  # as the backward pass computes them
        mistakes = {words: arrays[i] for words, arrays in wrong.items()}
        fixed = next(arrays[i] for words, arrays in wrong.items() if "slope" in words)
        mistakes["the tangent of the slope 1 - a ** 2 has the wrong sign"] = 2 * fixed - right[i]
        mistakes["half of the tangent of the slope is missing: a ** 2 is a product, too"] = (
            fixed + right[i]
        ) / 2
        name = f"the tangent of the gradient at {names[i]}"
        labs.check_array(answer[i], right[i], name, batch=len(x), mistakes=mistakes)


check_hvp(3, 5, 2, 4)
check_hvp(1, 4, 1, 6)
### BEGIN HIDDEN TESTS
check_hvp(4, 4, 4, 4)
check_hvp(2, 7, 1, 50)
### END HIDDEN TESTS
print("hvp: right")

# %% [markdown]
# This is Pearlmutter's method. It is exact, there is no $\varepsilon$, and each line of the program has become at most
# three. Nobody has to write it line by line: `npnet.hessian_vector_product` gives the arrays of the
# network a tangent (*dual numbers*), and runs the same backward pass on them.
#
# The whole Hessian, if one wants to see it, is $H e_1, H e_2, \dots$, column by column. Is it symmetric? It has to be.
# Is it positive? It need not be:

# %% nbgrader={"grade_id": "look_at_hessian", "locked": true}
theta = [each.value for each in npnet.mlp([1, 6, 1], "tanh", dtype=np.float64, rng=1).parameters()]

n = to_vector(theta).size
full = np.stack([to_vector(hvp(theta, to_parts(unit, theta), x, y)) for unit in np.eye(n)], axis=1)
print(f"H: {full.shape}; largest asymmetry {np.abs(full - full.T).max():.1e}")
spectrum = np.linalg.eigvalsh(full)
print(
    "eigenvalues:", np.array2string(spectrum, precision=3, suppress_small=True, max_line_width=90)
)
print(f"{(spectrum < -1e-12).sum()} of them are negative")
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
limit = np.abs(full).max()
image = axes[0].imshow(full, cmap="RdBu_r", vmin=-limit, vmax=limit)
ticks = np.cumsum([0] + [each.size for each in theta])
axes[0].set_xticks((ticks[:-1] + ticks[1:] - 1) / 2, ["$W_1$", "$b_1$", "$W_2$", "$b_2$"])
axes[0].set_yticks((ticks[:-1] + ticks[1:] - 1) / 2, ["$W_1$", "$b_1$", "$W_2$", "$b_2$"])
for tick in ticks[1:-1] - 0.5:
    axes[0].axhline(tick, color="black", linewidth=0.6)
    axes[0].axvline(tick, color="black", linewidth=0.6)
axes[0].set_title(f"Hessian of a network, {n} parameters")
figure.colorbar(image, ax=axes[0], label="second derivative")
axes[1].stem(np.arange(1, n + 1), spectrum, basefmt="k-")
axes[1].set_yscale("symlog", linthresh=1e-3)
axes[1].set_xticks(range(1, n + 1, 3))
axes[1].set(title="its eigenvalues", xlabel="number", ylabel="curvature (symmetric log scale)")
plt.show()

# %% [markdown]
# A few steep directions, many flat ones, and some that curve downwards: so it is in large networks, too.
#
# ## 3 A step with curvature
#
# A simple way to use second derivatives in a step is this one:
#
# $$\theta' = \theta - \alpha\, g - \beta\, \nabla_\theta |g|^2.$$
#
# The gradient $g$ is a vector, and backpropagation begins with a number: so one makes a number of it,
# its squared length $|g|^2 = g \cdot g$, and takes the gradient of that. The step goes downhill, and to where the slope is small.
#
# ### Task 5: the step (3 points)
#
# What is $\nabla_\theta |g|^2$, expressed by $H$ and $g$? (Write $|g|^2 = \sum_i g_i^2$, and differentiate by $\theta_j$.) Then write
# `curvature_step(theta, gradient, product, alpha, beta)`, which returns the new vector. `gradient(theta)` gives $g$, and
# `product(theta, v)` gives $Hv$; all are vectors (n,). One call of each suffices.


# %% nbgrader={"grade_id": "curvature_step", "solution": true}
def curvature_step(theta, gradient, product, alpha, beta):
    """theta - alpha g - beta (the gradient of |g|^2), a new vector (n,)."""
    ### BEGIN SOLUTION
    g = gradient(theta)
    return theta - alpha * g - beta * 2 * product(theta, g)
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_curvature_step", "grade": true, "points": 3}
def by_npnet(theta, x, y):
    """The functions gradient and product of a network, for vectors, as npnet computes them; and calls of them."""
    calls = {"gradient": [], "product": []}

    def gradient(at):
        calls["gradient"].append(at)
        model = model_of(to_parts(at, theta))
        return flatten(npnet.value_and_grad(model, MeanSquaredError(), x, y)[1])

    def product(at, v):
        calls["product"].append(at)
        return to_vector(hvp_by_npnet(to_parts(at, theta), to_parts(v, theta), x, y))

    return gradient, product, calls


def check_curvature_step(alpha, beta, *sizes):
    theta, _, x, y = problem(*sizes)
    gradient, product, calls = by_npnet(theta, x, y)
    start = to_vector(theta)
    with labs.unchanged(theta=start), labs.told("curvature_step"):
        got = curvature_step(start, gradient, product, alpha, beta)
    counted = {name: len(each) for name, each in calls.items()}
    model = model_of(theta)
    npnet.second_order_step(model, MeanSquaredError(), x, y, alpha, beta)
    right = to_vector([parameter.value for parameter in model.parameters()])
    g = gradient(start)
    ones = product(start, np.ones(start.size))
    from_g = start - alpha * g  # without the second term
    after = product(from_g, gradient(from_g))
    second = right - from_g  # the second term, as it should be
    mistakes = {
        "the factor 2 is missing: the derivative of g_i ** 2 is 2 g_i times that of g_i": from_g
        + second / 2,
        "the second term has the wrong sign": from_g - second,
        "the first term has the wrong sign": right + 2 * alpha * g,
        "this uses the gradient of the sum of g's numbers, H times a vector of ones; asked is |g| ** 2": (
            from_g - beta * ones
        ),
        "the second term is taken behind the first step: take both at theta": from_g
        + second * 0
        - 2 * beta * after,
        "the second term is missing": from_g,
    }
    call = f"curvature_step(..., alpha={alpha}, beta={beta})"
    labs.check_array(got, right, call, mistakes=mistakes)
    for name, made in counted.items():
        labs.check_calls(made, 1, f"calls of {name}", name=call)


check_curvature_step(0.1, 0.02, 3, 5, 2, 4)
check_curvature_step(0.05, 0.01, 1, 4, 1, 6)
### BEGIN HIDDEN TESTS
check_curvature_step(0.0, 0.01, 1, 8, 1, 20)
check_curvature_step(0.3, 0.1, 2, 2, 2, 5)
### END HIDDEN TESTS
print("curvature_step: right")

# %% [markdown]
# ### Task 6: what it does (2 points)
#
# On the line of part 1 all can be computed. At the distance $e = \theta - \theta^*$ from the minimum the gradient is $g = He$.
# Let $e$ be along an eigenvector with the eigenvalue $\lambda$, so that $He = \lambda e$. A step then multiplies it by a number:
# $e' = \rho\, e$. Write `shrink_factor(eigenvalue, alpha, beta)`, which returns $\rho$.


# %% nbgrader={"grade_id": "shrink_factor", "solution": true}
def shrink_factor(eigenvalue, alpha, beta):
    """By what a step multiplies the distance from the minimum, along an eigenvector."""
    ### BEGIN SOLUTION
    return 1 - alpha * eigenvalue - 2 * beta * eigenvalue**2
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_shrink_factor", "grade": true, "points": 2}
def check_shrink(alpha, beta, scale=1.0):
    points, targets = scale * x[:40], y[:40]
    matrix = npnet.hessian(line(0, 0), MeanSquaredError(), points, targets)
    slopes = flatten(npnet.value_and_grad(line(0, 0), MeanSquaredError(), points, targets)[1])
    minimum = -np.linalg.solve(matrix, slopes)
    for value, vector in zip(*np.linalg.eigh(matrix), strict=True):

        def measured(alpha, beta, vector=vector):
            """The factor, by a step of npnet from beside the minimum."""
            model = line(*(minimum + vector))
            npnet.second_order_step(model, MeanSquaredError(), points, targets, alpha, beta)
            return float(
                vector @ (flatten({"w": model.weight.value, "b": model.bias.value}) - minimum)
            )

        right = measured(alpha, beta)
        mistakes = {
            "The factor 2 of the gradient of |g| ** 2 is missing": measured(alpha, beta / 2),
            "The second term is missing": measured(alpha, 0.0),
            "This is what is taken away; the factor is what remains": 1 - right,
        }
        if value != 1:
            once = right + (1 - 1 / value) * (measured(alpha, 0.0) - right)
            mistakes["The eigenvalue comes twice: g has it once, and H g once more"] = once
        with labs.told("shrink_factor"):
            got = shrink_factor(value, alpha, beta)
        name = f"shrink_factor({value:.4g}, {alpha}, {beta})"
        labs.check_number(got, right, name, mistakes=mistakes, tolerance=1e-7)


check_shrink(0.1, 0.03)
check_shrink(0.2, 0.005)
### BEGIN HIDDEN TESTS
check_shrink(0.01, 0.3, scale=0.3)
check_shrink(0.05, 0.02, scale=2.0)
### END HIDDEN TESTS
print("shrink_factor: right")

# %% [markdown]
# Now look at it. On the left the ways of gradient descent and of the step with curvature, 12 steps each (6 where it diverges), from the same
# point; on the right the factor, for every curvature. A method is stable where $|\rho| < 1$, and fast where
# $\rho$ is near 0. And Newton's method, which comes next: one step.

# %% nbgrader={"grade_id": "ways", "locked": true}
figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
contours(axes[0])
begin, curvatures = np.array([-1.2, 5.0]), np.linspace(0, 7, 200)
settings = {
    "gradient descent": (0.1, 0.0),
    "with curvature": (0.1, 0.003),
    "beta too large": (0.1, 0.017),
}


def way_of(alpha, beta, steps):
    """The points that curvature_step goes through on the line's loss."""
    way = [begin]
    for _ in range(steps):
        way.append(
            curvature_step(
                way[-1],
                lambda at: gradient_and_hessian(*at, x, y)[0],
                lambda at, v: gradient_and_hessian(*at, x, y)[1] @ v,
                alpha,
                beta,
            )
        )
    return way


for name, (alpha, beta) in settings.items():
    way = way_of(alpha, beta, 12 if beta < 0.01 else 6)
    distance = np.linalg.norm(way[-1] - best)
    factors = [shrink_factor(value, alpha, beta) for value in values]
    print(
        f"{name:<17} alpha {alpha}, beta {beta:<5} factors {factors[0]:.3f} and {factors[1]:6.3f}, ",
        end="",
    )
    print(f"distance at the end {distance:.3f}")
    axes[0].plot(*np.transpose(way), "o-", markersize=3, linewidth=1.2, label=f"{name} ({beta:g})")
    axes[1].plot(
        curvatures, [shrink_factor(c, alpha, beta) for c in curvatures], label=f"beta = {beta:g}"
    )
axes[0].plot(*np.transpose([begin, best]), "k--", linewidth=1.2, label="Newton, one step")
axes[0].set(title="ways to the minimum", xlim=(-1.6, 4.6), ylim=(-0.8, 6.2))
axes[0].legend(fontsize=7, loc="lower left")
axes[1].axhspan(-1, 1, color="tab:green", alpha=0.1)
for value in values:
    axes[1].axvline(value, color="grey", linestyle=":")
axes[1].set(
    title="factor of a step (green: stable), alpha = 0.1", xlabel="curvature", ylabel="factor"
)
axes[1].set_ylim(-2.2, 1.2)
axes[1].legend(fontsize=8, loc="lower left")
plt.show()

# %% [markdown]
# Move $\beta$, with $\alpha = 0.1$ and 12 steps. Which $\beta$ is best, and from which on does it diverge? Find both in
# the picture on the right above.

# %% nbgrader={"grade_id": "slide_beta", "locked": true}


def way_with(beta):
    figure = plt.Figure(figsize=(5, 4), layout="constrained")
    ax = figure.add_subplot()
    contours(ax)
    way = np.transpose(way_of(0.1, beta, 12))
    ax.plot(*way, "o-", markersize=3, linewidth=1.2, label=f"beta = {beta}")
    factors = ", ".join(f"{shrink_factor(value, 0.1, beta):.2f}" for value in values)
    ax.set(title=f"beta = {beta}, factors {factors}", xlim=(-1.6, 4.6), ylim=(-0.8, 6.2))
    return ax


betas = [0.0, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.012, 0.014, 0.015, 0.017]
labs.slider(way_with, betas, "beta", value=0.012)

# %% [markdown]
# ### Question 1 (2 points)
#
# * One reads: "where the curvature is large, second-order methods take smaller steps; where it is small, larger ones". Is that
#   true of this step? Argue with the factor: along which directions does the second term add most?
# * Up to which $\beta$ is the step stable, for a given $\alpha$ and the largest eigenvalue $\lambda$?
# * Where else than in minima is $|g|^2$ smallest? What does that mean for the second term in a network with negative curvatures?

# %% [markdown] nbgrader={"grade_id": "question_step", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# No: that is true of Newton's step. Here the step along an eigenvector is $(\alpha\lambda + 2\beta\lambda^2)\,e$, relative to gradient descent
# it is longer by $1 + 2\beta\lambda/\alpha$: most along the steep directions, which were fast already, and hardly at all along the flat ones, which are
# slow. So the bad conditioning gets worse (from $\lambda$ to $\lambda^2$ in the second term), and what it gains it gains where
# $\alpha\lambda$ was far below 1.
# Stable for $|\rho| < 1$, that is $\alpha\lambda + 2\beta\lambda^2 < 2$: $\beta < (2 - \alpha\lambda)/(2\lambda^2)$; for $\alpha = 0.1$, $\lambda = 6.7$ it is about 0.015.
# $|g|^2$ is 0 at every stationary point: in maxima and saddle points, too. Along a direction with $\lambda < 0$ the second term still
# shrinks the distance (by $2\beta\lambda^2$), that is, it pulls to the saddle point, while the first drives away
# from it; for $2\beta|\lambda| > \alpha$ the saddle point attracts.
# ### END SOLUTION

# %% [markdown]
# ## 4 Newton's view
#
# Near $\theta$ the loss is nearly a paraboloid, $L(\theta + p) \approx L + g \cdot p + \frac12\, p \cdot Hp$. Newton's step goes to its minimum: there
# $g + Hp = 0$, so
#
# $$p = -H^{-1} g.$$
#
# Along an eigenvector this is $-g/\lambda$: *now* the step is small where the curvature is large. Two things are in the way.
#
# * *$H$ is not there*, only products with it. But the method of **conjugate gradients** solves $Ap = -g$ with products alone, and
#   after few of them $p$ is good enough.
# * *$H$ may be negative* along some directions, and then the paraboloid has no minimum: Newton's step runs up to a saddle point. So one adds a
#   *damping* $\mu \ge 0$, and takes $A = H + \mu I$: with a large $\mu$ the step is a short one along $-g$. And if a
#   direction $d$ is met with $d \cdot Ad \le 0$, one stops.
#
# ### Task 7: the direction, by conjugate gradients (5 points)
#
# Write `newton_direction(product, g, damping, iterations)`, where `product(v)` gives $Hv$:
#
# 1. Begin with $p = 0$, $r = -g$ (what is left to solve) and $d = r$ (the direction to go).
# 2. Repeat `iterations` times: stop if $|r| \le 10^{-10}\,|g|$. Compute $q = A d = Hd + \mu d$, with one product. If $d \cdot q \le 0$, stop: return $p$ as it
#    is, or, if it is still 0, $-g$. Otherwise
#    $$\eta = \frac{r\cdot r}{d \cdot q}, \qquad p \leftarrow p + \eta d, \qquad r' = r - \eta q, \qquad d \leftarrow r' + \frac{r' \cdot r'}{r \cdot r}\, d, \qquad r \leftarrow r'.$$
# 3. Return $p$.


# %% nbgrader={"grade_id": "newton_direction", "solution": true}
def newton_direction(product, g, damping, iterations):
    """p with (H + damping I) p = -g, about, by conjugate gradients; product(v) gives H v."""
    ### BEGIN SOLUTION
    p, r = np.zeros_like(g), -g
    d = r.copy()
    for _ in range(iterations):
        if np.linalg.norm(r) <= 1e-10 * np.linalg.norm(g):
            break
        q = product(d) + damping * d
        curvature = d @ q
        if curvature <= 0:
            return p if p.any() else -g
        eta = (r @ r) / curvature
        p = p + eta * d
        r_next = r - eta * q
        d = r_next + (r_next @ r_next) / (r @ r) * d
        r = r_next
    return p
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_newton_direction", "grade": true, "points": 5}
def best_in_krylov(matrix, g, iterations):
    """The minimum of g.p + p.Ap/2 over the span of g, Ag, A^2 g, ...: what conjugate gradients reach, by brute force."""
    basis = [g / np.linalg.norm(g)]
    for _ in range(iterations - 1):
        new = matrix @ basis[-1]
        for _ in range(2):
            new = new - np.stack(basis).T @ (np.stack(basis) @ new)
        if np.linalg.norm(new) < 1e-9:
            break
        basis.append(new / np.linalg.norm(new))
    basis = np.stack(basis, axis=1)
    return -basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ g)


def direction_of(matrix, g, damping, iterations):
    """The student's direction, and the vectors whose products it took."""
    calls = []

    def product(v):
        calls.append(v)
        assert np.shape(v) == g.shape, f"product was called with {np.shape(v)}, expected {g.shape}"
        return matrix @ v

    with (
        labs.unchanged(g=g, matrix=matrix),
        labs.told("newton_direction"),
        np.errstate(all="ignore"),
    ):
        got = newton_direction(product, g, damping, iterations)
    return got, calls


def check_direction(n, damping, iterations, enough=None):
    rng = np.random.default_rng(n)
    root, g = rng.normal(size=(n, n)), rng.normal(size=n)
    matrix = root @ root.T / n + 0.1 * np.eye(n)
    got, calls = direction_of(matrix, g, damping, iterations)
    right = best_in_krylov(matrix + damping * np.eye(n), g, iterations)
    mistakes = {
        "the sign is wrong: it points uphill": -right,
        "the damping is missing": best_in_krylov(matrix, g, iterations),
        "the damping is subtracted": best_in_krylov(matrix - damping * np.eye(n), g, iterations),
        "there is one iteration too much": best_in_krylov(
            matrix + damping * np.eye(n), g, iterations + 1
        ),
        "this is H p = g, not -g": -best_in_krylov(matrix, g, iterations),
    }
    if iterations > 1:
        words = "there is one iteration too few"
        mistakes[words] = best_in_krylov(matrix + damping * np.eye(n), g, iterations - 1)
    descent, a = np.zeros(n), matrix + damping * np.eye(n)
    for _ in range(iterations):
        rest = -g - a @ descent
        descent = descent + (rest @ rest) / (rest @ a @ rest) * rest
    mistakes["this is steepest descent: the new direction is missing its part of the old one"] = (
        descent
    )
    if len(calls) > 1 and abs(calls[0] @ a @ calls[1]) > 1e-6 * (calls[0] @ a @ calls[0]):
        words = "the first two directions are not conjugate (d'.Ad is not 0): the factor of the old d is the new r.r "
        words += "over the r.r from before"
        mistakes[words] = got
    name = f"newton_direction, {n} parameters, damping {damping}, {iterations} iterations"
    labs.check_array(got, right, name, mistakes=mistakes, tolerance=1e-6)
    labs.check_calls(len(calls), enough or iterations, "products", name=name)


def check_negative(eigenvalues, g, right, words, calls=1):
    """Where the curvature is negative; H is diagonal."""
    got, made = direction_of(np.diag(eigenvalues), np.array(g), 0.0, 20)
    name = f"newton_direction, eigenvalues {eigenvalues}, g = {g}"
    labs.check_array(
        got, np.array(right), name, mistakes={said: np.array(p) for said, p in words.items()}
    )
    labs.check_calls(len(made), calls, "products", name=name)


check_direction(6, 0.5, 3)
check_direction(4, 0.0, 4)
check_direction(3, 0.2, 20, enough=3)  # solved after 3: it stops
saddle = "with a negative curvature Newton's step runs up to the saddle point: stop if d.q <= 0, and return -g if p is still 0"
nothing = "p is still 0: return -g, which goes downhill at least"
check_negative([2.0, -4.0], [0.0, 1.0], [0.0, -1.0], {saddle: [0.0, 0.25], nothing: [0.0, 0.0]})
### BEGIN HIDDEN TESTS
check_direction(30, 0.1, 10)
check_direction(1, 3.0, 1)
check_direction(8, 1.0, 1)
check_negative([-1.0, -1.0, -1.0], [1.0, 2.0, 3.0], [-1.0, -2.0, -3.0], {})
# d = -g has a positive curvature, 1 + 1 - 0.5; the second one a negative one: the first step is returned
first = (3.0 / 1.5) * np.array([-1.0, -1.0, -1.0])
check_negative([1.0, 1.0, -0.5], [1.0, 1.0, 1.0], first, {}, calls=2)
### END HIDDEN TESTS
print("newton_direction: right")

# %% [markdown]
# Now the fit of $y = 2x + 3$ with a network that knows nothing of lines: one hidden layer of 16 tanh units, 49 parameters. Three
# methods from the same start: gradient descent, the step with curvature, and Newton's with damping. After each step of
# Newton's the damping is made smaller if the loss has fallen; otherwise the step is taken back, and the damping made larger (Levenberg
# and Marquardt). To be fair, the axis on the right counts what a step costs, with a product as two gradients.

# %% nbgrader={"grade_id": "fit_network", "locked": true}
x_fit, y_fit = npnet.make_linear(200, noise=0.2, low=-5, high=5, rng=3)
network = npnet.mlp([1, 16, 1], "tanh", dtype=np.float64, rng=4)
shapes = [each.value for each in network.parameters()]
costs = 60 if labs.grading() else 3000


def loss_and_gradient(vector):
    value, parts = gradient_of(to_parts(vector, shapes), x_fit, y_fit)
    return value, to_vector(parts)


def product_at(vector, v):
    return to_vector(hvp(to_parts(vector, shapes), to_parts(v, shapes), x_fit, y_fit))


ways = {0.0: [], 0.0001: []}  # for each beta the parameters, every 20th step


def fit_by_steps(alpha, beta):
    """Gradients spent, and the loss, step by step; and where it ends."""
    vector, spent, losses = to_vector(shapes), [0], []
    while spent[-1] < costs:
        if len(losses) % 20 == 0:
            ways[beta].append(vector)
        losses.append(loss_and_gradient(vector)[0])
        if beta:
            vector = curvature_step(
                vector, lambda at: loss_and_gradient(at)[1], product_at, alpha, beta
            )
        else:
            vector = vector - alpha * loss_and_gradient(vector)[1]
        spent.append(spent[-1] + (3 if beta else 1))
    return spent[:-1], losses, vector


def fit_by_newton(iterations=20):
    vector, spent, losses, damping = to_vector(shapes), [0], [], 1.0
    while spent[-1] < costs:
        value, g = loss_and_gradient(vector)
        losses.append(value)
        calls = []

        def product(v, vector=vector, calls=calls):
            calls.append(v)
            return product_at(vector, v)

        p = newton_direction(product, g, damping, iterations)
        better = loss_and_gradient(vector + p)[0] < value
        vector, damping = (vector + p, damping / 3) if better else (vector, 4 * damping)
        spent.append(spent[-1] + 2 + 2 * len(calls))
    return spent[:-1], losses, vector


fits = {
    "gradient descent": fit_by_steps(0.01, 0.0),
    "with curvature": fit_by_steps(0.01, 0.0001),
    "Newton, damped": fit_by_newton(),
}
noise = float(((2 * x_fit + 3 - y_fit) ** 2).mean())
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for i, (name, (spent, losses, vector)) in enumerate(fits.items()):
    print(
        f"{name:<17}{len(losses):>5} steps, loss at first {losses[0]:8.3f}, at last {losses[-1]:.4f}"
    )
    axes[1].loglog(np.array(spent) + 1, losses, label=name)
    grid = np.linspace(-6, 6, 121)[:, None]
    axes[0].plot(grid, forward(to_parts(vector, shapes), grid)[1], ["-", "--", "-"][i], label=name)
print(f"loss of the true line: {noise:.4f}")
axes[0].plot(grid, 2 * grid + 3, "k:", label="2 x + 3")
axes[0].plot(x_fit, y_fit, ".", color="grey", markersize=2, alpha=0.6)
axes[0].axvspan(-6, -5, color="grey", alpha=0.15)
axes[0].axvspan(5, 6, color="grey", alpha=0.15)
axes[0].set(title="the fit (grey: no data)", xlabel="x", ylabel="y")
axes[1].axhline(noise, color="k", linestyle=":", label="loss of the true line")
axes[1].set(title="loss", xlabel="gradients computed", ylabel="mean squared error")
for ax in axes:
    ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# Why does the step with curvature jump, after hundreds of good steps? Here is the largest curvature on its way (the largest eigenvalue of the
# Hessian, whose columns are 49 of your products), and your `shrink_factor` for it:

# %% nbgrader={"grade_id": "sharpening", "locked": true}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True)
for beta, way in ways.items():
    way = way[:51]  # the first 1000 steps
    largest = []
    for vector in way:
        columns = [product_at(vector, unit) for unit in np.eye(vector.size)]
        largest.append(np.linalg.eigvalsh(np.stack(columns))[-1])
    numbers = 20 * np.arange(len(way))
    axes[0].plot(numbers, largest, label=f"beta = {beta:g}")
    axes[1].plot(
        numbers, [shrink_factor(each, 0.01, beta) for each in largest], label=f"beta = {beta:g}"
    )
    print(
        f"beta = {beta:g}: largest curvature {largest[0]:.1f} at first, {largest[-1]:.1f} at last"
    )
axes[0].set(title="largest curvature", xlabel="step", ylabel="largest eigenvalue", ylim=0)
axes[1].axhspan(-1, 1, color="tab:green", alpha=0.1)
axes[1].set(title="factor of a step (green: stable)", xlabel="step", ylabel="factor")
for ax in axes:
    ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# Training makes the loss *sharper*, until the step is no longer stable: the distance along the sharpest direction grows with each step, the loss
# jumps, and the parameters land where the curvature is smaller. From then on they stay near the edge. Gradient descent does the same at $\lambda = 2/\alpha$ (Cohen et al., 2021:
# the *edge of stability*). No learning rate is right forever, and a rule that squares the curvature gets there first.
#
# ### Question 2 (2 points)
#
# * Newton's method needs one step for the line of part 1, from anywhere. Why? And why not for the network?
# * What would Newton's step without damping do near a saddle point of the loss? And what do very small and very large dampings do?
# * With ReLU in place of tanh the slope of a unit is 0 or 1, and its own second derivative is 0 (except at the kink). Is the Hessian
#   of the loss then 0? Which lines of your `hvp` remain?

# %% [markdown] nbgrader={"grade_id": "question_newton", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# The loss of the line is exactly quadratic, so its paraboloid *is* the loss, and the minimum of one is that of the other. The network's
# output is not linear in its parameters: the paraboloid is right nearby only.
# Along a direction with $\lambda < 0$ the step $-g/\lambda$ goes uphill, toward the stationary point: Newton's method is attracted by saddle points and
# maxima as by minima. With $\mu > |\lambda_{min}|$ all curvatures of $A$ are positive. $\mu \to 0$ is the pure step: fast near a minimum, and far too
# long, or wrong, elsewhere; $\mu \to \infty$ is gradient descent with the rate $1/\mu$: safe and slow.
# No. What is missing is the term with the tangent of the slope, $\delta_a \odot (-2 a \dot a)$. The output moves with the parameters, and so
# $\dot\delta_o$ is not 0 (the Gauss-Newton part, $J^\top J$); and the layers multiply: $\delta_o^\top \dot a$ and $\delta_o \dot W_2$ remain, the mixed second derivatives
# of products of weights.
# ### END SOLUTION

# %% [markdown]
# ## 5 What it costs
#
# A product with the Hessian runs the forward and the backward pass with twice the arrays: each has its tangent. So it takes at least twice the
# memory of a gradient, and all of it depends on what the schedule keeps. Here is a deep network (20 hidden layers of 64) and a
# batch of 1000, with `npnet.hessian_vector_product`, with and without checkpoints:

# %% nbgrader={"grade_id": "measure_costs", "locked": true}
batch, sizes = (100 if labs.grading() else 1000), [64] * 21 + [10]
deep = npnet.mlp(sizes, "tanh", rng=5)
rng = np.random.default_rng(6)
rows, targets = rng.normal(size=(batch, 64)), rng.normal(size=(batch, 10))
rows, targets = rows.astype(np.float32), targets.astype(np.float32)
v = {name: np.ones_like(each.value) for name, each in deep.named_parameters().items()}
terms = (deep, MeanSquaredError(), rows, targets)
peaks = {}
for schedule in ("none", "sqrt"):
    words = "plain" if schedule == "none" else "checkpoints"
    report = measure_peak(npnet.value_and_grad, *terms, schedule=schedule)
    peaks[f"g, {words}"] = report.increase_bytes
    report = measure_peak(npnet.hessian_vector_product, *terms, v, schedule=schedule)
    peaks[f"Hv, {words}"] = report.increase_bytes
count = sum(each.value.size for each in deep.parameters())
for name, peak in peaks.items():
    print(f"{name:<16}{format_bytes(peak):>9}   {peak / peaks['g, plain']:.2f}")
print(f"{count:,} parameters; the whole Hessian would take {format_bytes(4 * count**2)}")
first, second = (
    npnet.hessian_vector_product(*terms, v, schedule=schedule).product
    for schedule in ("none", "sqrt")
)
same = all(np.array_equal(first[name], second[name]) for name in first)
print("H v with checkpoints is", "the same, bit for bit" if same else "not the same: why?")
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
plots.plot_bars(
    {name: peak / 1e6 for name, peak in peaks.items()},
    ax,
    title=f"peak memory, 20 hidden layers of 64, batch {batch}",
    ylabel="MB",
    labels=[f"{peak / peaks['g, plain']:.2f}" for peak in peaks.values()],
)
ax.set_xlabel("on the bars: ratio to a plain gradient")
plt.show()

# %% [markdown]
# With products alone one also finds the largest eigenvalue (power iteration: $v \leftarrow Hv/|Hv|$), and so the largest learning rate at which
# gradient descent is stable near here, $2/\lambda_{max}$:

# %% nbgrader={"grade_id": "sharpness", "locked": true}
sharpest, _ = npnet.largest_eigenvalue(*terms, rng=7, iterations=5 if labs.grading() else 100)
print(
    f"largest eigenvalue (in size) {sharpest:.3g}; gradient descent is stable below about {2 / abs(sharpest):.3g}"
)

# %% [markdown]
# ### Question 3 (2 points)
#
# * How many products, and how many bytes, would the whole Hessian of this network take? What about a network with $10^9$ parameters?
# * Why does $Hv$ under a checkpointing schedule come out the same, bit for bit?
# * A framework computes $\nabla|g|^2$ by backpropagation through the backward pass (reverse over reverse). What has to be kept for that,
#   that forward over reverse (your `hvp`) need not keep?

# %% [markdown] nbgrader={"grade_id": "question_cost", "grade": true, "points": 2, "solution": true}
# ### BEGIN SOLUTION
# One product a column: as many as parameters, 83,850, and $4 n^2$ bytes, 28 GB in float32. With $10^9$ parameters $10^9$ products and
# $4 \cdot 10^{18}$ bytes, 4 exabytes.
# The recomputation runs the same layers on the same numbers, values and tangents, in the same order. A tangent is one more array at each activation, and is
# dropped and recomputed with it.
# Reverse over reverse treats the first backward pass as a part of the computation: all its intermediate results (the deltas of all layers), besides the activations, are kept on a
# tape until the second backward pass has gone through them. Forward over reverse has tangents beside the activations; its deltas, and their tangents, are dropped as it
# goes, as in an ordinary backward pass.
# ### END SOLUTION

# %% [markdown]
# PyTorch, where it is installed, takes the gradient of the gradient with `create_graph=True`. A last comparison with your `hvp`:

# %% nbgrader={"grade_id": "pytorch", "locked": true}
try:
    import torch
except ImportError:
    print("PyTorch: skipped, it is not installed (and not needed)")
else:
    tensors = [torch.tensor(np.ascontiguousarray(each), requires_grad=True) for each in shapes]
    hidden = torch.tanh(torch.tensor(x_fit) @ tensors[0].T + tensors[1])
    error = hidden @ tensors[2].T + tensors[3] - torch.tensor(y_fit)
    grads = torch.autograd.grad((error**2).mean(), tensors, create_graph=True)
    squares = sum((each**2).sum() for each in grads)
    by_torch = np.concatenate(
        [each.numpy().ravel() for each in torch.autograd.grad(squares, tensors)]
    )
    start = to_vector(shapes)
    own = 2 * product_at(start, loss_and_gradient(start)[1])
    print(f"gradient of |g|^2: largest relative difference {np.abs(own / by_torch - 1).max():.1e}")

# %% [markdown]
# ## What you have learnt
#
# * The Hessian is the derivative of the gradient; for $n$ parameters it has $n^2$ numbers, and nobody builds it.
# * $Hv$ is the gradient's velocity when the parameters move along $v$: differentiate each line of forward and backward. Exact, for the price of
#   about two gradients, and with no step size to choose. Differences lose a third of the digits at best.
# * $\nabla|g|^2 = 2Hg$. A step along it multiplies errors by $1 - \alpha\lambda - 2\beta\lambda^2$: faster where it was fast, and drawn to saddle points.
# * Newton's step divides by the curvature instead. Conjugate gradients find it with products alone; damping keeps it from running uphill.
# * Checkpointing works on second derivatives as on first ones: same bits, less memory.
#
# ## To read
#
# * B. A. Pearlmutter, "Fast exact multiplication by the Hessian", *Neural Computation* 6(1), 1994: the method of part 2.
# * J. Nocedal and S. J. Wright, *Numerical Optimization*, 2nd edition, Springer, 2006: chapter 5 (conjugate gradients), chapter 7 (Newton with
#   products alone).
# * J. Martens, "Deep learning via Hessian-free optimization", *ICML*, 2010: part 4, for deep networks.
# * W. Squire and G. Trapp, "Using complex variables to estimate derivatives of real functions", *SIAM Review* 40(1), 1998: the
#   trick in the tests.
# * Y. N. Dauphin et al., "Identifying and attacking the saddle point problem in high-dimensional non-convex optimization", *NIPS*, 2014,
#   arXiv:1406.2572.
# * J. M. Cohen, S. Kaur, Y. Li, J. Z. Kolter and A. Talwalkar, "Gradient descent on neural networks typically occurs at the edge of
#   stability", *ICLR*, 2021, arXiv:2103.00065.
# * A. Griewank and A. Walther, *Evaluating Derivatives*, 2nd edition, SIAM, 2008: forward over reverse, and what it costs.
