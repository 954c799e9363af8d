"""Which arithmetic a training step uses: bfloat16 where the processor computes in it, else float32."""

from functools import cache
from pathlib import Path

import torch

_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Words of /proc/cpuinfo for bfloat16 units on x86 and ARM. Without them bfloat16 is emulated and slower."""


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type for `Settings.precision` on a device: `torch.bfloat16` or `torch.float32`."""
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_computes_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Context in which matrix products and convolutions compute in `dtype`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


@cache
def cpu_computes_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor has bfloat16 units; False where it cannot be told."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith(("flags", "Features")) and _FLAGS & set(line.split()) for line in lines)
