"""Small things around a run: precision, seconds per phase, Ctrl-C, peak memory, the CPU's allocator."""

import ctypes
import resource
import signal
import sys
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, GIB = -1, -3, 1 << 30


Precision = Literal["auto", "bf16", "fp32"]
"""Of matrix products; parameters and optimizers stay fp32. `auto` is bf16 where the hardware multiplies in it."""
BF16_CPU = ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16")
"""Any of these instruction sets makes bf16 products faster than fp32 ones; the last two are ARM's."""


def in_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether `precision` means bf16 on this device.

    A CPU without bf16 instructions emulates them: a training step of the mini model then takes 12 times as long as in
    fp32 (measured on AVX2; `gvu train --dry-run precision=bf16` against `precision=fp32`).
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in BF16_CPU)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 matrix products inside, where `precision` says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(precision, device))


class Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Generator[None]:
        """Add the seconds spent inside to `phase`."""
        began = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


class Interrupt:
    """Ctrl-C asks for an end after the current step; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, *_: object) -> None:
        """The signal handler."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> "Interrupt":
        try:
            self.before = signal.signal(signal.SIGINT, self)
        except ValueError:  # not the main thread: Ctrl-C is somebody else's
            self.before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def keep_memory() -> bool:
    """Make glibc keep freed memory instead of returning it to the kernel at every tensor; False where there is no
    glibc.

    Tensors of some MB are otherwise mapped, zeroed and unmapped again and again: a sixth of a CPU training step.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, GIB) and mallopt(M_TRIM_THRESHOLD, GIB))
