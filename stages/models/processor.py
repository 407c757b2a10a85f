"""The capabilities of this machine's processor. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

FLAGS = {
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
    "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}
"""Precision -> what a processor says of itself, on x86 or ARM, if it multiplies that faster than fp32."""


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Returns the feature flags of this processor; empty if the system does not list them."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    names = (line.partition(":") for line in lines)
    return frozenset(
        flag
        for name, _, flags in names
        if name.strip() in {"flags", "Features"}
        for flag in flags.split()
    )


def slow_precision(precision: str, flags: Collection[str]) -> str | None:
    """Returns a warning if a processor multiplies a precision more slowly than fp32; else None.

    Flags are the features of the processor; empty if unknown.
    """
    if not flags or FLAGS.get(precision, set(flags)) & set(flags):
        return None
    return (
        f"embed.precision: {precision} makes this processor several times slower than fp32, not faster (it "
        f"has none of {', '.join(sorted(FLAGS[precision]))}); set it to fp32 before you begin, since "
        "vectors of another precision have another name, or embed on a GPU"
    )


def may_have_gpu() -> bool:
    """Whether `device: auto` may mean a GPU (CUDA, ROCm or MPS), judged without torch."""
    devices = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
    return sys.platform == "darwin" or any(Path(device).exists() for device in devices)
