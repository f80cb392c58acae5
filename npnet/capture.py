"""A training step as a flat list of NumPy calls: recorded once, done again for every batch.

On thin layers a step's time is not that of its products but of what surrounds them: looking up attributes, asking for
memory, deciding. `CapturedStep` takes that away. It runs `backpropagate` once on stand-ins for arrays, under the
schedule, with the loss and the optimizer, and keeps the calls that this makes (see `npnet.tracing`). Nothing is
written a second time: the layers, the schedule and the formulas are those of every other step, and so are the numbers,
bit for bit. What the schedule drops is dead in the recording, too: the arena is the schedule's peak.

One thing is done that eager steps do not: the arrays of a layer's parameters are moved side by side, their gradients
come to lie side by side in the arena, and one call of each kind updates them all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from npnet import into
from npnet.backend import Array, array_module
from npnet.checkpoint import backpropagate, clear_gradients
from npnet.checks import check_kind
from npnet.failures import examined, explained, rehearse
from npnet.layer import Layer, needs_saved
from npnet.losses import Loss, check_finite
from npnet.model_tree import completed_after, parameters_of
from npnet.optimizers import Optimizer
from npnet.parameter import Buffer, Parameter
from npnet.random import next_step, one_step, set_next_step, set_updates
from npnet.replay import Program, listing
from npnet.schedules import ScheduleLike, as_schedule
from npnet.step import as_chain
from npnet.tracing import CannotCapture, Factor, Recording

REPLACED = "a layer or the optimizer replaces a parameter's array instead of overwriting it"


class CapturedStep:
    """The step that `npnet.train_step` takes, recorded at the first batch of each shape.

    What a layer decides by its attributes is recorded as it was decided: make a new captured step after changing
    anything but parameters, `train` and `eval`, and the learning rate.

    Args:
        model, loss, optimizer: as for `npnet.train_step`.
        schedule: what to keep and what to recompute; see `npnet.schedules.as_schedule`.

    >>> from npnet import SGD, Quadratic, mlp
    >>> step = CapturedStep(mlp([2, 3, 1], rng=0), Quadratic(), SGD(0.1))
    >>> x, y = np.ones((5, 2), np.float32), np.zeros((5, 1), np.float32)
    >>> step(x, y) > step(x, y)
    True
    """

    def __init__(self, model: Layer, loss: Loss, optimizer: Optimizer, schedule: ScheduleLike = "none") -> None:
        self.network = as_chain(model)
        self.loss = check_kind(loss, Loss, "loss", "SoftmaxCrossEntropy()")
        self.optimizer = check_kind(optimizer, Optimizer, "optimizer", "Adam(1e-3)")
        self.schedule = as_schedule(schedule, len(self.network.layers), needs_saved(self.network.layers))
        self._forget()

    def _forget(self) -> None:
        # By shapes, dtypes and mode: the program, and what the optimizer remembers of each parameter it updates.
        self._programs: dict[Any, tuple[Program, list[dict[str, Any]]]] = {}
        self._arena: Array | None = None  # where they all run
        self._layers, self._parameters = list[Layer](), list[Parameter]()  # of the programs
        self._buffers: list[tuple[Buffer, Array]] = []  # ... and these
        self._bound: list[tuple[Parameter, Array, dict[str, Any] | None]] = []  # what programs overwrite
        # Factors are shared by the parameters that were updated as often: what is remembered of one says how often.
        self._factors: list[tuple[dict[str, Any], tuple[Factor, ...]]] = []
        self._blocks: dict[Layer, dict[str, Array]] = {}  # "value", and what the optimizer remembers, of all parameters
        self._value = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies record anew: copied calls would write into arrays that nobody reads."""
        return type(self), (self.network, self.loss, self.optimizer, self.schedule)

    @property
    def arena_bytes(self) -> int:
        """What a step takes besides the batch, the parameters and what the optimizer keeps; held from step to step."""
        return 0 if self._arena is None else len(self._arena)

    @property
    def calls(self) -> int:
        """How many NumPy calls a step makes: the longest of those recorded."""
        return max((len(program) for program, _ in self._programs.values()), default=0)

    def __call__(self, x: Array, y: Array) -> float:
        """One step on a batch.

        Args:
            x: (batch, features).
            y: (batch, outputs).

        Returns:
            The loss before the update.

        Raises:
            CannotCapture: the step does something that cannot be recorded.
            TrainingDiverged: the loss is not finite.
            OutOfMemory: memory ran out, which it can at the first batch of a shape alone.
            TypeError, ValueError: the batch does not fit.

        Whatever is raised, nothing was updated.
        """
        with explained(self.network, self.schedule, x, loss=self.loss, optimizer=self.optimizer):
            program, updated = self._program(x, y)
            for state, factors in self._factors:
                for factor, value in zip(factors, self.optimizer._factors(state["steps"] + 1), strict=True):
                    factor.set(value)
            with one_step(), np.errstate(over="ignore", invalid="ignore"):  # as in backpropagate
                program(x, y)
        for state in updated:
            state["steps"] += 1
        return self._value

    def listing(self, x: Array, y: Array) -> str:
        """The calls of a step on such a batch, for reading: see `npnet.replay.listing`."""
        self._prepare(x, y)
        return listing(self._recorded(x, y)[0])

    def _prepare(self, x: Array, y: Array) -> None:
        """Refuse what is no array of NumPy's; forget all, if other arrays are in the parameters' places by now."""
        if array_module(x) is not np or array_module(y) is not np:  # which refuses what is no array
            raise CannotCapture("steps are captured on NumPy's arrays alone")
        states, layers = self.optimizer._state, self.network.layers
        if self._parameters and (layers != self._layers or parameters_of(layers) != self._parameters):
            self._forget()
            return
        for parameter, value, state in self._bound:
            if parameter.value is not value or parameter.lent or states.get(parameter) is not state:
                self._forget()
                return
        if any(buffer.value is not value for buffer, value in self._buffers):
            self._forget()

    def _program(self, x: Array, y: Array) -> tuple[Program, list[dict[str, Any]]]:
        """The program for a batch like this one, and what the optimizer remembers of the parameters it updates."""
        self._prepare(x, y)
        kind = x.shape, x.dtype, y.shape, y.dtype, self.network.training
        if kind not in self._programs:
            recording, updated = self._recorded(x, y)
            program = Program(recording, self._arena)
            recording.calls.clear()  # stand-ins know the recording that knows them: such cycles are freed late
            if program.arena is not self._arena:  # this batch is larger than all before: the others are recorded again
                self._programs, self._arena = {}, program.arena
            self._programs[kind] = program, updated
        return self._programs[kind]

    def _recorded(self, x: Array, y: Array) -> tuple[Recording, list[dict[str, Any]]]:
        """What a step on such a batch does, and what the optimizer remembers of the parameters that it updates."""
        if self.schedule.offloads:
            raise CannotCapture("a step that moves activations out of memory cannot be recorded")
        if type(self.optimizer)._factors is Optimizer._factors:
            kind = type(self.optimizer).__name__
            raise CannotCapture(f"{kind} has no method _factors, which says what changes from step to step")
        seen = examined(self.network, self.network.layers)
        seen.check_loss(self.loss, self.network)
        recording, parameters, number = Recording(), self.network.named_parameters(), next_step()
        buffers, new_values = self.network.named_buffers(), dict[Any, Array]()
        clear_gradients(self.network.layers)
        for parameter in parameters.values():
            self.optimizer._allocate(parameter)
        if not self._blocks:
            alone = completed_after(self.network.layers) is None
            self._blocks = {layer: self._laid_out(layer) if alone else {} for layer in self.network.layers}
        remembered = self.optimizer._state
        updated: list[dict[str, Any]] = []
        inputs: Any = recording.input(x, "x")
        targets: Any = recording.input(y, "y")

        def output_gradient(output: Array) -> Array:
            value, gradient = self.loss.value_and_gradient(output, targets)
            recording.call(self._look, value)
            return gradient

        def update(layer: Layer) -> None:
            ready = self.optimizer.prepare(layer.parameters())
            updated.extend(remembered[parameter] for parameter in ready if parameter in remembered)
            counts = [remembered.get(parameter, {"steps": 0}) for parameter in ready]
            alike = len({count["steps"] for count in counts}) == 1
            whole = self._joined(recording, layer, ready) if alike else None
            for parameter, count in zip([whole] if whole else ready, counts, strict=False):
                value = parameter.value
                self.optimizer._update(parameter, parameter.take_gradient(), *self._factors_of(count))
                if parameter.value is not value:
                    raise CannotCapture(REPLACED)

        try:
            with self._stand_ins(recording, parameters, buffers), one_step(-1):
                set_updates(new_values)
                backpropagate(self.network.layers, self.schedule, inputs, output_gradient, after_backward=update)
        finally:
            set_next_step(number)  # recording counts as no step
        if seen.schedules is not None:  # layers are watched on arrays, since stand-ins hide what they change
            rehearse(self.network.layers, self.schedule, x)
        for buffer, value in new_values.items():  # at the end of the step
            recording.call(into.copy, value, buffer.value)
        self._layers, self._parameters = list(self.network.layers), parameters_of(self.network.layers)
        self._buffers = [(each, each.value) for each in buffers.values()]
        self._bound = [(each, each.value, remembered.get(each)) for each in parameters.values()]
        return recording, updated

    def _laid_out(self, layer: Layer) -> dict[str, Array]:
        """Move the arrays of a layer's parameters side by side, so that one call can update them all; and so what the
        optimizer remembers of them. Nothing, where they are of different kinds.
        """
        parameters, blocks = layer.parameters(), dict[str, Array]()
        kinds = {(each.value.dtype, each.value.flags.forc) for each in parameters}
        if len(parameters) < 2 or len(kinds) > 1 or not parameters[0].value.flags.forc:
            return blocks
        orders: list[Any] = ["C" if each.value.flags.c_contiguous else "F" for each in parameters]
        blocks["value"], values = _side_by_side([each.value for each in parameters], orders)
        for each, value in zip(parameters, values, strict=True):
            each.value = value
        for name in self.optimizer.state_names:
            states = [self.optimizer._state[each] for each in parameters]
            blocks[name], values = _side_by_side([state[name] for state in states], orders)
            for state, value in zip(states, values, strict=True):
                state[name] = value
        return blocks

    def _joined(self, recording: Recording, layer: Layer, ready: list[Parameter]) -> Parameter | None:
        """One parameter for all of the layer's, with their gradients joined, if they lie side by side."""
        blocks = self._blocks[layer]
        values: list[Any] = [each.value for each in ready]
        gradients: list[Any] = [each.gradient for each in ready]
        alike = all(a.value.strides == b.value.strides for a, b in zip(values, gradients, strict=True))
        gradient: Any = (
            recording.join(gradients) if blocks and alike and len(ready) == len(layer.parameters()) else None
        )
        if gradient is None:
            return None
        stand_ins: dict[str, Any] = {name: recording.constant(block, name) for name, block in blocks.items()}
        whole = Parameter(stand_ins.pop("value"))
        whole.gradient = gradient
        self.optimizer._state[whole] = stand_ins
        for each in ready:
            each.gradient = None
        return whole

    def _look(self, value: Array) -> None:
        """At the loss, between the forward and the backward pass: before anything is updated."""
        self._value = check_finite(value)

    def _factors_of(self, state: dict[str, Any]) -> tuple[Factor, ...]:
        """The factors of all parameters that were updated as often as the one that ``state`` is of."""
        for other, factors in self._factors:
            if other["steps"] == state["steps"]:
                return factors
        factors = tuple(Factor() for _ in self.optimizer._factors(1))
        self._factors.append((state, factors))
        return factors

    @contextmanager
    def _stand_ins(
        self, recording: Recording, parameters: dict[str, Parameter], buffers: dict[str, Buffer]
    ) -> Iterator[None]:
        """Inside it, the parameters, the buffers and what the optimizer remembers are stand-ins."""
        arrays: dict[str, Any] = parameters | buffers
        values, states = [each.value for each in arrays.values()], self.optimizer._state
        stand_ins: list[Any] = [recording.constant(each.value, name) for name, each in arrays.items()]
        names = {each: name for name, each in parameters.items()}
        self.optimizer._state = {
            each: {
                kind: value if kind == "steps" else recording.constant(value, f"{kind}/{names[each]}")
                for kind, value in state.items()
            }
            for each, state in states.items()
            if each in names
        }
        try:
            for each, stand_in in zip(arrays.values(), stand_ins, strict=True):
                each.value = stand_in
            yield
            if any(each.value is not stand_in for each, stand_in in zip(arrays.values(), stand_ins, strict=True)):
                raise CannotCapture(REPLACED)
        finally:
            self.optimizer._state = states
            for each, value in zip(arrays.values(), values, strict=True):
                each.value = value


def _side_by_side(arrays: list[Array], orders: list[Any]) -> tuple[Array, list[Array]]:
    """One row of all numbers, each array in its order, and views of the row in their shapes."""
    block = np.concatenate([array.ravel(order=order) for array, order in zip(arrays, orders, strict=True)])
    parts = np.split(block, np.cumsum([array.size for array in arrays])[:-1])
    return block, [part.reshape(a.shape, order=order) for part, a, order in zip(parts, arrays, orders, strict=True)]
