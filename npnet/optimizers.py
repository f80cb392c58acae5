"""Optimizers: what becomes of a gradient.

``step(parameters)`` updates them in place and frees their gradients (whose buffers it may overwrite). Called once at
the end it is the ordinary step: all or nothing, since whatever memory it needs is allocated before the first number
changes. Called for one layer at a time during the backward pass ("streaming"), it keeps all gradients from ever being
alive together. Both give the same numbers.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np

from npnet.attributes import Checks, Settings
from npnet.backend import Array, along_rows, array_module, backend_of, dot, to_backend, to_host
from npnet.checks import check_flag, check_kind, check_mapping, check_number, shown
from npnet.losses import check_finite
from npnet.parameter import Parameter

_SHARE = partial(check_number, below=1.0)


def check_parameters(parameters: Iterable[Parameter]) -> list[Parameter]:
    """``parameters`` as a list.

    Raises:
        TypeError: they are not parameters.
        ValueError: one is there twice.
    """
    try:
        given = list(parameters)
    except TypeError:
        given = [parameters]  # type: ignore[list-item]
    for each in given:
        check_kind(each, Parameter, "parameters", "those that model.parameters() gives")
    if len(set(given)) < len(given):
        raise ValueError("parameters: one of them is there twice; give each once")
    return given


class Optimizer(Settings):
    """Updates parameters from their gradients; keeps what it has to remember per parameter.

    A subclass says in `state_names` what that is, and writes `_update`. Settings may change between steps, and are
    checked then, too.
    """

    learning_rate: float
    weight_decay: float
    _checks: ClassVar[Checks] = {"learning_rate": check_number, "weight_decay": check_number}
    _synonyms: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("lr", "eta", "rate", "step_size"), "learning_rate"),
        **dict.fromkeys(("l2", "decay"), "weight_decay"),
        "param_groups": "learning_rate and the other settings; the parameters are given to step",
    }

    def __init__(self, learning_rate: float = 1e-3, weight_decay: float = 0.0) -> None:
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self._state: dict[Parameter, dict[str, Any]] = {}  # arrays by name, and "steps" taken

    def __repr__(self) -> str:
        """The learning rate, and what was given that is not the default."""
        taken = inspect.signature(type(self)).parameters.items()
        given = {name: getattr(self, name, each.default) for name, each in taken}
        said = [
            f"{name}={given[name]!r}" for name, each in taken if name == "learning_rate" or given[name] != each.default
        ]
        return f"{type(self).__name__}({', '.join(said)})"

    @property
    def state_names(self) -> tuple[str, ...]:
        """The arrays of a parameter's size that are kept from step to step."""
        return ()

    not_negative: ClassVar[tuple[str, ...]] = ()
    """The names among them whose arrays hold squares: `load_state_dict` refuses negative numbers there."""

    def step(self, parameters: Iterable[Parameter]) -> None:
        """Update every parameter that has a gradient, and set the gradient to None.

        Raises:
            MemoryError: no parameter was changed.
        """
        self._update_each(self.prepare(parameters))

    def zero_grad(self, parameters: Iterable[Parameter]) -> None:
        """Forget the gradients, before new ones are added up."""
        for parameter in check_parameters(parameters):
            parameter.gradient = None

    def prepare(self, parameters: Iterable[Parameter]) -> list[Parameter]:
        """Allocate whatever their updates take, and add the weight decay to the gradients: once before an update.

        Returns:
            The parameters that have a gradient.

        Raises:
            ValueError: a parameter is there twice.
        """
        try:
            ready = [parameter for parameter in parameters if parameter.gradient is not None]
        except (AttributeError, TypeError):
            check_parameters(parameters)  # the reason, most likely
            raise
        if len(set(ready)) < len(ready):
            check_parameters(ready)
        weights = [self._allocate(parameter) for parameter in ready]
        if self.weight_decay:
            for parameter, weight in zip(ready, weights, strict=True):
                xp, decay = array_module(weight), array_module(weight).empty_like(weight)
                rows, target = along_rows(weight, decay)
                xp.multiply(rows, self.weight_decay, out=target)
                parameter.accumulate(decay)
        return ready

    def _allocate(self, parameter: Parameter) -> Array:
        """Allocate what an update of the parameter takes besides its gradient; returns the array that it overwrites."""
        weight = parameter.writable()
        if self.state_names and parameter not in self._state:
            zeros = array_module(weight).zeros_like
            self._state[parameter] = {**{name: zeros(weight) for name in self.state_names}, "steps": 0}
        return weight

    def _update_each(self, ready: Sequence[Parameter]) -> None:
        """Update them, whose gradients are there; nothing may fail here."""
        for parameter in ready:
            self._update(parameter, parameter.take_gradient(), *self._next_factors(parameter))

    def _next_factors(self, parameter: Parameter) -> tuple[float, ...]:
        """The factors of the parameter's next update, which is counted."""
        state = self._state.get(parameter, {"steps": 0})
        state["steps"] += 1
        return self._factors(state["steps"])

    def _factors(self, steps: int) -> tuple[float, ...]:
        """The numbers of the formula that change from step to step, for a parameter's update number ``steps``."""
        return ()

    def _update(self, parameter: Parameter, gradient: Array, *factors: Any) -> None:
        """Change the parameter's value, overwriting ``gradient``, without allocating arrays: nothing may fail here."""
        raise NotImplementedError(f"{type(self).__name__}._update")

    def held(self, parameters: Iterable[Parameter]) -> list[Array]:
        """All arrays that stay from step to step: the parameters' values, and what is kept for each."""
        given = check_parameters(parameters)
        held = [parameter.value for parameter in given]
        for parameter in given:
            held += [array for kind, array in self._state.get(parameter, {}).items() if kind != "steps"]
        return held

    def config(self) -> dict[str, float]:
        """The arguments that make an optimizer like this one."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def state_dict(self, parameters: Mapping[str, Parameter]) -> dict[str, Array]:
        """What is remembered of ``parameters``, on the host: "mean/0.weight" and so on; not copied.

        Parameters that were never updated are left out: there are zeros at most, which say nothing.

        Args:
            parameters: by name, as from `npnet.Layer.named_parameters`.
        """
        check_parameters(check_mapping(parameters, "parameters", "model.named_parameters()").values())
        return {
            f"{kind}/{name}": to_host(value)
            for name, parameter in parameters.items()
            for kind, value in self._state.get(parameter, {}).items()
            if self._state[parameter]["steps"]
        }

    def _forget(self, parameters: Iterable[Parameter]) -> None:
        """Begin anew with these parameters."""
        for parameter in check_parameters(parameters):
            self._state.pop(parameter, None)

    def _adopt(self, name: str, array: Array, parameters: Mapping[str, Parameter]) -> None:
        """Remember one entry of another optimizer's `state_dict`: ``array`` itself, where it is on the host."""
        kind, _, of = name.partition("/")
        parameter = parameters[of]
        kept = int(array) if kind == "steps" else to_backend(array, backend_of(parameter.value).name)
        self._state.setdefault(parameter, {"steps": 0})[kind] = kept

    def load_state_dict(self, state: Mapping[str, Array], parameters: Mapping[str, Parameter]) -> None:
        """Remember what `state_dict` gave, for these parameters, instead of what is remembered now.

        Raises:
            ValueError: an entry is missing, unknown, or does not fit; nothing is changed.
        """
        check_mapping(state, "state", "what state_dict gave")
        check_parameters(check_mapping(parameters, "parameters", "model.named_parameters()").values())
        kinds, fresh = ("steps", *self.state_names), {}
        known = {f"{kind}/{name}" for name in parameters for kind in kinds}
        if not set(state) <= known:
            raise ValueError(f"load_state_dict: the state has unknown {', '.join(map(shown, set(state) - known))}")
        for name, parameter in parameters.items():
            given = {kind: to_host(state[f"{kind}/{name}"]) for kind in kinds if f"{kind}/{name}" in state}
            if not given:
                continue  # the parameter was never updated
            missing = set(kinds) - set(given)
            if missing:
                raise ValueError(f"load_state_dict: the state lacks {', '.join(sorted(missing))} of {name}")
            steps, weight = given.pop("steps"), parameter.value
            if steps.shape != () or steps.dtype.kind not in "iu" or not 0 <= steps < 2**62:
                raise ValueError(f"load_state_dict: steps/{name}: expected a whole number, got {steps!r}")
            for kind, array in given.items():
                if array.shape != weight.shape or array.dtype != weight.dtype:
                    raise ValueError(
                        f"load_state_dict: {kind}/{name}: expected shape {weight.shape} and dtype {weight.dtype}, got "
                        f"{array.shape} and {array.dtype}"
                    )
                if kind in self.not_negative and array.size and array.min() < 0:
                    raise ValueError(f"load_state_dict: {kind}/{name}: expected numbers of at least 0")
            backend = backend_of(weight).name
            order: Any = "F" if weight.flags.f_contiguous else "C"  # an update goes through all in one order
            arrays = {kind: to_backend(array.copy(order=order), backend) for kind, array in given.items()}
            fresh[parameter] = {**arrays, "steps": int(steps)}
        self._forget(parameters.values())
        self._state |= fresh


class SGD(Optimizer):
    """w <- w - eta v  with  v <- momentum v + g  (v = g without momentum).

    The form of ``torch.optim.SGD``. Sutskever et al., "On the importance of initialization and momentum in deep
    learning", 2013, have eta inside v instead: the same as long as eta does not change. With ``weight_decay`` the
    gradient is that of the loss + weight_decay / 2 * |w|^2.
    """

    _checks: ClassVar[Checks] = {**Optimizer._checks, "momentum": _SHARE}

    def __init__(self, learning_rate: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(learning_rate, weight_decay)
        self.momentum = momentum

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("velocity",) if self.momentum else ()

    def _factors(self, steps: int) -> tuple[float, ...]:
        return (self.learning_rate,)

    def _update(self, parameter: Parameter, gradient: Array, *factors: Any) -> None:
        xp, weight, (rate,) = array_module(gradient), parameter.value, factors
        if self.momentum:
            velocity = self._state[parameter]["velocity"]
            xp.multiply(velocity, self.momentum, out=velocity)
            xp.add(velocity, gradient, out=velocity)
            xp.multiply(velocity, rate, out=gradient)
        else:
            xp.multiply(gradient, rate, out=gradient)
        xp.subtract(weight, gradient, out=weight)


class Adam(Optimizer):
    """m <- b1 m + (1-b1) g,  v <- b2 v + (1-b2) g^2,  w <- w - eta m' / (sqrt(v') + eps),
    with m' = m / (1 - b1^t) and v' = v / (1 - b2^t).

    Kingma & Ba, "Adam: A Method for Stochastic Optimization", 2015, algorithm 1. ``weight_decay`` as for `SGD`. What is
    kept is m / (1-b1) and v / (1-b2), which saves a quarter of the passes over memory.
    """

    _checks: ClassVar[Checks] = {**Optimizer._checks, "beta1": _SHARE, "beta2": _SHARE, "epsilon": check_number}
    _synonyms: ClassVar[Mapping[str, str]] = {
        **Optimizer._synonyms, "betas": "beta1 and beta2", "momentum": "beta1", "eps": "epsilon"
    }  # fmt: skip

    def __init__(
        self,
        learning_rate: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(learning_rate, weight_decay)
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon

    @property
    def state_names(self) -> tuple[str, ...]:
        return "mean", "square"

    not_negative = ("square",)

    def _factors(self, steps: int) -> tuple[float, ...]:
        scale = math.sqrt((1 - self.beta2) / (1 - self.beta2**steps))  # sqrt(v') = scale * sqrt(square)
        return self.epsilon / scale, self.learning_rate * (1 - self.beta1) / (1 - self.beta1**steps) / scale

    def _update(self, parameter: Parameter, gradient: Array, *factors: Any) -> None:
        xp, weight, state = array_module(gradient), parameter.value, self._state[parameter]
        mean, square, (epsilon, rate) = state["mean"], state["square"], factors
        xp.multiply(mean, self.beta1, out=mean)
        xp.add(mean, gradient, out=mean)
        xp.multiply(gradient, gradient, out=gradient)
        xp.multiply(square, self.beta2, out=square)
        xp.add(square, gradient, out=square)
        step = gradient
        xp.sqrt(square, out=step)
        xp.add(step, epsilon, out=step)
        xp.divide(mean, step, out=step)
        xp.multiply(step, rate, out=step)
        xp.subtract(weight, step, out=weight)


def clip_grad_norm(parameters: Iterable[Parameter], max_norm: float, *, error_if_nonfinite: bool = False) -> float:
    """Scale all gradients by the same factor, so that their norm together is at most ``max_norm``.

    A norm that is not finite scales nothing: with scaled gradients, `GradScaler.step` then skips the update. Pascanu,
    Mikolov & Bengio, "On the difficulty of training recurrent neural networks", 2013, algorithm 1.

    Args:
        parameters: whose gradients, as from ``model.parameters()``.
        max_norm: the most that the norm may be.
        error_if_nonfinite: raise an error if it is infinite or NaN, before anything is updated.

    Returns:
        The norm before: the square root of the sum of all squares.

    Raises:
        TrainingDiverged: it is not finite, with ``error_if_nonfinite``.
    """
    max_norm, given = check_number(max_norm, "max_norm"), check_parameters(parameters)
    error_if_nonfinite = check_flag(error_if_nonfinite, "error_if_nonfinite")
    gradients = [each.gradient for each in given if each.gradient is not None]
    squares: Any = 0.0
    for gradient in gradients:
        flat = gradient.ravel(order="K")
        with np.errstate(over="ignore", invalid="ignore"):  # found below
            squares = dot(flat, flat).astype(np.float64) + squares
    norm = math.sqrt(float(squares))  # on a device the one wait
    if math.isinf(norm):  # the squares overflow earlier than the numbers
        largest = max(float(abs(gradient).max()) for gradient in gradients if gradient.size)
        if math.isfinite(largest):
            parts = [(gradient / largest).ravel(order="K") for gradient in gradients]
            norm = largest * math.sqrt(sum(float(dot(part, part)) for part in parts))
    if error_if_nonfinite:
        check_finite(norm, "the norm of the gradient")
    if max_norm < norm < math.inf:
        for (gradient,) in map(along_rows, gradients):
            gradient *= max_norm / norm
    return norm


OPTIMIZERS: dict[str, Callable[[float], Optimizer]] = {
    "sgd": SGD,
    "momentum": lambda learning_rate: SGD(learning_rate, momentum=0.9),
    "adam": Adam,
}
"""Optimizers by name, from the learning rate alone."""
