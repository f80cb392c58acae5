"""npnet: neural networks from scratch in NumPy, about training with less memory by recomputing what was not kept.

Where to start reading: `npnet.layer` (layers that never remember), `npnet.schedule` (what to keep and what to
recompute, as a list of actions), `npnet.checkpoint` (the forty lines that run such a list).
"""

from npnet import launch  # noqa: F401, I001 - before NumPy is loaded
import npnet.fusing  # noqa: F401 - replaces methods when CuPy is loaded
from npnet import plots, schedules
from npnet.activations import Activation, Identity, ReLU, Sigmoid, Softmax, Tanh
from npnet.archive import SaveError
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
from npnet.blocks import GELU, Dropout, LayerNorm, Residual
from npnet.capture import CapturedStep
from npnet.checkpoint import backpropagate
from npnet.curvature import (
    gradient_norm_gradient,
    hessian,
    hessian_vector_product,
    largest_eigenvalue,
    second_order_step,
)
from npnet.batching import batches
from npnet.datasets import DataError, load_diabetes, load_mnist, make_linear, one_hot
from npnet.determinism import LayerRuleError
from npnet.failures import OutOfMemory
from npnet.layer import Layer, LayerCost
from npnet.parameter import Buffer, Parameter
from npnet.layers import Dense, Linear, Sequential, mlp
from npnet.losses import BCEWithLogits, Loss, MeanSquaredError, Quadratic, SoftmaxCrossEntropy, TrainingDiverged
from npnet.measuring import measure_timeline, step_costs
from npnet.memory import MemoryReport, limit_memory, measure_peak, measure_rss_peak
from npnet.network import Network
from npnet.network_with_checkpointing import NetworkWithCheckpointing
from npnet.optimizers import SGD, Adam, Optimizer, clip_grad_norm
from npnet.planner import Tradeoff, plan, tradeoff
from npnet.plans import InfeasibleBudget, Plan
from npnet.precision import GradScaler, mixed_precision
from npnet.random import set_seed
from npnet.ranks import RankFailed
from npnet.run import History
from npnet.saver import Saver
from npnet.schedule import InvalidSchedule, Schedule
from npnet.step import accumulated_step, add_gradients, lazy_gradient, train_step, value_and_grad
from npnet.storage import load
from npnet.summary import summary
from npnet.tracing import CannotCapture
from npnet.training import fit

__version__ = "0.1.0"

__all__ = [
    "GELU",
    "SGD",
    "Activation",
    "Adam",
    "BCEWithLogits",
    "BackendUnavailable",
    "Buffer",
    "CannotCapture",
    "CapturedStep",
    "DataError",
    "Dense",
    "Dropout",
    "GradScaler",
    "History",
    "Identity",
    "InfeasibleBudget",
    "InvalidSchedule",
    "Layer",
    "LayerCost",
    "LayerNorm",
    "LayerRuleError",
    "Linear",
    "Loss",
    "MeanSquaredError",
    "MemoryReport",
    "Network",
    "NetworkWithCheckpointing",
    "Optimizer",
    "OutOfMemory",
    "Parameter",
    "Plan",
    "Quadratic",
    "RankFailed",
    "ReLU",
    "Residual",
    "SaveError",
    "Saver",
    "Schedule",
    "Sequential",
    "Sigmoid",
    "Softmax",
    "SoftmaxCrossEntropy",
    "Tanh",
    "Tradeoff",
    "TrainingDiverged",
    "accumulated_step",
    "add_gradients",
    "array_module",
    "available_backends",
    "backpropagate",
    "batches",
    "clip_grad_norm",
    "fit",
    "get_backend",
    "gradient_norm_gradient",
    "hessian",
    "hessian_vector_product",
    "largest_eigenvalue",
    "lazy_gradient",
    "limit_memory",
    "load",
    "load_diabetes",
    "load_mnist",
    "make_linear",
    "measure_peak",
    "measure_rss_peak",
    "measure_timeline",
    "mixed_precision",
    "mlp",
    "one_hot",
    "plan",
    "plots",
    "register_backend",
    "schedules",
    "second_order_step",
    "set_seed",
    "step_costs",
    "summary",
    "to_backend",
    "to_host",
    "tradeoff",
    "train_step",
    "use_backend",
    "value_and_grad",
]
