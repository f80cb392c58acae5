"""An epoch: the steps of one pass over the data, and what is measured after it."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from npnet.backend import Array, backend_of, to_backend
from npnet.checkpoint import digest
from npnet.datasets import batches
from npnet.failures import first_not_finite
from npnet.feeding import Feed
from npnet.interrupts import Interrupts
from npnet.layer import Pair
from npnet.layers import Sequential
from npnet.losses import TrainingDiverged, accuracy
from npnet.ranks import Ranks
from npnet.run import TrainingRun
from npnet.saver import Saver


@dataclass
class Loop:
    """What stays the same from epoch to epoch."""

    run: TrainingRun
    step: Callable[[Iterator[Pair], int], float]
    x: Array
    y: Array
    test_data: Pair | None
    prepared: Feed
    batch_size: int
    accumulation_steps: int
    shuffle: bool
    epochs: int
    decay: bool
    saver: Saver | None
    show: Mapping[str, str] | None
    log: bool
    ranks: Ranks

    @property
    def window(self) -> int:
        """Samples to an update."""
        return self.batch_size * self.accumulation_steps

    @property
    def steps(self) -> int:
        """Updates to an epoch."""
        return -(-len(self.x) // self.window)

    def epoch(self, interrupts: Interrupts) -> None:
        """An epoch, from its beginning or from where it was saved."""
        from tqdm.auto import tqdm

        run, model, optimizer, steps, ranks = self.run, self.run.model, self.run.optimizer, self.steps, self.ranks
        run.begin_epoch()
        done, score = len(run.losses), None
        number = done  # of the step under way
        what = {"desc": f"epoch {run.number}", "unit": "step", "disable": not self.log, "mininterval": 0.5}
        progress = tqdm(total=steps, initial=done, **what)
        try:
            start = done * self.window
            part = (ranks.rank, ranks.size)
            raw = batches(self.x, self.y, self.batch_size, run.generator, self.shuffle, start=start, part=part)
            micro_batches = self.prepared.pairs(raw)
            with mode(model, training=True):
                for number in range(done, steps):
                    began, ranks.signal = time.perf_counter(), interrupts.pending
                    if self.decay:
                        past = (run.epoch * steps + number) / (self.epochs * steps)
                        optimizer.learning_rate = run.learning_rate * (1 - past)
                    samples = min(self.window, len(self.x) - number * self.window)
                    run.losses.append(self.step(itertools.islice(micro_batches, self.accumulation_steps), samples))
                    run.seconds += time.perf_counter() - began
                    if self.log:
                        progress.set_postfix(_readings(run.losses, run.history.accuracy, self.show), refresh=False)
                    progress.update()
                    # several ranks end after the same step, whenever each one's signal came
                    ending = interrupts.pending if ranks.size == 1 else ranks.agreed_signal
                    if self.saver is not None:
                        self.saver.step_done(run, ending=ending is not None)
                    interrupts.check(ending)
            score = None if self.test_data is None else _evaluated(model, self.prepared, *self.test_data, ranks)
            if ranks.size > 1:
                weights = [digest(parameter.value).hex()[:16] for parameter in model.parameters()]
                ranks.alike({f"weights after epoch {run.number}": weights})
            progress.set_postfix(_readings(run.losses, score, self.show))
        except TrainingDiverged as error:
            raise located(error, run.number, min(number + 1, steps), steps, self.saver) from None
        finally:
            optimizer.learning_rate = run.learning_rate
            progress.close()
            run.end_epoch(score)


def _evaluated(model: Sequential, prepared: Callable[[Array], Array], x: Array, y: Array, ranks: Ranks) -> float:
    """The accuracy; each rank evaluates its share.

    Raises:
        TrainingDiverged: an output is not finite; with the layer where that begins.
    """
    share, samples = ranks.share(len(x)), len(x)
    x, y, score = x[share], y[share], 0.0
    with ranks.together(), mode(model, training=False):
        try:
            if len(x):
                there = backend_of(y).name
                score = accuracy(lambda rows: to_backend(model.predict(prepared(rows)), there), x, y)
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{error}; {first_not_finite(model.layers, prepared(x[:1000]))}") from None
    return ranks.total(round(score * len(x))) / samples


def located(error: TrainingDiverged, epoch: int, step: int, steps: int, saver: Saver | None) -> TrainingDiverged:
    """The error, with where in the training it was, and what is left of that."""
    saved = f"; {saver.last}" if saver else ""
    return TrainingDiverged(f"epoch {epoch}, step {step} of {steps}: {error}{saved}")


@contextmanager
def mode(model: Sequential, training: bool) -> Iterator[None]:
    """The model in training, or in evaluation, and then again as it was."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def _readings(losses: list[float], score: float | None, show: Mapping[str, str] | None) -> dict[str, str]:
    """What stands behind the progress bar: the mean of the last 100 losses, and the last accuracy on the test data."""
    accuracy = "-" if score is None else f"{score:.4f}"
    return {"loss": f"{statistics.fmean(losses[-100:]):.4f}", "test accuracy": accuracy, **(show or {})}
