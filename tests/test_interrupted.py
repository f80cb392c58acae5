"""A backward pass that is broken off leaves nothing behind that a later one would add to."""

import numpy as np
import pytest

from npnet import NetworkWithCheckpointing, mlp
from npnet.checkpoint import backpropagate
from npnet.schedules import every_nth

X = np.random.default_rng(0).random((4, 5))


class Interrupting(NetworkWithCheckpointing):
    """Ctrl-C while the segment that starts at layer ``broken_at`` is restored, and the layers above are done."""

    broken_at: int | None = None

    def forward_between_checkpoints(self, a, checkpoint_idx_start, layer_idx_end):
        if checkpoint_idx_start == self.broken_at:
            raise KeyboardInterrupt
        return super().forward_between_checkpoints(a, checkpoint_idx_start, layer_idx_end)


@pytest.mark.parametrize("broken_at", [0, 2])
def test_backprop_after_an_interrupted_one_gives_the_gradient_once(broken_at):
    network = Interrupting([4, 6, 6, 6, 6, 6, 2], 2, rng=0)
    y = np.eye(2)[:, [0, 1, 0, 1, 1]]
    expected = network.backprop(X, y)
    network.broken_at = broken_at
    with pytest.raises(KeyboardInterrupt):
        network.backprop(X, y)
    network.broken_at = None
    for ours, theirs in zip(network.backprop(X, y), expected, strict=True):
        assert all(map(np.array_equal, ours, theirs))


def test_backpropagate_leaves_no_gradient_when_the_update_fails():
    model = mlp([4, 6, 6, 2], rng=0, dtype=np.float64)

    def fail_at_the_second(layer):
        if layer is model.layers[1]:
            raise MemoryError

    with pytest.raises(MemoryError):
        backpropagate(model.layers, every_nth(3, 2), X.T, np.ones_like, after_backward=fail_at_the_second)
    assert [parameter.gradient for parameter in model.parameters()] == [None] * 6
