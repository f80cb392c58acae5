"""Saving, loading, and what optimizers remember, called with arguments that are right."""

import tempfile
from pathlib import Path
from typing import Any

import npnet
from npnet.checkpoint import Checkpoint
from tests.api_calls import LOSS, MODEL, X, Y, call, values, with_gradients

FOLDER = Path(tempfile.mkdtemp(prefix="npnet-api-"))
MODEL.save(FOLDER / "model.npz")


def trained() -> tuple[npnet.Adam, dict[str, Any]]:
    """An optimizer that has taken a step, and the parameters it took it on."""
    model, optimizer = npnet.mlp([3, 2], rng=0), npnet.Adam()
    npnet.train_step(model, LOSS, optimizer, npnet.schedules.none(1), X, Y)
    return optimizer, model.named_parameters()


OPTIMIZER, PARAMETERS = trained()


def saved(path: Any) -> list[Any]:
    """What a model that is saved is when it is loaded."""
    MODEL.save(path)
    return values(npnet.load(path))


FILES = ImportError, OSError  # no folder there, a name that is too long, no safetensors
call(
    "load",
    lambda **o: values(npnet.load(**o)),
    *FILES,
    path=FOLDER / "model.npz",
    classes=[Checkpoint],
    backend="numpy",
)
call("Sequential.save", saved, *FILES, path=str(FOLDER / "another.npz"))
call(
    "Saver",
    lambda **o: npnet.Saver(**o) and None,
    *FILES,
    path=FOLDER / "run.npz",
    every=3,
    resume=True,
    stop_on_error=False,
    about={"a": 1},
)
call("Optimizer.prepare", lambda parameters: len(npnet.SGD(0.1).prepare(parameters)), parameters=with_gradients())
call("Optimizer.state_dict", lambda parameters: sorted(OPTIMIZER.state_dict(parameters)), parameters=PARAMETERS)
call(
    "Optimizer.load_state_dict",
    OPTIMIZER.load_state_dict,
    state=OPTIMIZER.state_dict(PARAMETERS),
    parameters=PARAMETERS,
)
