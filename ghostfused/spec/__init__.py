"""What a call of an op consists of, what fits together, and what each kernel takes."""

from .activations import Act
from .arguments import (
    OPS,
    STEPS,
    TENSORS,
    Args,
    BatchNorm,
    DepthwiseArgs,
    Gate,
    GhostArgs,
    GlobalPoolArgs,
    LinearArgs,
    SqueezeExciteArgs,
    Step,
    memory_format,
    tensor_names,
)

__all__ = [
    "OPS",
    "STEPS",
    "TENSORS",
    "Act",
    "Args",
    "BatchNorm",
    "DepthwiseArgs",
    "Gate",
    "GhostArgs",
    "GlobalPoolArgs",
    "LinearArgs",
    "SqueezeExciteArgs",
    "Step",
    "memory_format",
    "tensor_names",
]
