"""Programs that no caller should pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from hostile_arguments import NUMBERS, Call, calls_of, channels_last
from programs import Program, basic_block, head
from torch import Tensor

from fused_resnet import _C

#: Wrong for some fields and right for others; among them values and tensors that are there.
SMALL = (1, 2, 5, 16, 23)


def _every_operation() -> Program:
    p = Program(8)
    x = p.conv(0, 16, 3, stride=2, pool=(3, 2, 1))
    x = basic_block(p, x, 16, winograd=True)
    x = p.add(p.max_pool(x, 3, 1, 1), p.avg_pool(x, 3, 1, 1))
    r = p.zero_pad(x, 4, 2)
    x = p.conv(x, 24, stride=2, dilation=2, groups=2, residual=r)
    head(p, x, 10)
    return p


def _held(x: Tensor, tensors: list[Tensor], steps: list[int], outputs: list[int]) -> list[Tensor]:
    """Twice by one object, which may keep what it found at the first call."""
    program = _C.Program(tensors, steps, outputs)
    program(x)
    return program(x)


def programs() -> Iterator[Call]:
    """``run_program``, bare and through the object that holds its arguments, and its report."""
    p = _every_operation()
    run = torch.ops.fused_resnet.run_program
    for images in (2, 0):
        arguments: dict[str, Any] = {
            "x": channels_last(images, 8, 21, 18),
            "tensors": p.tensors,
            "steps": p.steps,
            "outputs": [4, len(p)],
        }
        yield from calls_of(f"run_program, {images} images", run, arguments, {"outputs": 1}, "run")
        yield from calls_of(f"Program, {images} images", _held, arguments, {"outputs": 1}, "run")
        for i, steps in _wrong_steps(p.steps):
            wrong = {**arguments, "steps": steps}
            yield Call(f"run_program, {images} images, {i}", lambda w=wrong: run(**w), None)
    yield from _reports(p)
    yield from _inputs(p)
    yield from _memory_that_changes(p)


def _wrong_steps(steps: list[int]) -> Iterator[tuple[str, list[int]]]:
    """One integer replaced; whole steps left out and repeated; an incomplete one."""
    for i in range(len(steps)):
        for number in (*NUMBERS, *SMALL):
            name = f"field {i % 24} of step {i // 24}={number}"
            yield name, [*steps[:i], number, *steps[i + 1 :]]
    for i in range(0, len(steps), 24):
        yield f"without step {i // 24}", steps[:i] + steps[i + 24 :]
        yield f"step {i // 24} again", steps[:i] + steps[i : i + 24] + steps[i:]
        yield f"cut in step {i // 24}", steps[: i + 23]


def _reports(p: Program) -> Iterator[Call]:
    arguments = {
        "tensors": p.tensors, "steps": p.steps, "outputs": [len(p)], "sizes": [2, 8, 21, 18],
        "dtype": torch.float32,
    }  # fmt: skip
    least = {"outputs": 1, "sizes": 0}
    yield from calls_of("program_report", _C.program_report, arguments, least, "run_program")
    for dtype in (torch.int8, torch.complex64, torch.float64, torch.bfloat16):
        wrong = {**arguments, "dtype": dtype}
        yield Call(f"program_report, {dtype}", lambda w=wrong: _C.program_report(**w))


def _inputs(p: Program) -> Iterator[Call]:
    """Tensors as x that are not what they seem."""
    x = channels_last(2, 8, 21, 18)
    for name, other in {
        "meta": x.to("meta"),
        "expanded": x[:1, :1, :1, :1].expand(2, 8, 21, 18),
        "overlapping": torch.as_strided(x, (2, 8, 21, 18), (1, 1, 1, 1)),
        "huge": torch.zeros(1).expand(2**30, 8, 2**10, 2**10),
        "too many images": torch.zeros(1).expand(2**40, 8, 21, 18),
        "float64": x.double(),
        "complex": x.to(torch.complex64),
        "conjugate's imaginary part": torch.randn(2, 8, 21, 18, dtype=torch.complex64).conj().imag,
        "of one pixel": x[:, :, :1, :1],
        "without channels": x[:, :0],
        "without rows": x[:, :, :0],
    }.items():
        for label, call in {
            "run_program": torch.ops.fused_resnet.run_program,
            "Program": _held,
        }.items():
            yield Call(
                f"{label}, x {name}",
                lambda c=call, o=other: c(o, p.tensors, p.steps, [len(p)]),
                None,
            )
    for i in (0, 1, len(p.tensors) - 1):
        tensors = [*p.tensors[:i], p.tensors[i].to("meta"), *p.tensors[i + 1 :]]
        yield Call(f"tensor {i} meta", lambda t=tensors: _held(x, t, p.steps, [len(p)]), None)


def _memory_that_changes(p: Program) -> Iterator[Call]:
    """Tensors that lose or change their memory between two calls of an object."""
    x = channels_last(2, 8, 21, 18)

    def call(i: int, change: Any) -> object:
        tensors = [t.clone() for t in p.tensors]
        program = _C.Program(tensors, p.steps, [len(p)])
        program(x)
        change(tensors[i])
        return program(x)

    for i in range(len(p.tensors)):
        for name, change in {
            "freed": lambda t: t.untyped_storage().resize_(0),
            "shrunk": lambda t: t.untyped_storage().resize_(t.untyped_storage().nbytes() - 4),
            "resized": lambda t: t.resize_(1),
            "set": lambda t: t.set_(torch.zeros(3).untyped_storage(), 0, t.shape, (0,) * t.dim()),
            "moved": lambda t: t.set_(t.untyped_storage(), 1, t[:-1].shape),
        }.items():
            yield Call(f"tensor {i} {name} later", lambda i=i, c=change: call(i, c), None)
