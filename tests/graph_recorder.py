"""A recorder of CUDA graphs that works on the CPU, for tests of the calls that are captured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Recorder:
    """Replaces graph_capture.Recorder: a replay computes into the same output."""

    def __init__(self) -> None:
        self.recorded: list[tuple[int, ...]] = []
        self.replays = self.waits = self.inside = 0
        self.fails = False
        self.taken = True

    def takes(self, x: Tensor) -> bool:
        return self.taken

    def capture(self, forward: Callable[[Tensor], Any], x: Tensor) -> Any:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        with torch.inference_mode(False), torch.no_grad():
            static = torch.empty_like(x)
            output = forward(static)
        self.recorded.append(tuple(x.shape))

        def replay() -> None:
            assert self.inside == 1, "two at once"
            self.replays += 1
            with torch.no_grad():
                output.copy_(forward(static))

        return SimpleNamespace(input=static, output=output, bytes=3 * 2**20, replay=replay)

    @contextlib.contextmanager
    def in_turn(self, device: torch.device) -> Iterator[None]:
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def wait(self) -> None:
        self.waits += 1
