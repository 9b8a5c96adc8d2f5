"""The backends of the conformance suite, behind one interface.

Every backend takes and returns CPU tensors under the schemas of ``csrc/schemas.h``, so that one
test runs on all of them. What a backend cannot be asked for is said where it is declared.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from precisions import CPU_PRECISIONS, PRECISIONS, Precision


class Backend:
    """Operators and what is known of them.

    Attributes:
        name: ``cpu``, ``simulator``, ``interpreter`` or ``device``.
        ops: The operators by their names in ``csrc/schemas.h``.
        device: Where the kernels run. Operands are made on the CPU, and results are there.
        precisions: What convolutions multiply in.
    """

    name: str
    ops: Any
    device = torch.device("cpu")
    precisions: list[Precision] = PRECISIONS

    def launches(self) -> list[Any]:
        """The kernels that were launched since the last call; a CPU launches none."""
        return []

    def kernels(self) -> list[str]:
        """Their names, without the kernels that only add the parts of a split sum."""
        names = [launch.kernel for launch in self.launches()]
        return [name for name in names if "conv_split_finish_kernel" not in name]

    def orders(self) -> Iterator[None]:
        """Lets kernels run in one order of threads after another; the first is the usual one."""
        raise NotImplementedError


class Cpu(Backend):
    """The extension's kernels for the instruction set that this process has chosen."""

    name = "cpu"
    precisions = CPU_PRECISIONS

    def __init__(self) -> None:
        self.ops = torch.ops.fused_resnet

    def orders(self) -> Iterator[None]:
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                yield
        finally:
            torch.set_num_threads(before)


class Simulator(Backend):
    """CUDA's kernels, every thread of them executed on the CPU."""

    name = "simulator"

    def __init__(self, simt: Any) -> None:
        self._simt, self.ops = simt, simt.ops

    def launches(self) -> list[Any]:
        return self._simt.launches()

    def orders(self) -> Iterator[None]:
        # 0 is in order; every other seed shuffles warps and lanes.
        for seed in (0, 1, 2):
            self._simt.seed(seed)
            yield


class Interpreted(Backend):
    """Triton's kernels in the hardened interpreter, by their host functions."""

    name = "interpreter"

    def __init__(self, interpreter: Any) -> None:
        from fused_resnet.backends import triton as kernels

        self._interpreter = interpreter
        self.ops = SimpleNamespace(**{name: getattr(kernels, name) for name in kernels.__all__})

    def launches(self) -> list[Any]:
        return self._interpreter.launches()

    def orders(self) -> Iterator[None]:
        # The seed decides in which order programs run.
        for seed in (0, 1, 2):
            self._interpreter.seed = seed
            yield


class Gpu(Backend):
    """CUDA's kernels on a GPU."""

    name = "device"
    device = torch.device("cuda")

    def __init__(self, device: Any) -> None:
        self._device, self.ops = device, device

    def launches(self) -> list[Any]:
        return self._device.launches()

    def orders(self) -> Iterator[None]:
        """A device has the schedule that it has: two runs."""
        yield
        yield


NAMES = ("cpu", "simulator", "interpreter", "device")
#: Those that run the project's GPU kernels.
GPU_KERNELS = ("simulator", "interpreter", "device")

#: Storage types and precisions by how a kernel goes through memory: those of one kind have elements
#: of one size, so that packs, tiles and edges are the same, and differ in conversions and products.
KINDS = {
    "dtype": ((torch.float16, torch.bfloat16), (torch.float32,)),
    "precision": (PRECISIONS[:2], PRECISIONS[2:]),
}
CPU_KINDS = {
    "dtype": (*KINDS["dtype"], (torch.float64,)),
    "precision": (CPU_PRECISIONS[:2], CPU_PRECISIONS[2:3], CPU_PRECISIONS[3:]),
}


def kinds(backend: str, parameter: str) -> tuple[Any, ...]:
    """The values of ``dtype`` or ``precision`` on a backend, those that are alike together."""
    return (CPU_KINDS if backend == "cpu" else KINDS)[parameter]
