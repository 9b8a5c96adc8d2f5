"""The device behind the interface of the simulator: operators that take and give CPU tensors."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class Launch:
    """One launch of a kernel of ours, as the profiler saw it."""

    def __init__(self, event: dict[str, Any]) -> None:
        self.kernel: str = event["name"]
        self.grid: tuple[int, ...] = tuple(event["args"]["grid"])
        self.block: tuple[int, ...] = tuple(event["args"]["block"])


def to_device(t: Tensor) -> Tensor:
    """The same view of a copy of all of the storage: strides, offset and neighbours stay."""
    storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return storage.cuda().as_strided(t.size(), t.stride(), t.storage_offset())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Of all of both storages, NaN and what lies beside a view included."""
    parts = (torch.empty(0, dtype=torch.uint8).set_(t.cpu().untyped_storage()) for t in (a, b))
    return torch.equal(*parts)


class Device:
    """Stands for :class:`simt.driver.Simt` where a test asks for it."""

    default_seed = 0

    def __init__(self) -> None:
        self.ops = self
        self._calls: list[Callable[[], Any]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(torch.ops.fused_resnet, name)

        def call(*arguments: Any) -> Any:
            there = tree_map(lambda a: to_device(a) if isinstance(a, Tensor) else a, arguments)
            # The global precision may be another by the time of a replay.
            tf32 = torch.backends.cudnn.allow_tf32

            def run() -> Any:
                before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, tf32
                try:
                    return operator(*there)
                finally:
                    torch.backends.cudnn.allow_tf32 = before

            result = run()
            torch.cuda.synchronize()
            self._calls.append(run)
            for given, copy in zip(tree_leaves(arguments), tree_leaves(there), strict=True):
                if isinstance(given, Tensor):
                    whole = torch.empty(0, dtype=copy.dtype, device="cuda")
                    whole.set_(copy.untyped_storage())
                    assert same_bits(given, whole), f"{name}: wrote to an input, or beside it"
            return tree_map(lambda r: r.cpu() if isinstance(r, Tensor) else r, result)

        return call

    def seed(self, seed: int) -> None:
        """A device has the schedule that it has."""

    def launches(self) -> list[Launch]:
        """Of all calls since the last question, which are made once more for the profiler."""
        calls, self._calls = self._calls, []
        if not calls:
            return []
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            for call in calls:
                call()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        kernels = [event for event in events if event.get("cat") == "kernel"]
        if not kernels:
            pytest.skip("the results are right; which kernels ran the profiler does not see here")
        kernels.sort(key=lambda event: event["ts"])
        return [Launch(event) for event in kernels if "fr::" in event["name"]]
