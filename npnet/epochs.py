"""An epoch: the steps of one pass over the data, and what is measured after it."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

from npnet.backend import backend_of, to_backend
from npnet.batching import batches
from npnet.checkpoint import digest
from npnet.failures import first_not_finite
from npnet.interrupts import Interrupts
from npnet.layer import Pair
from npnet.losses import TrainingDiverged, accuracy
from npnet.recipe import Recipe, mode
from npnet.run import TrainingRun

Step = Callable[[Iterator[Pair], int], float]
"""One update: takes its micro-batches from the iterator, so many samples; returns the loss before it."""


def train_epoch(recipe: Recipe, run: TrainingRun, step: Step, interrupts: Interrupts) -> None:
    """An epoch, from its beginning or from where it was saved."""
    from tqdm.auto import tqdm

    (x, y), window, steps = recipe.training_data, recipe.window, recipe.steps
    model, optimizer, ranks = recipe.model, recipe.optimizer, recipe.ranks
    run.begin_epoch()
    done, score, rate = len(run.losses), None, optimizer.learning_rate
    number = done  # of the step under way
    what = {"desc": f"epoch {run.number}", "unit": "step", "disable": not recipe.log, "mininterval": 0.5}
    progress = tqdm(total=steps, initial=done, **what)
    try:
        part = (ranks.rank, ranks.size)
        raw = batches(x, y, recipe.batch_size, run.generator, recipe.shuffle, start=done * window, part=part)
        micro_batches = recipe.feed.pairs(raw)
        with mode(model, training=True):
            for number in range(done, steps):
                began, ranks.signal = time.perf_counter(), interrupts.pending
                if recipe.decay:
                    past = (run.epoch * steps + number) / (recipe.epochs * steps)
                    optimizer.learning_rate = rate * (1 - past)
                samples = min(window, len(x) - number * window)
                run.losses.append(step(itertools.islice(micro_batches, recipe.accumulation_steps), samples))
                run.seconds += time.perf_counter() - began
                if recipe.log:
                    progress.set_postfix(_readings(run.losses, run.history.accuracy, recipe.show), refresh=False)
                progress.update()
                # several ranks end after the same step, whenever each one's signal came
                ending = interrupts.pending if ranks.size == 1 else ranks.agreed_signal
                if recipe.saver is not None:
                    recipe.saver.step_done(run, ending=ending is not None)
                interrupts.check(ending)
        score = _evaluated(recipe)
        if ranks.size > 1:
            weights = [digest(parameter.value).hex()[:16] for parameter in model.parameters()]
            ranks.alike({f"weights after epoch {run.number}": weights})
        progress.set_postfix(_readings(run.losses, score, recipe.show))
    except TrainingDiverged as error:
        raise located(error, recipe, run.number, min(number + 1, steps)) from None
    finally:
        optimizer.learning_rate = rate
        progress.close()
        run.end_epoch(score)


def _evaluated(recipe: Recipe) -> float | None:
    """The accuracy on the test data, if there are some; each rank evaluates its share.

    Raises:
        TrainingDiverged: an output is not finite; with the layer where that begins.
    """
    if recipe.test_data is None:
        return None
    (x, y), model, ranks, score = recipe.test_data, recipe.model, recipe.ranks, 0.0
    share, samples = ranks.share(len(x)), len(x)
    x, y = x[share], y[share]
    with ranks.together(), mode(model, training=False):
        try:
            if len(x):
                there = backend_of(y).name
                score = accuracy(lambda rows: to_backend(model.predict(recipe.feed(rows)), there), x, y)
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{error}; {first_not_finite(model.layers, recipe.feed(x[:1000]))}") from None
    return ranks.total(round(score * len(x))) / samples


def located(error: TrainingDiverged, recipe: Recipe, epoch: int, step: int) -> TrainingDiverged:
    """The error, with where in the training it was, and what is left of that."""
    saved = f"; {recipe.saver.last}" if recipe.saver else ""
    return TrainingDiverged(f"epoch {epoch}, step {step} of {recipe.steps}: {error}{saved}")


def _readings(losses: list[float], score: float | None, show: Mapping[str, str] | None) -> dict[str, str]:
    """What stands behind the progress bar: the mean of the last 100 losses, and the last accuracy on the test data."""
    accuracy = "-" if score is None else f"{score:.4f}"
    return {"loss": f"{statistics.fmean(losses[-100:]):.4f}", "test accuracy": accuracy, **(show or {})}
