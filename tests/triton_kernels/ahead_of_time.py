"""Compiles kernels for cards that are not there, exactly as host functions would launch them.

:func:`recorded` runs a host function on meta tensors, of any size, and keeps its launches instead
of executing them; :func:`compiled` makes of a launch what Triton's own launcher would on a card of
that architecture (an argument that is 1 is a constant, one that is divisible by 16 is known to be)
and reads from the machine code what it costs.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_resnet.backends.triton._device import Device

#: A card of each architecture: A100, RTX 3090, RTX 4090, H100, B200 and RTX 5090. Multiprocessors,
#: clock and bandwidth are their data sheets', sizes those of the CUDA C++ Programming Guide.
DEVICES = {
    80: Device(80, 108, 163 * 1024, 164 * 1024, 2048, 2039 / 1.410),
    86: Device(86, 82, 99 * 1024, 100 * 1024, 1536, 936 / 1.695),
    89: Device(89, 128, 99 * 1024, 100 * 1024, 1536, 1008 / 2.520),
    90: Device(90, 132, 227 * 1024, 228 * 1024, 2048, 3350 / 1.980),
    100: Device(100, 148, 227 * 1024, 228 * 1024, 2048, 8000 / 1.965),
    120: Device(120, 170, 99 * 1024, 100 * 1024, 1536, 1792 / 2.407),
}

#: One of each kind of tensor cores, whose code the others' resembles.
ARCHITECTURES = (80, 90, 100)

#: The instruction by which each multiplies, as PTX calls it.
TENSOR_CORES = dict.fromkeys(DEVICES, "mma.sync") | {
    90: "wgmma.mma_async",
    100: "tcgen05.mma",
}

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.uint8: "u8",
}


def full(*shape: int, dtype: torch.dtype = torch.float32, last: bool = True) -> torch.Tensor:
    """A tensor of any size, without memory."""
    format = torch.channels_last if len(shape) == 4 and last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=format)


@dataclass
class Recorded:
    """A launch: the kernel, its arguments by name, and how many warps and stages it was given."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return self.kernel.__name__


@dataclass
class Code:
    """What a kernel costs on one architecture, and the instructions that matter."""

    kernel: str
    arch: int
    registers: int
    stack: int
    shared: int
    warps: int
    instructions: dict[str, int]

    @property
    def resident(self) -> int:
        """Number of such programs that a multiprocessor holds at a time."""
        return DEVICES[self.arch].resident(self.warps, self.registers, self.shared)

    def problems(self) -> list[str]:
        """What the gate has against it."""
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of stack: registers spill")
        most = DEVICES[self.arch].shared
        if self.shared > most:
            found.append(f"{self.shared} bytes of shared memory, of {most}")
        return found


def recorded(run: Callable[[], Any], arch: int) -> list[Recorded]:
    """The launches that ``run`` would make on a card of that architecture."""
    launches: list[Recorded] = []

    def record(kernel, *args, grid, warmup=False, **kwargs):
        options = {k: v for k, v in kwargs.items() if k in ("num_warps", "num_stages", "maxnreg")}
        named = {k: v for k, v in kwargs.items() if k not in options}
        launches.append(Recorded(kernel, inspect.getcallargs(kernel.fn, *args, **named), options))

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", record))
        facts = {
            "architecture": arch,
            "multiprocessors": DEVICES[arch].processors,
            "device_of": DEVICES[arch],
        }
        for module in [
            m for name, m in sys.modules.items() if name.startswith("fused_resnet.backends.triton")
        ]:
            for name in facts.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, return_value=facts[name]))
        run()
    return launches


def _source(launch: Recorded) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    parameters = launch.kernel.params
    for i, parameter in enumerate(parameters):
        value = launch.arguments[parameter.name]
        divisible = False
        if isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            kind = f"tensordesc<{_TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, torch.Tensor):
            kind = "*" + _TYPES[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        elif parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            kind = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        signature[parameter.name] = kind
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compiled(launch: Recorded, arch: int) -> Code:
    kernel = triton.compile(
        _source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options
    )
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    # cp.async.cg copies 16 bytes, cp.async.ca 4 or 8; ld.global.v4 loads 16.
    words = (*TENSOR_CORES.values(), "cp.async.bulk.tensor", "cp.async.c", "cp.async.cg")
    words += ("fma.rn.f32", "ld.global.v4", "ld.global.b16")
    counts = {w: len(re.findall(re.escape(w), ptx)) for w in words}
    return Code(
        launch.name,
        arch,
        int(re.search(r"REG:(\d+)", usage)[1]),
        int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        kernel.metadata.shared,
        launch.options["num_warps"],
        {w: n for w, n in counts.items() if n},
    )


def _cuobjdump() -> str:
    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


def table(codes: list[tuple[str, Code]]) -> Table:
    """What was compiled, and what it costs."""
    shown = Table("what", "kernel", "sm", "registers", "stack", "shared", "instructions",
                  title="Triton, compiled ahead of time")  # fmt: skip
    for what, code in codes:
        instructions = ", ".join(f"{n} {w}" for w, n in code.instructions.items())
        shown.add_row(what, code.kernel, str(code.arch), str(code.registers), str(code.stack),
                      str(code.shared), instructions)  # fmt: skip
    return shown
