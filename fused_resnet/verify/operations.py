"""Every operation against float64: its result, its statistics and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import reference
from ..backends.availability import use_backend
from . import blocks
from .operands import Draw, Inputs, Subject, folded
from .rows import Comparison, Row, compare, relative_error, worst

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

#: ``inference``: no gradient. ``training``: the result and the running statistics. ``backward``:
#: the gradients of that. ``backward in eval``: gradients with the batch norm frozen.
MODES = ("inference", "training", "backward", "backward in eval")

#: Bound in float64, where the reference is the truth: sums of some thousand terms in another order,
#: with an error of 2.2e-16 each.
FLOAT64_BOUND = 1e-13


@dataclass(frozen=True)
class Case:
    """One shape of one operation; the name says what it covers.

    Attributes:
        name: Name of the case.
        x: Shape of the input, ``(N, C, H, W)``.
        weight: Shape of the filters, ``(K, C / groups, kh, kw)``; None for no convolution.
        residual: Whether a residual is added.
        options: The operation's further arguments, by name.
    """

    name: str
    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int] | None = None
    residual: bool = False
    options: dict[str, Any] = field(default_factory=dict)


#: Small shapes that together cover a ResNet's layers, channels that are not a multiple of the
#: vector width, a single channel, odd sizes, strides, dilation, groups, and no ReLU.
CASES: dict[str, tuple[Case, ...]] = {
    "bn_add_relu": (
        Case("64 channels", (2, 64, 14, 14)),
        Case("37 channels, residual", (3, 37, 9, 7), residual=True),
        Case("1 channel, residual, no relu", (4, 1, 5, 6), residual=True, options={"relu": False}),
        Case("37 channels, residual, leaky", (3, 37, 9, 7), residual=True,
             options={"activation": "leaky_relu"}),
    ),
    "conv_bn_add_relu": (
        Case("1x1, residual", (2, 64, 14, 14), (128, 64, 1, 1), True),
        Case("1x1/2, no relu", (2, 40, 9, 9), (72, 40, 1, 1), options={"stride": 2, "relu": False}),
        Case("3x3, residual", (2, 64, 10, 10), (64, 64, 3, 3), True, {"padding": 1}),
        Case("3x3/2, 29 to 31 channels", (2, 29, 15, 13), (31, 29, 3, 3),
             options={"stride": 2, "padding": 1}),
        Case("3x3, dilated, 4 groups", (2, 32, 11, 11), (48, 8, 3, 3),
             options={"padding": 2, "dilation": 2, "groups": 4}),
        Case("7x7/2", (2, 3, 32, 32), (64, 3, 7, 7), options={"stride": 2, "padding": 3}),
        Case("3x3, residual, leaky", (2, 64, 9, 11), (64, 64, 3, 3), True,
             {"padding": 1, "activation": "leaky_relu"}),
    ),
    "conv_bn_relu_maxpool": (
        Case("ResNet's stem", (2, 3, 33, 32), (64, 3, 7, 7)),
        Case("3x3, 17 channels, pool 2/2", (2, 5, 12, 13), (17, 5, 3, 3),
             options={"stride": 1, "padding": 1, "pool_kernel": 2, "pool_stride": 2,
                      "pool_padding": 0}),
        Case("ResNet's stem, leaky", (2, 3, 33, 32), (64, 3, 7, 7),
             options={"activation": "leaky_relu"}),
    ),
    "conv_bn_add_relu_packed": (
        Case("1x1, residual", (2, 64, 14, 14), (128, 64, 1, 1), True),
        Case("3x3, residual", (2, 64, 10, 10), (64, 64, 3, 3), True, {"padding": 1}),
        Case("3x3/2, 29 to 31 channels", (2, 29, 15, 13), (31, 29, 3, 3),
             options={"stride": 2, "padding": 1}),
        Case("3x3, 4 groups", (2, 32, 11, 11), (48, 8, 3, 3), options={"padding": 1, "groups": 4}),
        Case("7x7/2, no relu", (2, 3, 32, 32), (64, 3, 7, 7),
             options={"stride": 2, "padding": 3, "relu": False}),
        Case("3x3, residual, leaky", (2, 64, 9, 11), (64, 64, 3, 3), True,
             {"padding": 1, "activation": "leaky_relu"}),
    ),
    "conv_bn_relu_maxpool_packed": (
        Case("ResNet's stem", (2, 3, 33, 32), (64, 3, 7, 7)),
    ),
}  # fmt: skip

#: The operations of frozen networks, which have no gradient and no running statistics.
FROZEN = ("conv_bn_add_relu_packed", "conv_bn_relu_maxpool_packed", "residual_block")

Function = Callable[..., Tensor]


def verify_operations(
    dtypes: Sequence[torch.dtype] = DTYPES,
    backend: str = "auto",
    progress: Callable[[str], None] = lambda what: None,
) -> Iterator[Row]:
    """One row per operation, dtype, memory format and mode: the worst of its cases and tensors.

    Args:
        dtypes: Storage types, of :data:`DTYPES`.
        backend: A name of :func:`fused_resnet.backends`, or ``"auto"``.
        progress: Called with a short text before each row.

    Raises:
        BackendUnavailable: The backend cannot run here.
    """
    for operation, dtype, memory_format, mode in rows_of(dtypes, backend):
        progress(f"{operation} {str(dtype).removeprefix('torch.')} {memory_format} {mode}")
        yield worst(
            comparisons(operation, dtype, memory_format, mode, lambda: use_backend(backend)),
            operation,
            mode,
            dtype,
            memory_format,
        )


def rows_of(dtypes: Sequence[torch.dtype], backend: str) -> list[tuple[str, torch.dtype, str, str]]:
    """Operation, dtype, memory format and mode of every row.

    Args:
        dtypes: Storage types.
        backend: A name of :func:`fused_resnet.backends`, or ``"auto"``.
    """
    # The reference has no packed weights.
    return [
        (operation, dtype, memory_format, mode)
        for operation in (*CASES, "residual_block")
        for dtype in dtypes
        for memory_format in FORMATS
        for mode in MODES
        if operation not in FROZEN or (mode == "inference" and backend != "reference")
    ]


def comparisons(
    operation: str,
    dtype: torch.dtype,
    memory_format: str,
    mode: str,
    context: Callable[[], AbstractContextManager[Any]],
    device: str = "cpu",
) -> Iterator[Comparison]:
    """All tensors of all cases of one operation.

    Args:
        operation: A key of :data:`CASES`, or ``"residual_block"``.
        dtype: Storage type.
        memory_format: A key of :data:`FORMATS`.
        mode: One of :data:`MODES`.
        context: Makes the context that selects the backend of the operation.
        device: The device of the operation and of PyTorch's unfused run. The exact result is
            computed on the CPU.
    """
    for number, subject in enumerate(_subjects(operation)):
        # The batch norm of a half-precision model is float32 under autocast and half after .half():
        # the cases alternate.
        affine = torch.float32 if number % 2 == 0 and dtype.itemsize == 2 else dtype
        inputs = subject.inputs(Draw(number, dtype, affine, FORMATS[memory_format]))
        exact = {name: t.double() for name, t in inputs.items()}
        truth = _run(subject.unfused, exact, mode)
        there = {name: t.to(device) for name, t in inputs.items()}
        with context():
            answer = _run(subject.fused, there, mode)
        if dtype is torch.float64:
            for name in truth:
                error = relative_error([answer[name]], [truth[name]])
                yield Comparison(f"{subject.name}: {name}", error, None, FLOAT64_BOUND)
            continue
        own = _run(subject.unfused, there, mode)
        for name in truth:
            error, own_error = (
                relative_error([result[name]], [truth[name]]) for result in (answer, own)
            )
            yield compare(f"{subject.name}: {name}", error, own_error, dtype)


def _subjects(operation: str) -> Iterator[Subject]:
    if operation == "residual_block":
        yield from blocks.subjects()
        return
    for case in CASES[operation]:
        unfused = partial(getattr(reference, operation.removesuffix("_packed")), **case.options)
        fused = partial(PACKED.get(operation) or getattr(ops, operation), **case.options)
        yield Subject(case.name, unfused, fused, partial(_inputs, case, unfused))


def _inputs(case: Case, unfused: Function, draw: Draw) -> Inputs:
    channels = case.x[1]
    inputs = {"x": draw.feature_map(*case.x, mean=0.3)}
    if case.weight is not None:
        channels = case.weight[0]
        inputs["conv_weight"] = draw.conv_weight(*case.weight)
    inputs |= draw.batch_norm(channels)
    with torch.no_grad():
        shape = unfused(**inputs).shape
    if case.residual:
        inputs["residual"] = draw.feature_map(*shape)
    inputs["gradient"] = draw.feature_map(*shape)
    return inputs


def _run(function: Function, inputs: Inputs, mode: str) -> dict[str, Tensor]:
    """The results of one call by name. The inputs are not modified."""
    mine = {name: t.clone() for name, t in inputs.items()}
    gradient = mine.pop("gradient", None)
    if mode == "inference":
        with torch.inference_mode():
            return {"y": function(**mine)}
    training = mode != "backward in eval"
    if mode == "training":
        with torch.no_grad():
            y = function(**mine, training=True)
        return {"y": y} | {n: t for n, t in mine.items() if "running" in n}
    leaves = {name: t.requires_grad_() for name, t in mine.items() if "running" not in name}
    y = function(**mine, training=training)
    gradients = torch.autograd.grad(y, list(leaves.values()), gradient)
    return {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def _conv_packed(
    x: Tensor,
    conv_weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None = None,
    *,
    groups: int = 1,
    **options: Any,
) -> Tensor:
    """Fold and pack like ``freeze``, then call the packed operation."""
    scale, shift = folded(x.dtype, bn_weight, bn_bias, running_mean, running_var)
    return ops.conv_bn_add_relu_packed(
        x,
        ops.pack_conv_weight(conv_weight, groups),
        scale,
        shift,
        residual,
        weight_shape=tuple(conv_weight.shape),  # type: ignore[arg-type]
        groups=groups,
        **options,
    )


def _stem_packed(
    x: Tensor,
    conv_weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    **options: Any,
) -> Tensor:
    """Fold and pack like ``freeze``, then call the packed operation."""
    scale, shift = folded(x.dtype, bn_weight, bn_bias, running_mean, running_var)
    return ops.conv_bn_relu_maxpool_packed(
        x,
        ops.pack_conv_weight(conv_weight),
        scale,
        shift,
        weight_shape=tuple(conv_weight.shape),  # type: ignore[arg-type]
        **options,
    )


PACKED: dict[str, Function] = {
    "conv_bn_add_relu_packed": _conv_packed,
    "conv_bn_relu_maxpool_packed": _stem_packed,
}
