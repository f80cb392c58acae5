"""What is no run to go on with is refused, in words, and leaves all as it was; NaN is never saved."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import SGD, Adam, Dense, Dropout, GradScaler, Saver, Sequential, TrainingDiverged
from npnet.archive import read_archive, write_archive
from tests.small_training import TRAININGS, Result, Training, X, Y, small_model

PLAIN = Training(lambda: SGD(0.1))


def unchanged_by(training: Training, saver: Saver, **options: Any) -> str:
    """What is said when the training is refused; it must leave no trace."""
    results: list[Any] = []
    fit = npnet.fit

    def observed(*arguments: Any, **given: Any) -> Any:
        result = Result(arguments[0], given["optimizer"], given["scaler"], given["rng"], given["history"])
        before = result.state()
        try:
            return fit(*arguments, **given)
        finally:
            results.append((before, result.state()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npnet, "fit", observed)
        with pytest.raises((ValueError, FileExistsError, FileNotFoundError)) as error:
            training.run(5, saver=saver, **options)
    [(before, after)] = results
    assert before == after
    assert before["history"] == []
    return str(error.value)


def deeper(seed: int) -> Sequential:
    return Sequential(*small_model(seed).layers, Dense(3, 3, rng=seed))


def wider(seed: int) -> Sequential:
    return Sequential(Dense(5, 9, "tanh", rng=seed), *small_model().layers[1:2], Dense(9, 3, rng=seed))


def double(seed: int) -> Sequential:
    layers = [Dense(5, 8, "tanh", rng=seed, dtype=np.float64), Dense(8, 3, rng=seed, dtype=np.float64)]
    return Sequential(*layers)


def other_key(seed: int) -> Sequential:
    return Sequential(*small_model(seed).layers[:3], Dropout(0.2, key=13), *small_model(seed).layers[4:])


class OtherLoss(npnet.MeanSquaredError):
    """Another."""


FALLING = "the number of epochs over which the learning rate falls (decay)"
ADVICE = "; go on as it was begun, or save to another file"

DIFFERENT: dict[str, tuple[Callable[[], Training], str]] = {
    "deeper": (lambda: Training(model=deeper), r"model\.config\.layers is .*"),
    "wider": (lambda: Training(model=wider), r"model\.config\.layers.* is .*"),
    "another key": (lambda: Training(model=other_key), r"model\.config\.layers\[3\]\.config\.key is 12 there, 13 here"),
    "another rate of dropout": (
        lambda: Training(model=lambda seed: small_model(seed, 0.5)),
        r"model\.config\.layers\[1\]\.config\.p is 0\.2 there, 0\.5 here",
    ),
    "loss": (lambda: Training(options={"loss": OtherLoss()}), "loss is 'SoftmaxCrossEntropy' there, 'OtherLoss' here"),
    "optimizer": (lambda: Training(lambda: SGD(0.1)), r"optimizer is .*"),
    "learning rate": (lambda: Training(lambda: Adam(1e-2)), r"optimizer\.learning_rate is 0\.001 there, 0\.01 here"),
    "weight decay": (
        lambda: Training(lambda: Adam(weight_decay=0.1)),
        r"optimizer\.weight_decay is 0\.0 there, 0\.1 here",
    ),
    "batch size": (lambda: Training(options={"batch_size": 5}), "batch_size is 4 there, 5 here"),
    "windows": (lambda: Training(options={"accumulation_steps": 2}), "accumulation_steps is 1 there, 2 here"),
    "clipping": (lambda: Training(options={"clip_norm": 1}), "clip_norm is None there, 1.0 here"),
    "scaler": (lambda: Training(scaler=GradScaler), "scaler is None there, {.*} here"),
    "order": (lambda: Training(options={"shuffle": False}), r"order\[1\] is True there, False here"),
    "generator": (lambda: Training(bits=np.random.Philox), r"order\[0\] is 'PCG64' there, 'Philox' here"),
    "decay": (lambda: Training(options={"decay": True}), rf"{re.escape(FALLING)} is None there, 3 here"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_training_is_refused_by_name(what: str, tmp_path: Path) -> None:
    make, expected = DIFFERENT[what]
    path = tmp_path / "save.npz"
    TRAININGS["adam"].broken(path, 8)
    content = path.read_bytes()
    said = unchanged_by(make(), Saver(path, resume=True))
    assert re.fullmatch(re.escape(f"{path} is the save of another training: ") + expected + ADVICE, said), said
    assert path.read_bytes() == content


@pytest.mark.parametrize("field", ["growth_factor", "backoff_factor", "growth_interval"])
def test_another_scaler_is_refused(field: str, tmp_path: Path) -> None:
    Training(scaler=GradScaler).broken(tmp_path / "save.npz", 8)
    other = Training(scaler=lambda: GradScaler(**{field: {"backoff_factor": 0.25}.get(field, 3)}))
    assert f"scaler.{field} is " in unchanged_by(other, Saver(tmp_path / "save.npz", resume=True))


def test_other_epochs_of_a_falling_rate_and_other_data_are_refused(tmp_path: Path) -> None:
    path, training = tmp_path / "save.npz", TRAININGS["momentum, decay"]
    training.broken(path, 8)
    said = unchanged_by(training, Saver(path, resume=True), epochs=4)
    assert said.endswith(f": {FALLING} is 3 there, 4 here{ADVICE}")
    for x, y, name in ((X + np.eye(len(X), 5, dtype=np.float32), Y, "x"), (X, Y[::-1], "y"), (X[:-1], Y[:-1], "x")):
        with pytest.raises(ValueError, match=f"training data.{name} is '23 x .*, hash .*' there, '2. x .*' here"):
            npnet.fit(
                small_model(), (x, y), loss=npnet.SoftmaxCrossEntropy(), optimizer=training.optimizer(), epochs=3,
                batch_size=4, decay=True, rng=0, log=False, saver=Saver(path, resume=True),
            )  # fmt: skip


def test_a_dtype_is_a_condition(tmp_path: Path) -> None:
    """`float64` weights in a model whose description says nothing of dtypes."""
    halves = [Sequential(Dense(5, 3, rng=0, dtype=dtype)) for dtype in (np.float32, np.float64)]
    for model, dtype in zip(halves, (np.float32, np.float64), strict=True):
        options: dict[str, Any] = {"loss": npnet.SoftmaxCrossEntropy(), "optimizer": SGD(0.1), "epochs": 1}
        saver = Saver(tmp_path / "save.npz", resume=True)
        if dtype is np.float32:
            npnet.fit(model, (X, Y), batch_size=4, log=False, saver=saver, **options)
        else:
            with pytest.raises(ValueError, match=r"dtypes\[0\] is 'float32' there, 'float64' here"):
                npnet.fit(model, (X.astype(dtype), Y.astype(dtype)), batch_size=4, log=False, saver=saver, **options)


def test_what_is_no_save_of_a_training_is_refused(tmp_path: Path) -> None:
    model, save = tmp_path / "model.npz", tmp_path / "save.npz"
    small_model().save(model)
    assert "a model without a training" in unchanged_by(PLAIN, Saver(model, resume=True))
    PLAIN.broken(save, 8)
    assert "if it is the save of a training, go on with it" in unchanged_by(PLAIN, Saver(save))
    assert "there is no folder" in unchanged_by(PLAIN, Saver(tmp_path / "nowhere" / "save.npz"))
    with pytest.raises(TypeError, match="resume: expected True or False, got 'yes'"):
        Saver(save, resume="yes")  # type: ignore[arg-type]
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    assert "not saved by npnet" in unchanged_by(PLAIN, Saver(tmp_path / "other.npz", resume=True))
    save.write_bytes(save.read_bytes()[:-100])
    assert "truncated or damaged" in unchanged_by(PLAIN, Saver(save, resume=True))


def tampered(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Write a save whose checksums are right, and whose content is not."""
    description, arrays = read_archive(path)
    change(description["run"], arrays)
    write_archive(path, description, arrays)


CONTRADICTIONS: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "a generator of another kind": lambda run, _: run.update(stream=np.random.MT19937(0).state["state"]["pos"]),
    "a generator without state": lambda run, _: run["stream"].pop("state"),
    "no number of the next step": lambda run, _: run.pop("next_step"),
    "a step before the first": lambda run, _: run.update(next_step=-1),
    "no scaler": lambda run, _: run.update(scaler=None),
    "more epochs before than there are": lambda run, _: run.update(epochs_before=9),
    "an epoch without loss": lambda run, _: run["history"].append({"epoch": 1}),
    "losses in single precision": lambda _, arrays: arrays.update({"run/losses": np.ones(2, np.float32)}),
    "no losses": lambda _, arrays: arrays.pop("run/losses"),
    "half of what Adam keeps": lambda _, arrays: arrays.pop("optimizer/mean/0.weight"),
    "another shape in Adam": lambda _, arrays: arrays.update({"optimizer/mean/0.weight": np.ones(2, np.float32)}),
    "another optimizer's": lambda _, arrays: arrays.update({"optimizer/velocity/0.weight": np.ones(2, np.float32)}),
    "a weight is missing": lambda _, arrays: arrays.pop("4.bias"),
    "a weight of another shape": lambda _, arrays: arrays.update({"4.bias": np.ones(2, np.float32)}),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_save_that_contradicts_itself_changes_nothing(what: str, tmp_path: Path) -> None:
    path, training = tmp_path / "save.npz", TRAININGS["scaler, clipped, accumulated"]
    training.broken(path, 8)
    tampered(path, CONTRADICTIONS[what])
    assert f"{path}: damaged, it contradicts itself (" in unchanged_by(training, Saver(path, resume=True))


def test_damage_that_is_put_back_in_part_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the undoing, a save whose last part does not fit changes the rest."""
    path, training = tmp_path / "save.npz", TRAININGS["scaler, clipped, accumulated"]
    training.broken(path, 8)
    tampered(path, CONTRADICTIONS["a weight of another shape"])
    monkeypatch.setattr("npnet.run.ExitStack.callback", lambda *_: None)
    with pytest.raises(AssertionError):
        unchanged_by(training, Saver(path, resume=True))


# NaN.


def poisoned(saver: Saver | None, at: int, name: str = "2.weight", **options: Any) -> None:
    """Train, and put a NaN into a parameter right after a step."""
    taken = 0
    step = npnet.Optimizer.step

    def poison(self: Any, parameters: Any) -> None:
        nonlocal taken
        parameters = list(parameters)
        step(self, parameters)
        taken += 1
        if taken == at:
            models[0].named_parameters()[name].value[0, 0] = np.nan

    models: list[Sequential] = []

    def model(seed: int) -> Sequential:
        models.append(small_model(seed))
        return models[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npnet.Optimizer, "step", poison)
        Training(model=model, options={"streaming": False}).run(saver=saver, **options)


@pytest.mark.parametrize(
    ("every", "at", "where", "kept"),
    [
        (1, 8, "epoch 2, step 2 of 6", "1 epochs and 1 steps"),  # found when it is saved
        (3, 8, "epoch 2, step 3 of 6", "0 epochs and 6 steps"),  # found by the next loss
        (1, 6, "epoch 1, step 6 of 6", "0 epochs and 5 steps"),  # the last of an epoch
        (100, 18, "epoch 3, step 6 of 6", None),  # the very last: by the evaluation
        (100, 1, "epoch 1, step 2 of 6", None),
    ],
)
def test_nan_is_not_saved(every: int, at: int, where: str, kept: str | None, tmp_path: Path) -> None:
    path = tmp_path / "save.npz"
    with pytest.raises(TrainingDiverged) as error:
        poisoned(Saver(path, every), at)
    said = str(error.value)
    assert said.startswith(f"{where}: ")
    assert "2.weight" in said or "weight of layer 2, Dense(8, 8, relu), is the first" in said
    assert said.endswith(f"the last good save is {path}: {kept}" if kept else "nothing was saved yet")
    assert path.exists() == (kept is not None)
    if kept:
        assert all(np.isfinite(each.value).all() for each in npnet.load(path).parameters())


@pytest.mark.parametrize("every", [6, 100])
def test_nan_after_the_last_step_without_an_evaluation(every: int, tmp_path: Path) -> None:
    path = tmp_path / "save.npz"
    last = "nothing was saved yet" if every == 100 else "the last good save is .*: 1 epochs and 6 steps"
    with pytest.raises(TrainingDiverged, match=rf"^epoch 3, step 6 of 6: not saved: 2\.weight holds .*; {last}$"):
        poisoned(Saver(path, every), 18, test_data=None)
    if every == 6:
        assert np.isfinite(npnet.load(path).layers[2].weight.value).all()


def test_nan_would_be_saved_without_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr("npnet.archive.is_finite", lambda array: True)
    with pytest.raises(TrainingDiverged):
        poisoned(Saver(tmp_path / "save.npz", 1), 8)
    assert np.isnan(npnet.load(tmp_path / "save.npz").layers[2].weight.value).any()
