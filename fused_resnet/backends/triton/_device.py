"""What the plans know of a GPU: the numbers that occupancy and a roofline are made of."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ._common import architecture, multiprocessors

#: Registers of a multiprocessor, and bytes of shared memory that each program of it takes on top of
#: its own: the same from sm_80 to sm_120 (CUDA C++ Programming Guide, compute capabilities).
REGISTERS_OF_ALL, RESERVED = 65536, 1024

#: Products of a clock cycle and multiprocessor, by the oldest architecture that has them: dense
#: ones of tensor cores in half precision, of which tf32 has half as many, and of the CUDA cores.
#: From the peaks in NVIDIA's architecture white papers, divided by clock and multiprocessors.
HALF = {80: 1024, 86: 512, 90: 2048, 100: 4096, 120: 512}
IEEE = {80: 64, 86: 128}


#: Bytes of DRAM of a clock cycle and multiprocessor where a driver does not say: an A100's.
BANDWIDTH = 13.0


class Device(NamedTuple):
    """A GPU.

    Attributes:
        arch: Architecture, 90 for sm_90.
        processors: Number of multiprocessors.
        shared: Bytes of shared memory that a program may have.
        shared_of_all: Bytes of shared memory of a multiprocessor.
        threads: Threads of a multiprocessor.
        bandwidth: Bytes of DRAM that all multiprocessors together move in a clock cycle.
    """

    arch: int
    processors: int
    shared: int
    shared_of_all: int
    threads: int
    bandwidth: float

    def products(self, precision: str) -> int:
        """Products of a clock cycle and multiprocessor; ``precision`` is a key of ``CONFIGS``."""
        table = IEEE if precision == "ieee" else HALF
        found = table[max(arch for arch in table if arch <= self.arch)]
        return found // 2 if precision == "tf32" else found

    @property
    def from_shared(self) -> bool:
        """Whether tensor cores read both operands from shared memory: wgmma and tcgen05."""
        return 90 <= self.arch < 120

    def resident(self, warps: int, registers: int, shared: int) -> int:
        """Number of programs that a multiprocessor holds at a time; at least 1.

        Args:
            warps: Warps of a program.
            registers: Registers of a thread, which are given out eight at a time.
            shared: Bytes of shared memory of a program.
        """
        of_all = (
            REGISTERS_OF_ALL // (-(-registers // 8) * 8 * 32 * warps),
            self.threads // (32 * warps),
            self.shared_of_all // (shared + RESERVED),
        )
        return max(1, min(of_all))


#: What the interpreter plans for, on a CPU: few multiprocessors of an A100.
CPU = Device(80, 4, 163 * 1024, 164 * 1024, 2048, 4 * BANDWIDTH)


def device_of(x: Tensor) -> Device:
    """The GPU of ``x``; on a CPU a small one."""
    return _gpu(x.device.index, architecture(x), multiprocessors(x)) if x.is_cuda else CPU


@functools.cache
def _gpu(index: int, arch: int, processors: int) -> Device:
    facts: dict[str, Any] = triton.runtime.driver.active.utils.get_device_properties(index)
    properties: Any = torch.cuda.get_device_properties(index)
    # Clocks are in kHz, and memory moves data twice in a cycle, over a bus whose width is in bits.
    cycles = facts["mem_clock_rate"] / max(1, facts["sm_clock_rate"])
    return Device(
        arch,
        processors,
        facts["max_shared_mem"],
        properties.shared_memory_per_multiprocessor,
        properties.max_threads_per_multi_processor,
        2 * cycles * facts["mem_bus_width"] / 8 or processors * BANDWIDTH,
    )
