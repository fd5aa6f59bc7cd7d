"""Uses bfloat16 only where it saves time: a processor that emulates it is many times slower than with float32."""

from __future__ import annotations

import platform
import warnings
from functools import cache

import torch


@cache
def is_native() -> bool:
    """Whether this processor has instructions to multiply bfloat16, and torch's library uses them."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not in builds without it
    if asked is None or not asked():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    # there the answer is yes for any AVX-512, which without these instructions takes twice the time of float32
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def is_native_or_warns() -> bool:
    """The same, with one warning that float32 is used instead if it is not."""
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
