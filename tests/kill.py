"""Kill a training with SIGKILL again and again, go on with it, and compare it with one that nobody disturbed.

    python -m tests.kill --kills 100

A small network is trained in a process of its own, which saves after every step. Some of the kills come at any time,
most are aimed at saves: npnet's temporary file is there. After each the save must load, and be none older than the
last that was completed; in the end every number must be that of a run that was never killed.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
EPOCHS, STEPS = 6, 10
TEMPORARY = ".npnet-*.tmp"


class Lost(Exception):
    """A save is not what it has to be."""


# In the process that is killed.


def train(path: Path, seed: int, every: int) -> None:
    """Train, or go on; prints "ready" before it, and after each save how many steps are in it."""
    import numpy as np

    import npnet
    from npnet.run import TrainingRun

    class Telling(npnet.Saver):
        def save(self, run: TrainingRun) -> None:
            super().save(run)
            print(STEPS * len(run.history.epochs) + len(run.losses), flush=True)

    rng = np.random.default_rng(seed)
    x, y = rng.random((STEPS * 8, 64), np.float32), npnet.one_hot(rng.integers(10, size=STEPS * 8), 10)
    layers = npnet.mlp([64, 256, 256, 10], rng=seed).layers
    model = npnet.Sequential(*layers[:1], npnet.Dropout(0.2, key=seed), *layers[1:])
    print("ready", flush=True)
    npnet.fit(
        model,
        (x, y.astype(np.float32)),
        loss=npnet.SoftmaxCrossEntropy(),
        optimizer=npnet.Adam(1e-3),
        epochs=EPOCHS,
        batch_size=8,
        decay=True,
        rng=seed,
        log=False,
        saver=Telling(path, every, resume=True),
    )


@contextmanager
def in_place(path: Path) -> Iterator[IO[bytes]]:
    """The negative control: what `npnet.files.replacing` is there to avoid."""
    with path.open("wb") as file:
        yield file


# In the process that kills.


@dataclass
class Harness:
    """Kills, checks, and counts."""

    folder: Path
    suffix: str = ".npz"
    writer: str = "replacing"
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    kills: int = 0
    in_a_save: int = 0  # the temporary file was left
    before_training: int = 0
    saves: int = 0
    trainings: int = 0
    full_size: int = 0  # of a save, in bytes

    def start(self, path: Path, seed: int, every: int = 1) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "tests.kill", "--train", str(path), str(seed), str(every), self.writer],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, kills: int) -> None:
        """Training after training, until so many kills are done; each comes to its end."""
        while self.kills < kills:
            self.trainings += 1
            seed = self.trainings
            path = self.folder / str(seed) / f"save{self.suffix}"
            path.parent.mkdir()
            undisturbed = path.with_stem("undisturbed")
            said = self.start(undisturbed, seed, every=1000).communicate()[0].split()
            assert said[-1] == str(EPOCHS * STEPS)
            steps, ended = 0, False
            while not ended:
                steps, ended = self.live(path, seed, steps, killed=self.kills < kills)
            found, expected = contents(path), contents(undisturbed)
            differing = [name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)]
            if differing:
                raise Lost(f"{path}: {', '.join(differing)} are not those of a run that was never killed")
            left = {each.name for each in path.parent.iterdir()} - {path.name, undisturbed.name}
            if left:
                raise Lost(f"left by those who were killed: {', '.join(left)}")

    def live(self, path: Path, seed: int, steps: int, killed: bool) -> tuple[int, bool]:
        """One process, from its start to its end or a kill; returns the steps that are saved, and whether it ended."""
        process = self.start(path, seed)
        assert process.stdout is not None
        try:
            if killed:
                self.wait_for_a_moment(process, path)
                process.kill()
            said = process.stdout.read().split()
        finally:
            process.kill()
            code = process.wait()
            process.stdout.close()
        if code not in (0, -signal.SIGKILL):
            raise Lost(f"seed {seed}, after {steps} steps: the process ended with code {code}")
        done = [int(word) for word in said if word != "ready"]
        self.saves += len(done)
        if code == -signal.SIGKILL:
            self.kills += 1
            self.before_training += not (done or steps)
            self.in_a_save += any(path.parent.glob(TEMPORARY)) or (path.exists() and self.too_short(path))
        return check(path, max([steps, *done])), code == 0

    def wait_for_a_moment(self, process: "subprocess.Popen[str]", path: Path) -> None:
        """Any moment of its life for one in five; else one in which it saves."""
        assert process.stdout is not None
        if self.rng.random() < 0.1:
            time.sleep(self.rng.uniform(0, 0.3))
            return
        process.stdout.readline()
        if self.rng.random() < 0.1:
            time.sleep(self.rng.uniform(0, 0.1))
            return
        seen = set(path.parent.glob(TEMPORARY))  # by the one killed before
        for _ in range(self.rng.randrange(1, 9)):  # one of the next eight saves
            deadline = time.monotonic() + 2
            while not (new := set(path.parent.glob(TEMPORARY)) - seen) and time.monotonic() < deadline:
                if process.poll() is not None or (path.exists() and self.too_short(path)):
                    return
            seen |= new
        time.sleep(self.rng.choice([0, 0, self.rng.uniform(0, 0.004)]))

    def too_short(self, path: Path) -> bool:
        size = path.stat().st_size
        self.full_size = max(self.full_size, size)
        return size < 0.9 * self.full_size

    def __str__(self) -> str:
        return (
            f"{self.kills} kills of {self.trainings} trainings: {self.in_a_save} while a save was written, "
            f"{self.before_training} before the first; {self.saves} saves completed, none lost or unreadable"
        )


def check(path: Path, least: int) -> int:
    """Read the save, with at least so many steps, and return how many there are."""
    import npnet

    if not path.exists():
        if least:
            raise Lost(f"{path} is gone, it had {least} steps")
        return 0
    try:
        npnet.load(path)
        said = contents(path)
    except Exception as error:
        raise Lost(f"unreadable after {least} steps: {error}") from error
    steps = STEPS * len(said["history"]) + len(said["run/losses"][1]) // 8
    if steps < least:
        raise Lost(f"{path}: {least} steps had been saved, and there are {steps}")
    return int(steps)


def contents(path: Path) -> dict[str, Any]:
    """All numbers of a save, but for times, in a form that == compares bit for bit."""
    from npnet.archive import read_archive

    description, arrays = read_archive(path)
    run = description["run"]
    losses = [(each["epoch"], each["steps"], each["loss"]) for each in run["history"]]
    bits = {name: (array.shape, array.tobytes()) for name, array in arrays.items()}
    return {**bits, "history": losses, "stream": run["stream"], "next step": run["next_step"]}


def main() -> None:
    """The command, and what each of its processes runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--suffix", default=".npz", choices=[".npz", ".safetensors"])
    parser.add_argument("--train", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        path, seed, every, writer = options.train
        if writer == "in place":
            from npnet import archive

            archive.replacing = in_place  # type: ignore[assignment]
        train(Path(path), int(seed), int(every))
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder), options.suffix, rng=random.Random(options.seed))
        harness.run(options.kills)
    print(f"{harness}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
