"""Time of calls on a device: by events on a GPU, by the host's clock elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], Any]


class Clock:
    """Times single calls.

    Args:
        device: The device of the calls.
        cold: Whether the L2 is flushed before each call, as in a network whose maps exceed it.
    """

    def __init__(self, device: torch.device, cold: bool = False) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if cold and device.type == "cuda":
            # Read before each call, not written: dirty lines would be written back during the call.
            # It also keeps the GPU busy while the call is launched.
            size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 2**28)
            self._flush = torch.zeros(size // 4, dtype=torch.float32, device=device)

    def times(self, call: Call, count: int) -> list[float]:
        """Seconds of each call.

        Args:
            call: The function to time.
            count: Number of calls.
        """
        if self.device.type != "cuda":
            return [self._on_host(call) for _ in range(count)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            if self._flush is not None:
                self._flush.sum()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    @staticmethod
    def _on_host(call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def alternating(
    clock: Clock, calls: Mapping[str, Call], *, rounds: int = 5, round_seconds: float = 0.02
) -> dict[str, list[float]]:
    """Seconds of each call, in alternating rounds so that clock drift affects all equally.

    Args:
        clock: The clock of the device.
        calls: The functions by name; they are warmed up here.
        rounds: Number of turns of each.
        round_seconds: Length of a turn, which makes at least 3 and at most 50 calls.
    """
    counts = {}
    for name, call in calls.items():
        clock.times(call, 3)  # compiles, tunes and allocates
        each = statistics.median(clock.times(call, 3))
        counts[name] = max(3, min(50, round(round_seconds / max(each, 1e-9))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = list(calls)
        shift = number % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            clock.times(calls[name], 1)
            found[name] += clock.times(calls[name], counts[name])
    return found
