"""Capture of a forward in a CUDA graph, so that one launch runs all of its kernels."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

#: Calls before the capture, which create what is created once: workspaces, compiled kernels,
#: concatenated weights.
WARM_UP = 2

# During a capture PyTorch synchronises the device and empties its cache, so only one may run.
_recording = threading.Lock()


class Graph(Protocol):
    """A captured forward.

    Attributes:
        input: The tensor that it reads; a call copies its images there.
        output: A structure whose leaves are tensors; each replay overwrites them.
        bytes: Device memory that the capture allocated.
    """

    input: Tensor
    output: Any
    bytes: int

    def replay(self) -> None:
        """Compute ``output`` from ``input`` on the current stream."""


@dataclass
class CudaGraph:
    """A :class:`Graph` on a CUDA device.

    Attributes:
        graph: The graph of PyTorch that a replay launches.
        input: The tensor that it reads; a call copies its images there.
        output: A structure whose leaves are tensors; each replay overwrites them.
        bytes: Device memory that the capture allocated.
    """

    graph: torch.cuda.CUDAGraph
    input: Tensor
    output: Any
    bytes: int

    def replay(self) -> None:
        """Compute ``output`` from ``input`` on the current stream."""
        self.graph.replay()


class Recorder:
    """Captures graphs that share one memory pool, and orders their replays.

    Graphs of one recorder may overwrite each other's memory, so they must not run concurrently: on
    the device each waits for the previous one, whatever streams the callers use.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None

    def takes(self, x: Tensor) -> bool:
        """Whether a call with this map can be captured: on CUDA, outside of another capture.

        Args:
            x: Input of the call.
        """
        return x.is_cuda and not torch.cuda.is_current_stream_capturing()

    def capture(self, forward: Callable[[Tensor], Any], x: Tensor) -> Graph:
        """Capture ``forward`` for maps of the shape, dtype and layout of ``x``.

        Warm-up and capture run on a separate stream, after the current one, and outside of
        inference mode, since a later call may write to the input in any mode.

        Args:
            forward: The function of one map.
            x: Input of the captured call, ``(N, C, H, W)``, on CUDA.

        Raises:
            RuntimeError: The forward does what a graph cannot contain, such as a synchronisation.
        """
        with _recording, torch.cuda.device(x.device), torch.inference_mode(False), torch.no_grad():
            static = torch.empty_like(x)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                static.copy_(x)
                for _ in range(WARM_UP):
                    forward(static)
            torch.cuda.current_stream().wait_stream(stream)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            before = self._pool_bytes()
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile: only this thread's calls are checked.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
            ):
                output = forward(static)
            taken = self._pool_bytes() - before + static.numel() * static.element_size()
        return CudaGraph(graph, static, output, taken)

    def _pool_bytes(self) -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if s.get("segment_pool_id") == self._pool)

    @contextlib.contextmanager
    def in_turn(self, device: torch.device) -> Iterator[None]:
        """A context whose work on the device runs after that of all earlier such contexts.

        Args:
            device: The CUDA device.
        """
        with torch.cuda.device(device):
            if self._done is None:
                self._done = torch.cuda.Event()
            torch.cuda.current_stream().wait_event(self._done)
            try:
                yield
            finally:
                self._done.record()

    def wait(self) -> None:
        """Synchronise with all replays, which must have finished before a graph is freed."""
        if self._done is not None:
            self._done.synchronize()
