"""Recording a forward as a CUDA graph, so that one launch stands for all of its kernels."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

#: Calls before the recording: what is made once (workspaces, compiled kernels, joined weights) is
#: made in them.
WARM_UP = 2

# While one thread records, PyTorch waits for the device and empties its cache: others take turns.
_recording = threading.Lock()


class Graph(Protocol):
    """A recorded forward.

    Attributes:
        input: What it reads; the next call's images are copied there.
        output: What it writes, with tensors as leaves; each replay overwrites them.
        bytes: Of device memory that the recording took.
    """

    input: Tensor
    output: Any
    bytes: int

    def replay(self) -> None:
        """Compute ``output`` from ``input``, in the order of the current stream."""


@dataclass
class CudaGraph:
    """A :class:`Graph` on a device."""

    graph: torch.cuda.CUDAGraph
    input: Tensor
    output: Any
    bytes: int

    def replay(self) -> None:
        """See :class:`Graph`."""
        self.graph.replay()


class Recorder:
    """Records graphs that share their memory, and keeps their replays apart.

    Graphs of one recorder may overwrite each other's memory, so they must not run at once: on the
    device each waits for the one before, whatever streams the callers use.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None

    def takes(self, x: Tensor) -> bool:
        """Whether a call with this map can be recorded: on CUDA, and nobody else records there."""
        return x.is_cuda and not torch.cuda.is_current_stream_capturing()

    def capture(self, forward: Callable[[Tensor], Any], x: Tensor) -> Graph:
        """Record ``forward`` for maps of the shape, dtype and layout of ``x``.

        Warm-up and recording run on a stream of their own, behind the current one, outside of
        inference mode: a later call writes to the input whatever mode it is in.

        Raises:
            RuntimeError: The forward does what a graph cannot hold, such as waiting for the device.
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
            # Other threads may allocate meanwhile: only this one's calls are watched.
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
        """On the device, behind what an earlier block of these left there, on whatever stream."""
        with torch.cuda.device(device):
            if self._done is None:
                self._done = torch.cuda.Event()
            torch.cuda.current_stream().wait_event(self._done)
            try:
                yield
            finally:
                self._done.record()

    def wait(self) -> None:
        """Until the device is done with all of it: before a graph may go."""
        if self._done is not None:
            self._done.synchronize()
