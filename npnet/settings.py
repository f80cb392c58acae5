"""What ``npnet train`` is told, and what a save keeps of it."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from npnet.archive import SaveError, read_archive
from npnet.report import describe_sizes
from npnet.schedule import Place

SCHEDULE = "checkpoint_every", "memory_budget", "offload"
FREE = *SCHEDULE, "backend", "capture", "measure", "save_every", "stop_on_save_error"
"""The settings that change no number (but the backend, by rounding): other ones may be given to a resumed training."""


@dataclass(frozen=True)
class Settings:
    """How to train. ``exercise`` means: the classic exercise's first weights, samples in order, whole batches only."""

    arch: tuple[int, ...]
    activation: str
    loss: str
    optimizer: str
    learning_rate: float
    decay: str
    batch_size: int
    epochs: int
    dtype: str
    exercise: bool = False
    seed: int = 0
    samples: int | None = None  # the first so many only
    backend: str | None = None  # the one that is chosen elsewhere
    checkpoint_every: int | str = "sqrt"  # layers, or the name of a schedule
    memory_budget: int | None = None  # bytes; if given, it counts, and not checkpoint_every
    offload: Place | None = None  # likewise
    capture: bool = False
    measure: bool = True  # steps, before the training
    save_every: int | None = None  # steps
    stop_on_save_error: bool = False

    @classmethod
    def of_save(cls, path: Path) -> "tuple[Settings, int]":
        """The settings that a training was saved with, and how many epochs of it are done.

        Raises:
            SaveError: the file cannot be read, or has none.
        """
        said = read_archive(path)[0]
        try:
            settings = cls(**said["about"]["settings"])  # without what an older npnet did not know
            return replace(settings, arch=tuple(settings.arch)), len(said["run"]["history"])
        except (TypeError, KeyError):
            raise SaveError(f"{path}: not saved by npnet train") from None

    def check_report(self, path: Path) -> None:
        """Refuse to write over the report of a training with other numbers, or another schedule, whose costs it has.

        Raises:
            ValueError: ``path`` is such a report, or something else.
        """
        if not path.exists():
            return
        try:
            there = dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no report of npnet train: take another --out") from None
        here = json.loads(json.dumps(asdict(self)))
        for name in here:
            if (name in SCHEDULE or name not in FREE) and there.get(name) != here[name]:
                was = f"{name.replace('_', ' ')} {there.get(name)}, not {here[name]}"
                raise ValueError(f"{path} is the report of another training, with {was}: take another --out")

    @property
    def strategy(self) -> dict[str, Any]:
        """The arguments that tell `npnet.plan` which schedule to choose."""
        if self.memory_budget is not None or self.offload is not None:
            return {"memory_budget": self.memory_budget, "offload": self.offload}
        return {"strategy" if isinstance(self.checkpoint_every, str) else "every_nth": self.checkpoint_every}

    @property
    def remark(self) -> str:
        """What there is to say of the schedule, or nothing."""
        n, depth = self.strategy.get("every_nth", 0), len(self.arch) - 1
        if n <= 1 or n < depth:
            return ""
        return f"a checkpoint every {n} layers: the network has {depth}, so there is none, and everything is kept"

    def __str__(self) -> str:
        return (
            f"{describe_sizes(self.arch)} {self.activation}, {self.loss}, {self.optimizer} {self.learning_rate:g}, "
            f"batch {self.batch_size}, {self.dtype}"
        )


MODERN = Settings(
    (784, *[128] * 20, 10), "relu", "softmax_cross_entropy", "adam", 1e-3, "linear", 512, 12, "float32"
)  # fmt: skip
CLASSIC = Settings(
    (784, 30, 30, 30, 30, 10), "sigmoid", "quadratic", "sgd", 3.0, "none", 100, 5, "float64", exercise=True
)  # fmt: skip
