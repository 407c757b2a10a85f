"""Devices, and the precision of matrix products."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path
from typing import Any, Literal

import torch

from stages.models.processor import cpu_flags
from storage.errors import TeachonceError, first_line

Precision = Literal["fp32", "bf16", "fp16"]


BATCH_TOKENS = {"cpu": 2048, "mps": 8192}
"""Tokens read at once, by device. On a CPU (benchmarks/encode.py) 1,024 are as fast, 4,096 lose 5 %."""


GPU_BATCH_TOKENS = 65_536
"""Not measured yet; what does not fit is halved."""


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(setting: str) -> torch.device:
    """Returns the device of a setting; `auto` is the first available of CUDA, MPS and CPU."""
    if setting == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(setting)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TeachonceError(
            "device", f"{setting} cannot be used: {first_line(error)}", "set device: auto"
        ) from None
    return device


def pick_precision(setting: str, device: torch.device) -> str:
    """Resolve a precision of training; `auto` is bf16 if the device multiplies it faster."""
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    return "bf16" if {"avx512_bf16", "amx_bf16"} & cpu_flags() else "fp32"


def batch_tokens_on(device: torch.device) -> int:
    """Returns the value of `embed.batch_tokens: auto` for a device."""
    return BATCH_TOKENS.get(device.type, GPU_BATCH_TOKENS)


def device_name(device: torch.device) -> str:
    """Returns a name for comparing speeds, such as `AMD EPYC, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in (
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        ):
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which matrix products run at `precision`."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST[precision])
