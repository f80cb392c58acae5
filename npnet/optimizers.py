"""Optimizers: what becomes of a gradient.

``step(parameters)`` updates them in place and frees their gradients (whose buffers it may overwrite). Called
for one layer at a time during the backward pass, it keeps all gradients from ever being alive together;
called once at the end it is the ordinary step. Both give the same numbers.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np

from npnet.backend import Array, array_module
from npnet.checks import check_kind, check_number
from npnet.layer import Parameter
from npnet.losses import check_finite


def check_parameters(parameters: Iterable[Parameter]) -> list[Parameter]:
    """``parameters`` as a list.

    Raises:
        TypeError: they are not parameters.
    """
    try:
        given = list(parameters)
    except TypeError:
        given = [parameters]  # type: ignore[list-item]
    for each in given:
        check_kind(each, Parameter, "parameters", "those that model.parameters() gives")
    return given


class Optimizer:
    """Updates parameters from their gradients; keeps what it has to remember per parameter."""

    learning_rate: float
    weight_decay: float = 0.0

    def step(self, parameters: Iterable[Parameter]) -> None:
        """Update every parameter that has a gradient, and set the gradient to None."""
        try:
            for parameter in parameters:
                if parameter.gradient is not None:
                    if self.weight_decay:
                        parameter.gradient += parameter.value * self.weight_decay
                    self._update(parameter, parameter.gradient)
                    parameter.gradient = None
        except (AttributeError, TypeError):
            check_parameters(parameters)  # the reason, most likely
            raise

    def zero_grad(self, parameters: Iterable[Parameter]) -> None:
        """Forget the gradients, before new ones are added up."""
        for parameter in check_parameters(parameters):
            parameter.gradient = None

    @property
    def state_arrays(self) -> int:
        """How many arrays of a parameter's size are kept from step to step."""
        return 0

    def _update(self, parameter: Parameter, gradient: Array) -> None:
        raise NotImplementedError(f"{type(self).__name__}._update")


class SGD(Optimizer):
    """w <- w - eta v  with  v <- momentum v + g  (v = g without momentum).

    The form of ``torch.optim.SGD``. Sutskever et al., "On the importance of initialization and momentum in deep
    learning", 2013, have eta inside v instead: the same as long as eta does not change. With ``weight_decay`` the
    gradient is that of the loss + weight_decay / 2 * |w|^2.
    """

    def __init__(self, learning_rate: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.weight_decay = check_number(weight_decay, "weight_decay")
        self.learning_rate = check_number(learning_rate, "learning_rate")
        self.momentum = check_number(momentum, "momentum", below=1.0)
        self._velocity: dict[Parameter, Array] = {}

    @property
    def state_arrays(self) -> int:
        return 1 if self.momentum else 0

    def _update(self, parameter: Parameter, gradient: Array) -> None:
        xp, weight = array_module(gradient), parameter.writable()
        if self.momentum:
            velocity = self._velocity.get(parameter)
            if velocity is None:
                self._velocity[parameter] = gradient.copy(order="K")
            else:
                xp.multiply(velocity, self.momentum, out=velocity)
                xp.add(velocity, gradient, out=velocity)
                xp.copyto(gradient, velocity)
        xp.multiply(gradient, self.learning_rate, out=gradient)
        xp.subtract(weight, gradient, out=weight)


class Adam(Optimizer):
    """m <- b1 m + (1-b1) g,  v <- b2 v + (1-b2) g^2,  w <- w - eta m' / (sqrt(v') + eps),
    with m' = m / (1 - b1^t) and v' = v / (1 - b2^t).

    Kingma & Ba, "Adam: A Method for Stochastic Optimization", 2015, algorithm 1. ``weight_decay`` as for `SGD`.
    """

    def __init__(
        self,
        learning_rate: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.weight_decay = check_number(weight_decay, "weight_decay")
        self.learning_rate = check_number(learning_rate, "learning_rate")
        self.beta1, self.beta2 = check_number(beta1, "beta1", below=1.0), check_number(beta2, "beta2", below=1.0)
        self.epsilon = check_number(epsilon, "epsilon")
        self._state: dict[Parameter, tuple[Array, Array, int]] = {}  # m, v, and t: the steps taken

    @property
    def state_arrays(self) -> int:
        return 2

    def _update(self, parameter: Parameter, gradient: Array) -> None:
        xp, weight = array_module(gradient), parameter.writable()
        mean, square, t = self._state.get(parameter) or (xp.zeros_like(gradient), xp.zeros_like(gradient), 0)
        t += 1
        self._state[parameter] = mean, square, t
        # In place throughout: the gradient's own buffer holds (1-b1) g, then (1-b2) g^2, then the step.
        xp.multiply(gradient, 1 - self.beta1, out=gradient)
        xp.multiply(mean, self.beta1, out=mean)
        xp.add(mean, gradient, out=mean)
        xp.multiply(gradient, gradient, out=gradient)
        xp.multiply(gradient, (1 - self.beta2) / (1 - self.beta1) ** 2, out=gradient)
        xp.multiply(square, self.beta2, out=square)
        xp.add(square, gradient, out=square)
        step = gradient
        xp.sqrt(square, out=step)
        xp.multiply(step, 1 / math.sqrt(1 - self.beta2**t), out=step)
        xp.add(step, self.epsilon, out=step)
        xp.divide(mean, step, out=step)
        xp.multiply(step, self.learning_rate / (1 - self.beta1**t), out=step)
        xp.subtract(weight, step, out=weight)


def clip_grad_norm(parameters: Iterable[Parameter], max_norm: float) -> float:
    """Scale all gradients by the same factor, so that their norm together is at most ``max_norm``.

    Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks", 2013, algorithm 1.

    Returns:
        The norm before: the square root of the sum of all squares.

    Raises:
        TrainingDiverged: it is not finite.
    """
    max_norm, given = check_number(max_norm, "max_norm"), check_parameters(parameters)
    gradients = [each.gradient for each in given if each.gradient is not None]
    squares = 0.0
    for gradient in gradients:
        flat = gradient.ravel(order="K")
        with np.errstate(over="ignore", invalid="ignore"):  # found below
            squares += float(array_module(flat).dot(flat, flat))
    norm = check_finite(math.sqrt(squares), "the norm of the gradient")
    if norm > max_norm:
        for gradient in gradients:
            gradient *= max_norm / norm
    return norm


OPTIMIZERS: dict[str, Callable[[float], Optimizer]] = {
    "sgd": SGD,
    "momentum": lambda learning_rate: SGD(learning_rate, momentum=0.9),
    "adam": Adam,
}
"""Optimizers by name, from the learning rate alone."""
