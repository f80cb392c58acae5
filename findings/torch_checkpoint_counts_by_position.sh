#!/usr/bin/env bash
# torch 2.13.0, torch.utils.checkpoint: how often a module's own state changes depends on where the module stands.
#
# One would guess that a checkpointed part is run twice as a whole, so that a running statistic or a counter inside it
# changes twice a step. With use_reentrant=False the second run stops as soon as it has made the last tensor that the
# backward pass needs ("early stop"). A module at the end of the part that needs nothing for its backward pass is then
# run once, the same module before a BatchNorm twice, and a BatchNorm twice wherever it stands. With use_reentrant=True
# everything is run twice. So moving a module to the end of a part changes what it has counted, and no warning says so.
#
# Seen: use_reentrant=False: last: counter 1, BatchNorm 2; not last: counter 2, BatchNorm 2
#       use_reentrant=True:  last: counter 2, BatchNorm 2; not last: counter 2, BatchNorm 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/count.py" <<'PYTHON'
import torch
from torch.utils.checkpoint import checkpoint


class Counter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return x


found = {}
for reentrant in (False, True):
    for last in (True, False):
        norm, linear, counter = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4), Counter()
        part = torch.nn.Sequential(*([norm, linear, counter] if last else [linear, counter, norm]))
        x = torch.randn(8, 4, requires_grad=True)
        checkpoint(part, x, use_reentrant=reentrant).sum().backward()
        found[reentrant, last] = counter.runs, norm.num_batches_tracked.item()
print(found)
assert found == {(False, True): (1, 2), (False, False): (2, 2), (True, True): (2, 2), (True, False): (2, 2)}
PYTHON
"$folder/venv/bin/python" "$folder/count.py"
