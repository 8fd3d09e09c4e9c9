"""Faults for the depthwise convolution and the squeeze-and-excite gate."""

from .mutant import DEPTHWISE, PLANES, SQUEEZE_EXCITE, Mutant

MUTANTS = [
    # between the Ghost modules
    Mutant(
        "no barrier before the depthwise weights are scaled",
        "cuda/bottleneck/depthwise_conv.cuh",
        "  __syncthreads();  // the scales are there\n",
        "",
        (DEPTHWISE,),
    ),
    Mutant(
        "the window reaches a column too far",
        "cuda/bottleneck/depthwise_conv.cuh",
        "left + j < a.width",
        "left + j <= a.width",
        (DEPTHWISE,),
    ),
    Mutant(
        "positions of the last block beyond the image",
        "cuda/bottleneck/depthwise_conv.cuh",
        "t.positions = min(plan.block_p, p.args.out_height * plan.row_groups - t.first);",
        "t.positions = plan.block_p;",
        (PLANES,),
    ),
    Mutant(
        "no barrier before the sums of pixels are added",
        "cuda/bottleneck/squeeze_excite.cuh",
        "  __syncthreads();  // all threads' sums are there\n",
        "",
        SQUEEZE_EXCITE,
    ),
    Mutant(
        "the sums of later chunks are left out",
        "cuda/bottleneck/squeeze_excite.cuh",
        "part < p.plan.parts; ++part",
        "part < p.plan.channel_blocks; ++part",
        SQUEEZE_EXCITE,
    ),
    Mutant(
        "no barrier before the next tile of the hidden layer",
        "cuda/bottleneck/squeeze_excite.cuh",
        "    __syncthreads();  // and may be overwritten\n",
        "",
        SQUEEZE_EXCITE,
    ),
    Mutant(
        "a group of images gets the first one's gate",
        "cuda/bottleneck/squeeze_excite.cuh",
        "p.parts + int64_t{n0 + g} * p.plan.parts",
        "p.parts + int64_t{n0} * p.plan.parts",
        SQUEEZE_EXCITE,
    ),
]
