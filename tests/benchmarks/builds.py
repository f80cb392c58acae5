"""This build of npnet against another one, such as a checkout of last week's: training steps, interleaved.

    git worktree add ../before HEAD~20
    python -m tests.benchmarks.builds ../before [--networks A,C] [--rounds 300] [--json FILE]

Both builds take the same steps on the same batches, in turns, in one process. Every figure is a ratio, this build's
time to the other's: the median over rounds of the ratio within a round. Above 1, this build is slower. In brackets:
this build against itself, which says how much of that is noise.
"""

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import npnet
from tests.benchmarks.classic import NETWORKS, data, machine

Step = Callable[[Any, Any], object]


def load(folder: Path) -> ModuleType:
    """The package npnet in ``folder``, beside the one that is loaded."""
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "npnet"}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("npnet")
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == "npnet"]:
            del sys.modules[name]
        sys.modules.update(ours)
    if folder.resolve() not in Path(str(module.__file__)).resolve().parents:
        raise ImportError(f"there is no package npnet in {folder}")
    return module


def steps(build: Any, sizes: list[int], dtype: Any) -> dict[str, Step]:
    """Ways to take a training step, by name."""
    lab = build.Network(sizes, rng=0, dtype=dtype)
    seventh = build.NetworkWithCheckpointing(sizes, 7, rng=0, dtype=dtype)
    loss, every = build.SoftmaxCrossEntropy(), build.schedules.every_nth(len(sizes) - 1, 7)
    models = [build.mlp(sizes, "relu", rng=0, dtype=dtype) for _ in range(2)]
    optimizers = [build.Adam(1e-5) for _ in range(2)]
    captured = build.CapturedStep(models[1], loss, optimizers[1])
    return {
        "lab, plain": lambda x, y: lab.update_mini_batch((x, y), 1e-3),
        "lab, every 7": lambda x, y: seventh.update_mini_batch((x, y), 1e-3),
        "train_step, every 7": lambda x, y: build.train_step(models[0], loss, optimizers[0], every, x, y),
        "captured": captured,
    }


def ratio(ours: Step, theirs: Step, batches: Sequence[tuple[Any, Any]], rounds: int) -> float:
    """The median ratio of our time to theirs."""
    ratios, pair = [], (ours, theirs)
    for number in range(rounds + 3):
        times = [0.0, 0.0]
        for place in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            pair[place](*batches[number % len(batches)])
            times[place] = time.perf_counter() - start
        ratios.append(times[0] / times[1])
    return statistics.median(ratios[3:])  # the first ones are warming up


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    letters = [name[0] for name in NETWORKS if "at batch" not in name]
    parser.add_argument("folder", type=Path, help="a checkout of npnet: the folder that holds the package")
    parser.add_argument("--networks", default=",".join(letters), help=f"of {', '.join(letters)} (default: all)")
    parser.add_argument("--rounds", type=int, default=300, help="steps of each build for a figure (default: 300)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(arguments)
    options.networks = options.networks.split(",")
    unknown = [name for name in options.networks if name not in letters]
    if unknown:
        parser.error(f"--networks: there is no {', '.join(unknown)}; choose of {', '.join(letters)}")
    if options.rounds < 1:
        parser.error("--rounds: expected at least 1")
    if not (options.folder / "npnet" / "__init__.py").is_file():
        parser.error(f"folder: there is no package npnet in {options.folder}")
    return options


def main() -> None:
    options = parse()
    other, found = load(options.folder), []
    print(machine())
    for name, (sizes, batch) in NETWORKS.items():
        if name[0] not in options.networks or "at batch" in name:
            continue
        for dtype in (np.float64, np.float32):
            batches = data(batch, dtype)
            ours, theirs, again = (steps(build, sizes, dtype) for build in (npnet, other, npnet))
            for step in ours:
                figures = [ratio(ours[step], each[step], batches, options.rounds) for each in (theirs, again)]
                found.append({"network": name, "dtype": dtype.__name__, "step": step, "ratio": figures[0]})
                print(
                    f"{name:16} {dtype.__name__:8} {step:20} {figures[0]:.3f}   (noise: {figures[1]:.3f})", flush=True
                )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
