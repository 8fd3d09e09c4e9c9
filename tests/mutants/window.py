"""Faults for the 3×3 primary convs of the NCHW forward kernel."""

from .mutant import WINDOW, Mutant

FILE = "cuda/ghost/nchw/window.cuh"
MUTANTS = [
    Mutant(
        "NCHW: no barrier before the next part of a window's weights",
        FILE,
        "      __syncthreads();  // all are done with the weights before\n",
        "",
        (WINDOW,),
    ),
    Mutant(
        "NCHW: no barrier after a part of a window's weights",
        FILE,
        "      load_window_weight<C>(p, b, weights, k0, end - k0);\n      __syncthreads();\n",
        "      load_window_weight<C>(p, b, weights, k0, end - k0);\n",
        (WINDOW,),
        "desc",
    ),
    Mutant(
        "NCHW: a window's later weights are the first again",
        FILE,
        "c = 4 * (first + step) + q - window_before(p);",
        "c = 4 * step + q - window_before(p);",
        (WINDOW,),
    ),
    Mutant(
        "NCHW: weights before the first input channel are read",
        FILE,
        "if (c >= 0) {",
        "if (true) {",
        (WINDOW,),
    ),
    Mutant(
        "NCHW: a window has the weights of channels beyond the block's",
        FILE,
        "min(channel, b.channels - 1)",
        "channel",
        (WINDOW,),
    ),
    Mutant(
        "NCHW: x before the first input channel is read",
        FILE,
        "has_first = first >= 0;",
        "has_first = true;",
        (WINDOW,),
    ),
    Mutant(
        "NCHW: a window's rows beyond the image are read",
        FILE,
        "(top + kh * a.dilation) < static_cast",
        "(top + kh * a.dilation) <= static_cast",
        (WINDOW,),
    ),
    Mutant(
        "NCHW: a window has numbers of the row before",
        FILE,
        "has_left = column > 0;",
        "has_left = true;",
        (WINDOW,),
    ),
    Mutant(
        "NCHW: a window has numbers of the row after",
        FILE,
        "has_right = column + 1 < p.plan.row_chunks;",
        "has_right = true;",
        (WINDOW,),
    ),
    Mutant(
        "NCHW: a window's first tap is that of the chunk's left",
        FILE,
        "word(kh, i / 2) & 0xffff0000u",
        "word(kh, 0) & 0xffff0000u",
        (WINDOW,),
    ),
    Mutant(
        "NCHW: a window's last tap at stride 1 is the pixel itself",
        FILE,
        "word(kh, i / 2 + 2), 0x5432)",
        "word(kh, i / 2 + 1), 0x5432)",
        (WINDOW,),
    ),
    Mutant(
        "NCHW: single numbers of a window lie beyond the row",
        FILE,
        "static_cast<unsigned>(left + shift) < static_cast<unsigned>(a.x_width)",
        "true",
        (WINDOW,),
    ),
    Mutant(
        "NCHW: a window is padded by one whatever its dilation",
        FILE,
        "* a.stride - a.dilation;",
        "* a.stride - 1;",
        (WINDOW,),
    ),
    Mutant(
        "NCHW: a step of a window is loaded beyond the last",
        FILE,
        "load(kh, step + 1 < steps);",
        "load(kh, true);",
        (WINDOW,),
    ),
    Mutant(
        "NCHW: a window's second tile of channels is left out",
        FILE,
        "if (t > 0 && 16 * t >= b.channels) break;",
        "if (t > 0) break;",
        (WINDOW,),
    ),
]
