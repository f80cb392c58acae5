"""npnet: neural networks from scratch in NumPy, about training with less memory by recomputing what was not kept.

Where to start reading: `npnet.layer` (layers that never remember), `npnet.schedules` (what to keep and what to
recompute, as a list of actions), `npnet.checkpoint` (the forty lines that run such a list).
"""

from npnet.activations import Activation, Identity, ReLU, Sigmoid, Tanh
from npnet.backend import (
    BackendUnavailable,
    array_module,
    available_backends,
    get_backend,
    register_backend,
    to_backend,
    to_host,
    use_backend,
)
from npnet.checkpoint import backpropagate
from npnet.layer import Layer, Parameter
from npnet.layers import Dense, Sequential, mlp
from npnet.losses import Loss, MeanSquaredError, Quadratic, SoftmaxCrossEntropy, TrainingDiverged
from npnet.network import Network, NetworkWithCheckpointing
from npnet.optimizers import SGD, Adam, Optimizer
from npnet.schedules import InvalidSchedule, Schedule

__version__ = "0.1.0"
