"""What a planted fault is, and the kernels that the tables name."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    """In csrc/."""
    old: str
    new: str
    kernels: tuple[str, ...]
    """That are built and run with the fault; ``subset.SHAPES`` has the cases of each."""
    order: str = "asc"
    """The order of threads (SHIM_ORDER) that is tried first; a race may show in one only."""


NCHW, NHWC, ANY, FP32 = "float16_dw3_nchw", "float16_any_nhwc", "float16_any_nchw", "float32_any_nchw"

WIDE8, WIDE8_ANY = "float16_nchw_w8_dw3", "float16_nchw_w8_dw3_any"
NCHW_FP32, SEVEN_FP32 = "float32_nchw_w4_dw3", "float32_nchw_w7_dw3"
NCHW_TF32, SEVEN_TF32 = "tf32_nchw_w4_dw3", "tf32_nchw_w7_dw3"
WINDOW = "float16_nchw_window_dw3"
WIDE4, FOURTEEN, SEVEN = "float16_nchw_w4_dw3", "float16_nchw_w14_dw3", "float16_nchw_w7_dw3"
NHWC_RELU, NHWC_ANY = ("float16_nhwc_dw3_relu",), ("float16_nhwc_dw3_any",)
NHWC_CONV = ("float16_nhwc_dw1_any",)
NHWC_TF32, NHWC_FP32 = ("tf32_nhwc_dw3", "tf32_nhwc_dw3_any"), ("float32_nhwc_dw3",)
DEPTHWISE, PLANES = "float16_depthwise_w3_s2_nhwc", "float16_depthwise_w5_s2_nchw"
SQUEEZE_EXCITE = ("float16_squeeze_nhwc",)
TRAINING = ("float32_training_dw3_nhwc",)
STRIPS, MASKED = ("float16_training_strips_nhwc",), ("float16_training_masked_nhwc",)
LAYOUT = ("change_layout_2_bytes",)
