"""What people call dtypes and memory formats: PyTorch's words, with or without ``torch.``, and usual short ones."""

from __future__ import annotations

import torch

_SHORT = {
    "bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32", "fp64": "float64", "f64": "float64",
}  # fmt: skip
LAYOUTS = {"contiguous_format": "nchw", "contiguous": "nchw", "channels_last": "nhwc"}
"""By PyTorch's words, ours."""


def _plain(word: object) -> str:
    return str(word).strip().lower().removeprefix("torch.")


def dtype_of(word: object) -> torch.dtype | None:
    """The dtype that ``word`` is, or names; None if it is none."""
    found = getattr(torch, _SHORT.get(name := _plain(word), name), None)
    return found if isinstance(found, torch.dtype) else None


def layout_of(word: object) -> str:
    """ "nchw" or "nhwc", if ``word`` is or names one of them; else the word."""
    return LAYOUTS.get(name := _plain(word), name)
