"""Saving a training run while it goes on, and resuming one that was saved."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from npnet.archive import SaveError, check_name, read_archive, write_archive
from npnet.attributes import Checks, Settings
from npnet.backend import Array
from npnet.blocks import Dropout
from npnet.checks import check_flag, check_whole
from npnet.layer import Layer
from npnet.losses import TrainingDiverged
from npnet.model_tree import all_layers
from npnet.run import TrainingRun
from npnet.savable import as_json, difference, shared_entry


class Saver(Settings):
    """Saves a training run every so many steps, when it is interrupted, and at its end: give it to `npnet.fit`.

    A save holds the weights, what the optimizer and the scaler remember, the random streams, the position within the
    epoch and the history. A run that is broken off in any way, kill -9 included, and resumed ends with the same
    weights, bit for bit, as one that was not (on the same machine, with as many BLAS threads). A save is written whole
    or not at all: see `npnet.files.replacing`. `npnet.load` gives its model.

    Args:
        path: a name that ends in .npz or .safetensors.
        every: steps from save to save.
        resume: go on from the save at ``path``, if there is one. Without, a file that is there already is refused,
            so that no training is lost by starting another.
        stop_on_error: end the training with the OSError (or MemoryError) when a save cannot be written. Otherwise that
            is a warning, and the save before stays.
        about: JSON to put into the save, for people and programs.

    Raises:
        TypeError, ValueError: ``every`` is not a whole number >= 1, or the name of the file ends otherwise.
        FileExistsError: (when the training begins) there is a file, and not ``resume``.
        FileNotFoundError: (when the training begins) there is no such folder.
    """

    _checks: ClassVar[Checks] = {
        "every": partial(check_whole, least=1), "resume": check_flag, "stop_on_error": check_flag
    }  # fmt: skip
    _synonyms: ClassVar[Mapping[str, str]] = dict.fromkeys(("interval", "frequency", "save_every"), "every")

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: int = 100,
        *,
        resume: bool = False,
        stop_on_error: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        check_name(path)
        self.path, self.every, self.resume, self.stop_on_error = Path(path), every, resume, stop_on_error
        self.about = dict(about or {})
        self.last = "nothing was saved yet"
        self._taken = 0  # steps since the last save

    def begin(self, run: TrainingRun) -> None:
        """Go on from the save, if there is one and that was asked for.

        Raises:
            FileExistsError, SaveError, OSError: see `Saver` and `npnet.load`; the run is as it was.
            ValueError: the save is that of another training; the message names what differs.
        """
        run.model.description()  # refuses what cannot be saved now, and not at the first save
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{self.path}: there is no folder {self.path.parent}; make it, or save elsewhere")
        if not self.path.exists():
            return
        if not self.resume:
            raise FileExistsError(
                f"{self.path} is there already: if it is the save of a training, go on with it (resume=True); "
                "else save to another file"
            )
        description, arrays = read_archive(self.path)
        said = description.get("run")
        if not isinstance(said, dict) or not isinstance(said.get("conditions"), dict):
            raise SaveError(f"{self.path}: a model without a training to go on with; npnet.load gives the model")
        before = [(layer, layer.key) for _, layer in all_layers(run.model) if isinstance(layer, Dropout)]
        try:
            with ExitStack() as undo:
                undo.callback(_set_keys, before)
                self._resume(run, description, arrays)
                undo.pop_all()
        except RecursionError:  # lists in lists in lists
            raise SaveError(f"{self.path}: damaged, its description cannot be read") from None
        self._note(run)

    def _resume(self, run: TrainingRun, description: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Go on from a save, if it is of the same training."""
        said, saved = description["run"], description.get("model")
        _set_keys(_saved_keys(saved, run.model))
        shared = description.get("shared", {})
        unlike = difference({"model": saved, "shared": shared, **said["conditions"]}, self._conditions(run))
        if unlike:
            epochs = "the number of epochs over which the learning rate falls (decay)"
            unlike = unlike.replace("epochs, while the learning rate falls", epochs)  # what saves call it
            raise ValueError(
                f"{self.path} is the save of another training: {unlike}; go on as it was begun, or save to another file"
            )
        try:
            run.load(said, arrays)
        except MemoryError:
            raise
        except Exception as error:
            raise SaveError(f"{self.path}: damaged, it contradicts itself ({type(error).__name__}: {error})") from error

    def _conditions(self, run: TrainingRun) -> dict[str, Any]:
        dtypes = sorted({str(parameter.value.dtype) for parameter in run.model.parameters()})
        model = {"model": run.model.description(), "shared": run.model.shared_places()}
        return {**model, "dtypes": dtypes, **as_json(run.conditions, "fit")}

    def step_done(self, run: TrainingRun, ending: bool = False) -> None:
        """Save, if it is time to, or if the run is ending.

        Raises:
            TrainingDiverged: a parameter is not finite; the save before stays.
            OSError: it could not be written, if ``stop_on_error``; the save before stays.
        """
        self._taken += 1
        if ending or self._taken >= self.every:
            self.save(run)

    def save(self, run: TrainingRun) -> None:
        """Save now. Raises as `step_done`."""
        said, arrays = run.state()
        conditions = self._conditions(run)
        model = {"model": conditions.pop("model"), **shared_entry(run.model)}
        del conditions["shared"]
        description = {**model, "run": {**said, "conditions": conditions}, "about": self.about}
        try:
            write_archive(self.path, description, arrays)
        except ValueError as error:
            raise TrainingDiverged(str(error)) from None
        except (OSError, MemoryError) as error:
            if self.stop_on_error:
                raise
            self._taken = 0
            text = str(error) if isinstance(error, OSError) else f"cannot write {self.path}: out of memory"
            warnings.warn(f"{text}. Training goes on; {self.last}", RuntimeWarning, stacklevel=2)
            return
        self._note(run)

    def _note(self, run: TrainingRun) -> None:
        self._taken = 0
        self.last = f"the last good save is {self.path}: {len(run.history.epochs)} epochs and {len(run.losses)} steps"


def _saved_keys(saved: Any, model: Layer) -> list[tuple[Dropout, int]]:
    """The keys that a save's description has for dropout layers of ``model`` whose own keys were drawn, not given."""
    drawn = {layer.key: layer for _, layer in all_layers(model) if isinstance(layer, Dropout) and not layer.key_given}

    def pairs(there: Any, here: Any) -> Iterator[tuple[Dropout, int]]:
        if isinstance(here, dict) and isinstance(there, dict):
            own, key = here.get("key"), there.get("key")
            if type(own) is int and own in drawn and type(key) is int and 0 <= key < 2**63:
                yield drawn[own], key
            for name in here.keys() & there.keys():
                yield from pairs(there[name], here[name])
        elif isinstance(here, list) and isinstance(there, list):
            for a, b in zip(there, here, strict=False):
                yield from pairs(a, b)

    return list(pairs(saved, model.description())) if drawn else []


def _set_keys(keys: Iterable[tuple[Dropout, int]]) -> None:
    for layer, key in keys:
        layer.key = key
