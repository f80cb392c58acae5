"""Whole runs: ``npnet train`` beside the same training written in PyTorch, from start-up to accuracy.

    python -m tests.benchmarks.whole [--runs 3] [--epochs 12]

Each run is a fresh process, taken in turn: seconds of wall time, test accuracy, peak of resident memory. The training
is npnet's default: 784,128x20,10 ReLU, cross-entropy, Adam 1e-3 falling linearly, batch 512, float32, all of MNIST.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time

TORCH = """
import sys, numpy as np, torch
from npnet.datasets import find_mnist
epochs = int(sys.argv[1])
torch.manual_seed(0)
with np.load(find_mnist()) as stored:
    x, y, tx, ty = (torch.from_numpy(stored[name]) for name in ("x_train", "y_train", "x_test", "y_test"))
sizes = [784, *[128] * 20, 10]
layers = []
for n, m in zip(sizes[:-1], sizes[1:]):
    layers += [torch.nn.Linear(n, m), torch.nn.ReLU()]
model = torch.nn.Sequential(*layers[:-1])
for layer in model:
    if isinstance(layer, torch.nn.Linear):
        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        torch.nn.init.zeros_(layer.bias)
optimizer, batch = torch.optim.Adam(model.parameters(), 1e-3), 512
steps = epochs * -(-len(x) // batch)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
for epoch in range(epochs):
    order = torch.randperm(len(x))
    for rows in order.split(batch):
        loss = torch.nn.functional.cross_entropy(model(x[rows].reshape(-1, 784).float() / 255), y[rows].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = torch.cat([model(part.reshape(-1, 784).float() / 255).argmax(1) for part in tx.split(1000)])
    score = (found == ty).float().mean().item()
print(f"test accuracy {100 * score:.2f} %")
"""
COMMANDS = {
    "npnet, every 5": [sys.executable, "-m", "npnet", "train", "--quiet", "--epochs"],
    "npnet, every 5, captured": [sys.executable, "-m", "npnet", "train", "--quiet", "--capture", "--epochs"],
    "npnet, plain": [sys.executable, "-m", "npnet", "train", "--quiet", "--checkpoint-every", "0", "--epochs"],
    "torch": [sys.executable, "-c", TORCH],
}


def run(command: list[str]) -> tuple[float, float, float]:
    """Seconds, accuracy in per cent, megabytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    found = re.search(r"test accuracy ([\d.]+)", out)
    if status or not found:
        sys.exit(f"{command[:5]} failed")
    return time.perf_counter() - start, float(found[1]), usage.ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(options.runs):
        for name, command in COMMANDS.items():
            results[name].append(run([*command, str(options.epochs)]))
            seconds, accuracy, megabytes = results[name][-1]
            print(f"{name}: {seconds:.1f} s, {accuracy:.2f} %, {megabytes:.0f} MB", flush=True)
    print()
    base = [seconds for seconds, _, _ in results["torch"]]
    for name, own in results.items():
        ratio = statistics.median(mine / theirs for (mine, _, _), theirs in zip(own, base, strict=True))
        print(f"{name}: {ratio:.2f} of torch's time, {statistics.median(m for _, _, m in own):.0f} MB")


if __name__ == "__main__":
    main()
