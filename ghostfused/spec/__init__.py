"""What a call of an op consists of, what fits together, and what each kernel takes."""

from .activations import Act
from .arguments import (
    DTYPES,
    OPS,
    STEPS,
    TENSORS,
    Args,
    BatchNorm,
    CastArgs,
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
    "DTYPES",
    "OPS",
    "STEPS",
    "TENSORS",
    "Act",
    "Args",
    "BatchNorm",
    "CastArgs",
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
