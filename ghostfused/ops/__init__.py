"""The registered ops ``torch.ops.ghostfused.*``, their derivatives, and programs of several."""

from ..spec import OPS
from . import flops, implementations, recording
from .programs import KeptProgram, Packs, replay_cpu, run_step
from .schemas import STATISTICS, TRAIN_FIELDS, backward_op, forward_op, training_op

__all__ = [
    "OPS",
    "STATISTICS",
    "TRAIN_FIELDS",
    "KeptProgram",
    "Packs",
    "backward_op",
    "flops",
    "forward_op",
    "implementations",
    "recording",
    "replay_cpu",
    "run_step",
    "training_op",
]
