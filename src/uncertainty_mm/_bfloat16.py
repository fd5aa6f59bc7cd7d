"""bfloat16 only where it saves time: a processor that has to emulate it is many times slower than in float32."""

from __future__ import annotations

import platform
import warnings
from functools import cache

import torch


@cache
def is_native() -> bool:
    """Whether this processor multiplies bfloat16 by instructions of its own, and torch's library has them."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not in builds without it
    if asked is None or not asked():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    # there it says so for all of AVX-512, which without these instructions takes twice the time of float32
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def is_native_or_warns() -> bool:
    """The same, and says once why float32 takes the place of what was asked for."""
    if not is_native():
        _warn()
    return is_native()


@cache
def _warn() -> None:
    warnings.warn(
        "This processor has no instructions for bfloat16 (AVX512_BF16, AMX, or those of Arm), and would take up to "
        "80 times as long to emulate them: float32 takes its place",
        stacklevel=2,
    )
