"""What the techniques around checkpointing save: python -m tests.benchmarks.techniques [--small]

Traced peak bytes of one training step above the parameters (plain SGD, each layer updated on the way back), each
technique beside the plain step. The lazy gradient on the model of the exercise (40000-100-32-3000-40000-1, 0.5 GB of
weights; --small leaves it out), where nearly all is the gradient of one layer, and on one that is deep before its
bottleneck.
"""

import argparse
from collections.abc import Callable, Iterator

import numpy as np

from npnet import (
    SGD,
    GradScaler,
    Linear,
    MeanSquaredError,
    ReLU,
    Sequential,
    accumulated_step,
    lazy_gradient,
    measure_peak,
    mixed_precision,
    mlp,
    train_step,
)
from npnet.checkpoint import checkpoint
from npnet.report import Table
from npnet.schedules import none

LOSS, OPTIMIZER = MeanSquaredError(), SGD(0.0)


def step(model: Sequential, x: np.ndarray, y: np.ndarray) -> float:
    needs_saved = [number for number, layer in enumerate(model.layers, 1) if not layer.output_suffices]
    return train_step(model, LOSS, OPTIMIZER, none(len(model.layers), needs_saved), x, y)


def lazily(before: Sequential, after: Sequential, x: np.ndarray, y: np.ndarray) -> float:
    return lazy_gradient(before, after, LOSS, x, y, after_backward=lambda each: OPTIMIZER.step(each.parameters()))


def data(batch: int, features: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random((batch, features), np.float32), rng.random((batch, outputs), np.float32)


def rows(small: bool) -> Iterator[dict[str, object]]:
    """One per technique."""

    def row(technique: str, model: str, plain: Callable[[], float], saving: Callable[[], float]) -> dict[str, object]:
        plain(), saving()
        bytes_ = [measure_peak(each).increase_bytes for each in (plain, saving)]
        return {
            "technique": technique,
            "model": model,
            "plain bytes": bytes_[0],
            "bytes": bytes_[1],
            "ratio": round(bytes_[1] / bytes_[0], 3),
        }

    if not small:
        before = Sequential(Linear(40000, 100, rng=0), ReLU(), Linear(100, 32, rng=1), ReLU())
        after = Sequential(Linear(32, 3000, rng=2), ReLU(), Linear(3000, 40000, rng=3), ReLU(), Linear(40000, 1, rng=4))
        whole, (x, y) = Sequential(*before.layers, *after.layers), data(128, 40000, 1)
        yield row(
            "lazy gradient", "40000-100-32-3000-40000-1, batch 128",
            lambda: step(whole, x, y), lambda: lazily(before, after, x, y),
        )  # fmt: skip
    deep, head = mlp([256] * 21 + [16], "tanh", "tanh", rng=0), mlp([16] + [256] * 20 + [1], "tanh", rng=1)
    joined, (u, v) = Sequential(*deep.layers, *head.layers), data(1024, 256, 1)
    yield row(
        "lazy gradient", "256x21,16,256x20,1, batch 1024",
        lambda: step(joined, u, v), lambda: lazily(deep, head, u, v),
    )  # fmt: skip
    model, (x, y) = mlp([256] * 21 + [10], "tanh", rng=0), data(2048, 256, 10)
    pairs = [(x[i : i + 512], y[i : i + 512]) for i in range(0, 2048, 512)]
    shape = "256x21,10, batch 2048"
    yield row(
        "accumulation, 4 x 512", shape,
        lambda: step(model, x, y),
        lambda: accumulated_step(model, LOSS, OPTIMIZER, none(len(model.layers)), pairs, len(x)),
    )  # fmt: skip
    for dtype in ("float16", "bfloat16"):
        half = mixed_precision(model, dtype)
        yield row(f"stored as {dtype}", shape, lambda: step(model, x, y), lambda: step(half, x, y))  # noqa: B023
    half = mixed_precision(model)
    yield row(
        "float16, with a scaler", shape,
        lambda: step(model, x, y),
        lambda: accumulated_step(
            half, LOSS, OPTIMIZER, none(len(half.layers)), [(x, y)], len(x), scaler=GradScaler(1.0)
        ),
    )  # fmt: skip
    parts = Sequential(*(checkpoint(Sequential(*model.layers[i : i + 5])) for i in range(0, 20, 5)), *model.layers[20:])
    yield row("checkpoint() of four parts", shape, lambda: step(model, x, y), lambda: step(parts, x, y))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="leave out the model with 0.5 GB of weights")
    options = parser.parse_args()
    print(
        Table(
            "techniques", "Traced peak of a training step, float32, parameters not counted", list(rows(options.small))
        )
    )


if __name__ == "__main__":
    main()
