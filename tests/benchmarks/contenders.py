"""One training step, the same mathematics, in npnet and in what people would use instead.

A contender is made from a `Problem` and called with a batch; ``weights()`` gives its weights, so that all can be shown
to have computed the same. Everybody starts from the same weights, (out, in).
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

import npnet
from tests.classic_code import load_classic

RATE = {"lab": 0.1, "modern": 1e-3}


@dataclass(frozen=True)
class Problem:
    """A network, a batch size and a dtype; "lab": sigmoid, quadratic cost, SGD; "modern": ReLU, cross-entropy, Adam."""

    name: str
    sizes: tuple[int, ...]
    batch: int
    dtype: str
    kind: str
    near_identity: bool = False  # square weights, so that in ten thousand layers nothing vanishes: denormals are slow

    @cached_property
    def weights(self) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        if self.near_identity:
            pairs = zip(self.sizes[:-1], self.sizes[1:], strict=True)
            return [(np.eye(m, n) + 1e-3 * rng.standard_normal((m, n))).astype(self.dtype) for n, m in pairs]
        scale = 2.0 if self.kind == "modern" else 1.0
        return [
            (rng.standard_normal((m, n)) * math.sqrt(scale / n)).astype(self.dtype)
            for n, m in zip(self.sizes[:-1], self.sizes[1:], strict=True)
        ]

    @cached_property
    def batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        rng = np.random.default_rng(1)
        one_hot = np.eye(self.sizes[-1], dtype=self.dtype)
        return [
            (
                rng.random((self.batch, self.sizes[0])).astype(self.dtype),
                one_hot[rng.integers(0, self.sizes[-1], self.batch)],
            )
            for _ in range(2)
        ]

    @property
    def rate(self) -> float:
        """The learning rate; a tiny one where a thousand updates must not make ten thousand layers explode."""
        return RATE[self.kind] * (1e-6 if self.near_identity else 1.0)

    @property
    def segment(self) -> int:
        """Layers between checkpoints: the square root of the depth."""
        return round(math.sqrt(len(self.weights)))


class Contender(Protocol):
    """A training step."""

    def __call__(self, x: np.ndarray, y: np.ndarray) -> None: ...
    def weights(self) -> list[np.ndarray]: ...


class Floor:
    """The matrix products of a step alone, on arrays that are there: what no NumPy library can beat."""

    def __init__(self, problem: Problem) -> None:
        dtype, batch = problem.dtype, problem.batch
        self.matrices = [np.asfortranarray(w) for w in problem.weights]
        self.outputs = [np.zeros((batch, n), dtype) for n in problem.sizes[1:]]
        self.inputs = [np.zeros((batch, n), dtype) for n in problem.sizes[:-1]]
        self.gradients = [np.zeros(w.T.shape, dtype) for w in problem.weights]

    def __call__(self, x: np.ndarray, y: np.ndarray) -> None:
        inputs = [x, *self.inputs[1:]]
        for a, w, z in zip(inputs, self.matrices, self.outputs, strict=True):
            np.dot(a, w.T, out=z)
        for layer in reversed(range(len(inputs))):
            np.dot(inputs[layer].T, self.outputs[layer], out=self.gradients[layer])
            if layer:
                np.dot(self.outputs[layer], self.matrices[layer], out=self.inputs[layer])

    def weights(self) -> list[np.ndarray]:
        return []


class NpnetStep:
    def __init__(self, problem: Problem, schedule: str = "none") -> None:
        lab = problem.kind == "lab"
        names = ("sigmoid", "sigmoid") if lab else ("relu", "identity")
        self.model = npnet.mlp(problem.sizes, *names, dtype=problem.dtype, rng=0)
        for layer, weight in zip(self.model.layers, problem.weights, strict=True):
            layer.weight.value = np.asfortranarray(weight)
        self.loss: npnet.Loss = npnet.Quadratic() if lab else npnet.SoftmaxCrossEntropy()
        self.optimizer: npnet.Optimizer = npnet.SGD(problem.rate) if lab else npnet.Adam(problem.rate)
        self.schedule = npnet.schedules.as_schedule(schedule, len(self.model.layers))

    def __call__(self, x: np.ndarray, y: np.ndarray) -> None:
        npnet.train_step(self.model, self.loss, self.optimizer, self.schedule, x, y)

    def weights(self) -> list[np.ndarray]:
        return [layer.weight.value for layer in self.model.layers]


class CapturedNpnet(NpnetStep):
    """The same step as a recorded list of NumPy calls."""

    def __init__(self, problem: Problem, schedule: str = "none") -> None:
        super().__init__(problem, schedule)
        self.step = npnet.CapturedStep(self.model, self.loss, self.optimizer, schedule)

    def __call__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.step(x, y)


class ClassicStep:
    def __init__(self, problem: Problem, every: int = 0) -> None:
        code, self.rate = load_classic(), problem.rate
        sizes = list(problem.sizes)
        self.network = code.NetworkWithCheckpointing(sizes, every) if every else code.Network(sizes)
        self.network.weights = [w.copy() for w in problem.weights]
        self.network.biases = [np.zeros((n, 1), problem.dtype) for n in sizes[1:]]

    def __call__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.network.update_mini_batch((x, y), self.rate)

    def weights(self) -> list[np.ndarray]:
        return self.network.weights


class TorchStep:
    """``how``: eager, compile, or checkpoint_sequential, reentrant or not."""

    def __init__(self, problem: Problem, how: str = "eager") -> None:
        import torch
        from torch.utils.checkpoint import checkpoint_sequential

        dtype, lab = getattr(torch, problem.dtype), problem.kind == "lab"
        layers: list[Any] = []
        for number, weight in enumerate(problem.weights, 1):
            linear = torch.nn.Linear(*weight.shape[::-1], dtype=dtype)
            with torch.no_grad():
                linear.weight.copy_(torch.from_numpy(weight))
                linear.bias.zero_()
            last = number == len(problem.weights)
            rest = [torch.nn.Sigmoid()] if lab else [] if last else [torch.nn.ReLU()]
            layers.append(torch.nn.Sequential(linear, *rest))
        model = torch.nn.Sequential(*layers)
        optimizer = (torch.optim.SGD if lab else torch.optim.Adam)(model.parameters(), problem.rate)

        def loss_of(output: Any, y: Any) -> Any:
            if lab:
                return ((output - y) ** 2).sum() / (2 * len(y))
            return torch.nn.functional.cross_entropy(output, y)

        run: Callable[[Any], Any] = model
        if how.startswith("checkpoint"):
            segments = len(layers) // problem.segment

            def run(x: Any) -> Any:
                reentrant = how == "checkpoint reentrant"
                return checkpoint_sequential(model, segments, x.requires_grad_(reentrant), use_reentrant=reentrant)

        def forward_loss(x: Any, y: Any) -> Any:
            return loss_of(run(x), y)

        if how == "compile":
            forward_loss = torch.compile(forward_loss)
        self.torch, self.layers, self.optimizer, self.forward_loss = torch, layers, optimizer, forward_loss

    def __call__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward_loss(self.torch.from_numpy(x), self.torch.from_numpy(y))
        loss.backward()
        self.optimizer.step()
        loss.item()  # npnet looks at its loss, too

    def weights(self) -> list[np.ndarray]:
        return [layer[0].weight.detach().numpy() for layer in self.layers]


class JaxStep:
    """The whole step compiled by ``jax.jit``, with its buffers donated; with ``checkpoint`` its segments recomputed."""

    def __init__(self, problem: Problem, checkpoint: bool = False) -> None:
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_enable_x64", True)
        lab, rate, depth = problem.kind == "lab", problem.rate, len(problem.weights)
        self.jax = jax
        parameters = [(jnp.array(w), jnp.zeros(len(w), problem.dtype)) for w in problem.weights]
        zeros = jax.tree.map(jnp.zeros_like, parameters)
        self.state = (
            parameters,
            None if lab else (zeros, jax.tree.map(jnp.zeros_like, parameters), jnp.zeros((), "int32")),
        )

        def layers(a: Any, some: Any, first: int) -> Any:
            for number, (w, b) in enumerate(some, first):
                z = a @ w.T + b
                a = jax.nn.sigmoid(z) if lab else z if number == depth - 1 else jax.nn.relu(z)
            return a

        def loss_of(parameters: Any, x: Any, y: Any) -> Any:
            if checkpoint:
                for first in range(0, depth, problem.segment):
                    part = jax.checkpoint(lambda a, some, first=first: layers(a, some, first))
                    x = part(x, parameters[first : first + problem.segment])
                output = x
            else:
                output = layers(x, parameters, 0)
            if lab:
                return ((output - y) ** 2).sum() / (2 * len(y))
            return -(y * jax.nn.log_softmax(output)).sum() / len(y)

        def adam(w: Any, g: Any, m: Any, v: Any, t: Any) -> Any:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            step = m / (1 - 0.9**t) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)
            return (w - rate * step).astype(w.dtype), m.astype(w.dtype), v.astype(w.dtype)

        def step(state: Any, x: Any, y: Any) -> Any:
            parameters, memory = state
            loss, gradients = jax.value_and_grad(loss_of)(parameters, x, y)
            if lab:
                return (jax.tree.map(lambda w, g: w - rate * g, parameters, gradients), None), loss
            m, v, t = memory
            new = jax.tree.map(lambda *four: adam(*four, t + 1.0), parameters, gradients, m, v)
            parts = jax.tree.transpose(jax.tree.structure(parameters), jax.tree.structure((0, 0, 0)), new)
            return (parts[0], (parts[1], parts[2], t + 1)), loss

        self.step = jax.jit(step, donate_argnums=0)

    def __call__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.state, loss = self.step(self.state, x, y)
        loss.block_until_ready()
        self.jax.block_until_ready(self.state)

    def weights(self) -> list[np.ndarray]:
        return [np.asarray(w) for w, _ in self.state[0]]


MAKERS: dict[str, Callable[[Problem], Any]] = {
    "npnet": NpnetStep,
    "npnet sqrt": lambda problem: NpnetStep(problem, "sqrt"),
    "npnet captured": CapturedNpnet,
    "npnet captured sqrt": lambda problem: CapturedNpnet(problem, "sqrt"),
    "floor": Floor,
    "classic": ClassicStep,
    "classic sqrt": lambda problem: ClassicStep(problem, problem.segment),
    "torch": TorchStep,
    "torch compile": lambda problem: TorchStep(problem, "compile"),
    "torch checkpoint": lambda problem: TorchStep(problem, "checkpoint"),
    "torch checkpoint reentrant": lambda problem: TorchStep(problem, "checkpoint reentrant"),
    "jax": JaxStep,
    "jax checkpoint": lambda problem: JaxStep(problem, True),
}


def available(problem: Problem) -> list[str]:
    """The contenders whose packages are there, and that can do the problem."""
    names = list(MAKERS)
    for package in ("torch", "jax"):
        if importlib.util.find_spec(package) is None:
            names = [name for name in names if not name.startswith(package)]
    try:
        load_classic()
        classic = problem.kind == "lab"
    except FileNotFoundError:
        classic = False
    return [name for name in names if classic or not name.startswith("classic")]
