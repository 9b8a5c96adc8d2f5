"""Calls with arguments that no caller should pass, each answered by an exception or a result.

Run as a script it makes all calls and prints a JSON object: for each group the number of calls, and
those that ended the process or were not answered as they should be. The calls of a group run in a
forked child; when a call kills it, the next child goes on behind that call.
"""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from hostile_arguments import ERRORS, Call, calls_of, channels_last
from hostile_programs import programs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_resnet
from fused_resnet import _C, ops

#: Seconds for all calls of a group: a call that hangs ends its process, too.
SECONDS = 120
#: What a call may allocate beyond what the process has: larger requests fail, as without memory.
BYTES = 4 * 2**30


def _conv_operands(packed: bool) -> dict[str, Any]:
    weight = torch.randn(16, 4, 3, 3)
    if packed:
        operands = {
            "packed": ops.pack_conv_weight(weight, 2),
            "scale": torch.ones(16),
            "shift": torch.zeros(16),
            "weight_shape": [16, 4, 3, 3],
        }
    else:
        vectors = dict.fromkeys(("conv_bias", "bn_weight", "bn_bias", "mean", "var"))
        operands = {"weight": weight, **{name: torch.ones(16) for name in vectors}, "eps": 1e-5}
    geometry = {"stride": [2, 1], "padding": [1, 1], "dilation": [1, 2], "groups": 2}
    return {"x": channels_last(2, 8, 9, 8), **operands, **geometry}


CONV_LEAST = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
POOL = {"pool_kernel": [3, 2], "pool_stride": [2, 1], "pool_padding": [1, 1]}
POOL_LEAST = {"pool_kernel": 1, "pool_stride": 1, "pool_padding": 0}


def convolutions() -> Iterator[Call]:
    """The convolution's operators, bare."""
    bare = torch.ops.fused_resnet
    live, packed = _conv_operands(False), _conv_operands(True)
    residual = channels_last(2, 16, 5, 6)
    more = {"residual": residual, "activation": 1}
    yield from calls_of("conv_bn_add_relu", bare.conv_bn_add_relu, {**live, **more}, CONV_LEAST)
    yield from calls_of(
        "conv_bn_add_relu_packed",
        bare.conv_bn_add_relu_packed,
        {**packed, **more, "winograd": True},
        {**CONV_LEAST, "weight_shape": 1},
    )


def stems() -> Iterator[Call]:
    """The stem's operators, bare."""
    bare = torch.ops.fused_resnet
    least = {**CONV_LEAST, **POOL_LEAST}
    live, packed = _conv_operands(False), _conv_operands(True)
    yield from calls_of("conv_bn_relu_maxpool", bare.conv_bn_relu_maxpool, {**live, **POOL}, least)
    yield from calls_of(
        "conv_bn_relu_maxpool_packed",
        bare.conv_bn_relu_maxpool_packed,
        {**packed, **POOL},
        {**least, "weight_shape": 1},
    )


def batch_norms() -> Iterator[Call]:
    """Batch norm's operators, bare."""
    bare = torch.ops.fused_resnet
    x = channels_last(2, 8, 5, 4)
    vectors = {name: torch.ones(8) for name in ("weight", "bias", "running_mean", "running_var")}
    rest = {"residual": channels_last(2, 8, 5, 4), "training": False, "eps": 1e-5, "activation": 1}
    for training in (False, True):
        arguments = {"x": x, **vectors, **rest, "training": training}
        yield from calls_of("bn_add_relu", bare.bn_add_relu, arguments, {})
    backward = {
        "grad": x.clone(), "x": x, "y": x.clone(), "weight": torch.ones(8), "mean": torch.ones(8),
        "var": torch.ones(8), "training": True, "eps": 1e-5, "activation": 1, "need_residual": True,
    }  # fmt: skip
    yield from calls_of("bn_add_relu_backward", bare.bn_add_relu_backward, backward, {})
    # Sizes whose product wraps, where one of them is zero.
    for shape in ((2**40, 0, 2**20, 1), (0, 8, 2**28, 2**28), (2**40, 8, 0, 2**20)):
        for training in (False, True):
            wide = {**vectors, **rest, "residual": None, "training": training}
            wide = {name: None if name in vectors else v for name, v in wide.items()}
            if not training:
                wide |= {name: torch.ones(shape[1]) for name in ("running_mean", "running_var")}
            empty = {"x": torch.empty(shape), **wide}
            yield Call(
                f"bn_add_relu of {shape}, training={training}",
                lambda empty=empty: bare.bn_add_relu(**empty),
                None,
            )


def weights() -> Iterator[Call]:
    """Packing and unpacking, and the functions of ``_C`` for them; tensors without memory too."""
    weight = torch.randn(16, 4, 3, 3)
    packed = {"packed": ops.pack_conv_weight(weight, 2), "weight_shape": [16, 4, 3, 3], "groups": 2}
    bare = torch.ops.fused_resnet
    yield from calls_of(
        "pack_conv_weight", bare.pack_conv_weight, {"weight": weight, "groups": 2}, {"groups": 1}
    )
    yield from calls_of(
        "unpack_conv_weight", bare.unpack_conv_weight, packed, {"weight_shape": 1, "groups": 1}
    )
    yield from calls_of(
        "packed_conv_weight_numel",
        _C.packed_conv_weight_numel,
        {"weight_shape": [16, 4, 3, 3], "groups": 2, "dtype": torch.float32},
        {"weight_shape": 1, "groups": 1},
        says="pack_conv_weight",
    )
    yield from calls_of(
        "conv_algorithm",
        _C.conv_algorithm,
        {
            "input_shape": [2, 8, 9, 8], "weight_shape": [16, 4, 3, 3], "stride": [1, 1],
            "padding": [1, 1], "dilation": [1, 1], "groups": 2, "dtype": torch.float32,
            "winograd": True,
        },
        {**CONV_LEAST, "weight_shape": 1, "input_shape": 0},
    )  # fmt: skip
    for groups in (0, -1, 3, 2147483647, 2**62):
        for shape in ((16, 4, 3, 3), (0, 4, 3, 3), (16, 4, 3, 2**40)):
            if groups in (1, 2) and shape[0] and shape[-1] == 3:
                continue
            yield Call(
                f"pack_conv_weight of a meta tensor {shape}, groups={groups}",
                lambda s=shape, g=groups: ops.pack_conv_weight(torch.empty(s, device="meta"), g),
                "pack_conv_weight",
            )
    with FakeTensorMode():
        fake = torch.empty(16, 4, 3, 3)
    yield Call(
        "pack_conv_weight of a fake tensor", lambda: ops.pack_conv_weight(fake, 2147483647), ""
    )


def _block_operands(widths: list[int], sizes: list[int]) -> dict[str, list[Tensor]]:
    convs = list(zip(widths, widths[1:], sizes, strict=False))
    packed = [ops.pack_conv_weight(torch.randn(k, c, n, n)) for c, k, n in convs]
    return {
        "packed": packed,
        "scale": [torch.ones(k) for _, k, _ in convs],
        "shift": [torch.zeros(k) for _, k, _ in convs],
    }


def blocks() -> Iterator[Call]:
    """Residual blocks, bare."""
    bare = torch.ops.fused_resnet
    x = channels_last(2, 8, 9, 8)
    basic = _block_operands([8, 8, 8], [3, 3])
    bottleneck = _block_operands([8, 4, 4, 8], [1, 3, 1])
    shared = {"concatenated": None, "concatenated_shift": None, "winograd": True}
    numbers = {"stride": 1, "dilation": 1, "groups": 1}
    for operands, is_bottleneck in ((basic, False), (bottleneck, True)):
        arguments = {"x": x, **operands, **shared, "bottleneck": is_bottleneck, **numbers}
        yield from calls_of("residual_block", bare.residual_block, arguments, numbers)


def functions() -> Iterator[Call]:
    """The public functions, in inference and in training, on the CPU's kernels."""
    for call in _functions():
        yield Call(call.label, partial(_on_cpu, call.run), call.says)


def _on_cpu(run: Callable[[], object]) -> object:
    with fused_resnet.use_backend("cpu"):
        return run()


def _functions() -> Iterator[Call]:
    live = _conv_operands(False)
    live["conv_weight"] = live.pop("weight")
    live["running_mean"], live["running_var"] = live.pop("mean"), live.pop("var")
    live["residual"] = channels_last(2, 16, 5, 6)
    for training in (False, True):
        arguments = {**live, "training": training}
        for call in calls_of("conv_bn_add_relu", ops.conv_bn_add_relu, arguments, CONV_LEAST, "bn"):
            # In training the convolution is PyTorch's, which reads through freed storages.
            if training and re.search(r"(x|conv_weight|conv_bias)\[0\] (freed|shrunk)", call.label):
                continue
            yield call
    stem = {**live, **POOL}
    del stem["residual"]
    least = {**CONV_LEAST, **POOL_LEAST}
    yield from calls_of("conv_bn_relu_maxpool", ops.conv_bn_relu_maxpool, stem, least)
    packed = _conv_operands(True)
    yield from calls_of("conv_bn_add_relu_packed", ops.conv_bn_add_relu_packed, packed, CONV_LEAST)
    block = {"x": channels_last(2, 8, 9, 8), **_block_operands([8, 8, 8], [3, 3])}
    block |= {"bottleneck": False, "stride": 1, "dilation": 1, "groups": 1}
    least = {"stride": 1, "dilation": 1, "groups": 1}
    yield from calls_of("residual_block", ops.residual_block, block, least)
    # What people met.
    for name, change in {
        "stride": (9223372036854775807, 1),
        "stride that wraps": (2**31 - 1, 2**31 + 1),
        "padding": 2**63 - 1,
    }.items():
        wrong = {**live, name.split()[0]: change}
        yield Call(f"reported: {name}", lambda w=wrong: ops.conv_bn_add_relu(**w), "conv_bn")
    for change in (
        {"pool_stride": 2**61},
        {"pool_kernel": (2**61, 2), "pool_stride": 2**40, "pool_padding": (2**60, 0)},
    ):
        wrong = {**stem, **change}
        yield Call(f"reported: {change}", lambda w=wrong: ops.conv_bn_relu_maxpool(**w), "conv_bn")


def objects() -> Iterator[Call]:
    """The functions and classes of ``_C`` with objects that are not what they take."""
    x = torch.randn(1, 8, 4, 4)
    program = _C.Program.__new__(_C.Program)
    yield Call("a program without __init__", lambda: program(x), "__init__")
    yield Call("a program without an argument", lambda: program())
    yield Call("a program's method without its object", lambda: _C.Program.__call__(5, x))
    yield Call("a copy of a program", lambda: copy.copy(program)(x))
    for dtype in (torch.int8, torch.complex64, torch.bool):
        yield Call(f"peak_flops({dtype})", lambda d=dtype: _C.peak_flops(d))
        yield Call(f"packed dtype of {dtype}", lambda d=dtype: _C.packed_conv_weight_dtype(d))


def after_a_failed_allocation() -> Iterator[Call]:
    """A call again, behind one whose scratch memory could not be had."""
    live = _conv_operands(False)
    arguments = {**live, **POOL, "groups": 2, "stride": [1, 1], "dilation": [1, 1]}
    stem, conv = (
        torch.ops.fused_resnet.conv_bn_relu_maxpool,
        torch.ops.fused_resnet.conv_bn_add_relu,
    )
    plain = {**live, "residual": None, "relu": True}
    # Rows of padding for two rows of a result: 800 GB.
    far = {"padding": [2**31 - 1, 0], "stride": [2**31 - 1, 1], "dilation": [1, 1]}

    def again(call: Callable[..., Tensor], valid: dict[str, Any], wrong: dict[str, Any]) -> None:
        before = call(**valid)
        for _ in range(2):
            try:
                call(**wrong)
            except ERRORS:
                pass
            else:
                raise AssertionError("an allocation of 800 GB did not fail")
            torch.testing.assert_close(call(**valid), before, rtol=0, atol=0)

    yield Call("the stem again", lambda: again(stem, arguments, {**arguments, **far}), None)
    yield Call("a convolution again", lambda: again(conv, plain, {**plain, **far}), None)


#: Of each child.
THREADS = torch.get_num_threads()

GROUPS: dict[str, Callable[[], Iterator[Call]]] = {
    f.__name__: f
    for f in (
        convolutions, stems, batch_norms, weights, blocks, programs, functions, objects,
        after_a_failed_allocation,
    )
}  # fmt: skip


def _answer(call: Call) -> str | None:
    """What is wrong with the answer to a call; None: nothing."""
    try:
        call.run()
    except ERRORS as error:
        said = str(error)
        return None if call.says is None or call.says in said else f"says only {said[:200]!r}"
    except BaseException as error:
        return f"raises {type(error).__name__}: {str(error)[:200]}"
    return None if call.says is None else "returns"


def _child(calls: list[Call], first: int, to: int) -> None:
    """Makes the calls from ``first`` on: writes each one's number before it, its fault behind."""
    signal.alarm(SECONDS)
    torch.set_num_threads(THREADS)
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.manual_seed(0)
    for i in range(first, len(calls)):
        os.write(to, f"{i}\n".encode())
        fault = _answer(calls[i])
        if fault:
            os.write(to, f"{i} {json.dumps(fault)}\n".encode())
    os._exit(0)


def _run(group: str) -> dict[str, Any]:
    calls = list(GROUPS[group]())
    faults: dict[str, str] = {}
    first = 0
    while first < len(calls):
        source, to = os.pipe()
        child = os.fork()
        if child == 0:
            _child(calls, first, to)
        os.close(to)
        with os.fdopen(source) as lines:
            last = first
            for line in lines:
                number, _, fault = line.partition(" ")
                last = int(number)
                if fault:
                    faults[calls[last].label] = json.loads(fault)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            break
        name = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        faults[calls[last].label] = f"ends the process: {name}"
        first = last + 1
    return {"calls": len(calls), "faults": faults}


if __name__ == "__main__":
    torch.set_num_threads(1)  # OpenMP's own threads would be missing in the children
    print(json.dumps({group: _run(group) for group in sys.argv[1:] or GROUPS}))
