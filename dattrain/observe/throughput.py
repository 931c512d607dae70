"""Images per second, time to go, and the share of the device's peak that the model makes use of."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

PEAK_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "GH200": 989.4,
    "B200": 2250.0,
    "B100": 1750.0,
    "A100": 311.8,
    "A800": 311.8,
    "H800": 989.4,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
}
"""Dense bf16 or fp16 tensor throughput in 10^12 operations per second by part of the device's name, from data sheets."""


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak of one device in FLOP/s, None where it is not known. fp32 (without TF32) has no entry."""
    if precision == "fp32":
        return None
    known = sorted((name for name in PEAK_TFLOPS if _named(name, device_name)), key=len)
    return PEAK_TFLOPS[known[-1]] * 1e12 if known else None


def _named(name: str, device: str) -> bool:
    padded = f" {device.replace('-', ' ')} "
    return f" {name} " in padded


class Meter:
    """Rates over the last ``window`` updates. Times come from ``clock`` (seconds)."""

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, int, float]] = deque([(clock(), 0, 0.0)], maxlen=window + 1)
        self._samples = 0
        self._waited = 0.0
        self._paused = 0.0

    def update(self, samples: int, data_wait_s: float) -> None:
        """Count one update of ``samples`` images (over all ranks) that waited ``data_wait_s`` for data on this rank."""
        self._samples += samples
        self._waited += data_wait_s
        self._marks.append((self._clock() - self._paused, self._samples, self._waited))

    def pause(self, seconds: float) -> None:
        """Leave ``seconds`` (an evaluation, a save) out of the rates."""
        self._paused += seconds

    @property
    def seconds_per_update(self) -> float:
        """Mean over the window; 0 before the first update."""
        return self._elapsed / (len(self._marks) - 1) if len(self._marks) > 1 else 0.0

    @property
    def images_per_s(self) -> float:
        """Over all ranks."""
        return (self._marks[-1][1] - self._marks[0][1]) / self._elapsed if self._elapsed > 0 else 0.0

    @property
    def data_wait(self) -> float:
        """Share of the time that this rank waited for data, 0 to 1."""
        return (
            min(1.0, (self._marks[-1][2] - self._marks[0][2]) / self._elapsed) if self._elapsed > 0 else 0.0
        )

    @property
    def _elapsed(self) -> float:
        return self._marks[-1][0] - self._marks[0][0]


def memory_gb(device: torch.device) -> float:
    """Peak so far in 10^9 bytes: allocated on a CUDA device, resident size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
