"""What a call of an op consists of, what fits together, and what each kernel takes."""

from .activations import Act
from .arguments import (
    DTYPES,
    OPS,
    TENSORS,
    Args,
    BatchNorm,
    DepthwiseArgs,
    Gate,
    GhostArgs,
    SqueezeExciteArgs,
    memory_format,
)
from .steps import (
    POOL_KERNEL,
    STEPS,
    AvgPoolArgs,
    CastArgs,
    ConcatArgs,
    GateArgs,
    GlobalPoolArgs,
    LinearArgs,
    MaxPoolArgs,
    Step,
    tensor_names,
)

__all__ = [
    "DTYPES",
    "OPS",
    "POOL_KERNEL",
    "STEPS",
    "TENSORS",
    "Act",
    "Args",
    "AvgPoolArgs",
    "BatchNorm",
    "CastArgs",
    "ConcatArgs",
    "DepthwiseArgs",
    "Gate",
    "GateArgs",
    "GhostArgs",
    "GlobalPoolArgs",
    "LinearArgs",
    "MaxPoolArgs",
    "SqueezeExciteArgs",
    "Step",
    "memory_format",
    "tensor_names",
]
