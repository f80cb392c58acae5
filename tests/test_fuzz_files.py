"""Thousands of damaged and hostile files: each is refused, or read rightly; quickly, in little memory, without a word.

NPNET_FUZZ=20 reads twenty times as many, NPNET_FUZZ_SEED=1 others.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import SaveError, Sequential
from npnet.archive import read_archive
from npnet.layer import KindError, ShapeError
from tests import hostile_files as hostile
from tests.judge import Judge, cases, finish
from tests.mutations import mutated
from tests.saved_models import is_same
from tests.test_damaged_data import Trap

SUFFIXES = (".npz", ".safetensors")
each_format = pytest.mark.parametrize("suffix", SUFFIXES)


# Models.


def a_chain() -> Sequential:
    """A small model with layers in layers."""
    rng = np.random.default_rng(0)
    return Sequential(
        npnet.Linear(3, 4, rng=rng),
        npnet.Residual(Sequential(npnet.LayerNorm(4), npnet.GELU("tanh"), npnet.Dropout(0.5, rng=rng))),
        npnet.checkpoint.checkpoint(npnet.Dense(4, 2, "tanh", rng=rng)),
    )


def models() -> list[Any]:
    """Of all that can be in a file."""
    chain, lab = a_chain(), npnet.NetworkWithCheckpointing([3, 4, 4, 2], schedule="sqrt", rng=1)
    return [chain, lab, npnet.mixed_precision(chain), npnet.Network([3, 4, 2], rng=2, dtype=np.float16)]


def contents(folder: Path, suffix: str) -> list[tuple[Any, bytes]]:
    """The models and their files."""
    found = []
    for model in models():
        model.save(folder / f"model{suffix}")
        found.append((model, (folder / f"model{suffix}").read_bytes()))
    return found


@each_format
def test_damaged_bytes(folder: Path, suffix: str) -> None:
    originals = contents(folder, suffix)

    def check(loaded: Any) -> str:
        return "" if any(is_same(loaded, model, suffix == ".npz") for model, _ in originals) else "another model"

    with Judge(folder / f"model{suffix}", npnet.load, (SaveError,)).judging() as judge:
        for rng in cases(2200 if suffix == ".npz" else 4000, f"bytes {suffix}"):
            (_, content), (_, other) = rng.choice(originals), rng.choice(originals)
            judge(mutated(content, other, rng), check)
    finish(judge, "SaveError", "read")


def usable(loaded: Any, folder: Path) -> str:
    """What a loaded model, whatever it is, must be able to do."""
    if not all(np.isfinite(parameter.value).all() for parameter in loaded.named_parameters().values()):
        return "not finite"
    loaded.save(folder / "again.npz")
    if not is_same(loaded, npnet.load(folder / "again.npz"), layout=False):
        return "saved again it is another"
    try:
        with np.errstate(all="ignore"):
            if isinstance(loaded, npnet.Network):
                loaded.feedforward(np.ones((2, loaded.sizes[0])))
            else:
                loaded(np.ones((2, 3), np.float32))
    except (ShapeError, KindError):  # of layers that do not fit, as if one had made them
        pass
    return ""


@each_format
def test_hostile_saves(folder: Path, suffix: str) -> None:
    originals = [read_archive(write_to(folder / f"o{suffix}", content)) for _, content in contents(folder, suffix)]
    with Judge(folder / f"model{suffix}", npnet.load, (SaveError,)).judging() as judge:
        for rng in cases(600, f"hostile {suffix}"):
            said, arrays = rng.choice(originals)
            judge(attacked(suffix, said, arrays, rng), lambda loaded: usable(loaded, folder))
    finish(judge, "SaveError", "read")


def write_to(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def attacked(suffix: str, said: Any, arrays: hostile.Arrays, rng: random.Random) -> bytes:
    """A save with right checksums in which the description, the arrays or the headers were changed."""
    text, what = hostile.json.dumps(said), rng.random()
    if what < 0.6:
        text = hostile.description(text, rng)
    elif what < 0.8:
        arrays = hostile.arrays(arrays, rng)
    if suffix == ".npz":
        entries = {"npnet": np.frombuffer(text.encode(), np.uint8), **arrays}
        return hostile.bomb(10**7, entries) if what > 0.98 else hostile.npz(entries, rng if what >= 0.8 else None)
    try:
        content = hostile.safetensors(text, arrays)
    except Exception:  # no .safetensors can hold it
        content = hostile.safetensors(text, {})
    return hostile.tensor_header(content, rng) if what >= 0.8 else content


# Training runs.


class Stopping(npnet.Saver):
    """Interrupts the training in the middle of the second epoch."""

    def step_done(self, run: Any, ending: bool = False) -> None:
        super().step_done(run, ending)
        if len(run.history.epochs) == 1 and len(run.losses) == 2:
            raise KeyboardInterrupt


X = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
Y = np.eye(2, dtype=np.float32)[[0, 1, 1, 0, 1, 0]]


class Run:
    """A training that goes on from a file; afterwards it can be asked what became of it."""

    def __init__(self, file: Path, scaled: bool, saver: Callable[..., npnet.Saver] = npnet.Saver) -> None:
        npnet.set_seed(1)
        self.model, self.optimizer = a_chain(), npnet.Adam(0.01)
        self.scaler = npnet.GradScaler(2.0**10) if scaled else None
        self.generator, self.history = np.random.default_rng(3), npnet.History()
        self.saver = saver(file, every=2, resume=True)
        self.before = self.state()

    def state(self) -> str:
        values = [parameter.value.tobytes() for parameter in self.model.parameters()]
        remembered = self.optimizer.state_dict(self.model.named_parameters())
        kept = {name: array.tobytes() for name, array in remembered.items()}
        scale = None if self.scaler is None else self.scaler.state_dict()
        return repr((values, kept, scale, self.generator.bit_generator.state, self.history, npnet.random.next_step()))

    def go_on(self) -> "Run":
        npnet.fit(
            self.model,
            (X, Y),
            loss=npnet.SoftmaxCrossEntropy(),
            optimizer=self.optimizer,
            scaler=self.scaler,
            epochs=3,
            batch_size=2,
            rng=self.generator,
            saver=self.saver,
            history=self.history,
            log=False,
        )
        return self


class HalfResumed(Exception):
    """A refused save has changed something."""


def resume(file: Path, scaled: bool) -> Run:
    run = Run(file, scaled)
    try:
        return run.go_on()
    except ValueError as error:  # SaveError is one
        if run.state() != run.before:
            raise HalfResumed(str(error)) from error
        raise


def interrupted(folder: Path, suffix: str, scaled: bool) -> tuple[bytes, Sequential]:
    """The save of a training that was broken off, and the model that it leads to."""
    file = folder / f"run{suffix}"
    with pytest.raises(KeyboardInterrupt):
        Run(file, scaled, Stopping).go_on()
    content = file.read_bytes()
    model = Run(file, scaled).go_on().model
    file.unlink()
    return content, model


@each_format
def test_damaged_training_runs(folder: Path, suffix: str) -> None:
    (content, model), (other, _) = interrupted(folder, suffix, False), interrupted(folder, suffix, True)

    def check(run: Run) -> str:
        return "" if is_same(run.model, model, layout=False) else "it went on from somewhere else"

    reading = Judge(folder / f"run{suffix}", lambda file: resume(file, False), (ValueError,))
    with reading.judging() as judge:
        for rng in cases(300, f"runs {suffix}"):
            judge(mutated(content, other, rng), check)
    finish(judge, "SaveError", "read")


@pytest.mark.parametrize("scaled", [False, True])
def test_hostile_training_runs(folder: Path, scaled: bool) -> None:
    content, _ = interrupted(folder, ".npz", scaled)
    said, arrays = read_archive(write_to(folder / "o.npz", content))
    errors = (ValueError, npnet.TrainingDiverged)
    with Judge(folder / "run.npz", lambda file: resume(file, scaled), errors).judging() as judge:
        for rng in cases(150, f"hostile runs {scaled}"):
            judge(attacked(".npz", said, arrays, rng), lambda run: "" if len(run.history.epochs) else "no history")
    finish(judge, "SaveError", "ValueError", "read")


# Nothing is executed.


def test_pickled_code_is_never_run(folder: Path) -> None:
    trap = np.array([Trap(folder / "sprung")], object)
    originals = [read_archive(write_to(folder / "o.npz", content)) for _, content in contents(folder, ".npz")]
    with Judge(folder / "model.npz", npnet.load, (SaveError,)).judging() as judge:
        for rng in cases(200, "pickles"):
            said, arrays = rng.choice(originals)
            entries = {"npnet": np.frombuffer(hostile.json.dumps(said).encode(), np.uint8), **arrays}
            entries[rng.choice([*entries, "more"])] = trap
            judge(hostile.npz(entries))
    finish(judge, "SaveError")
    assert not (folder / "sprung").exists()
