"""Every operation against float64: its result, its statistics and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..backends import use_backend
from .rows import Comparison, Row, compare, relative_error, worst

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

#: ``inference``: no gradient. ``training``: the result and the running statistics. ``backward``:
#: the gradients of that. ``backward in eval``: gradients with the batch norm frozen.
MODES = ("inference", "training", "backward", "backward in eval")

#: Bound in float64, where the reference is itself the truth: sums of some thousand terms in another
#: order, at 2.2e-16 each.
FLOAT64_BOUND = 1e-13


@dataclass(frozen=True)
class Case:
    """One shape of one operation; each is here for a reason that its name gives."""

    name: str
    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int] | None = None
    residual: bool = False
    options: dict[str, Any] = field(default_factory=dict)


#: Small, and between them: the shapes of a ResNet's layers, channels that are no multiple of a
#: vector, a single channel, odd sizes, strides, dilation, groups, no ReLU.
CASES: dict[str, tuple[Case, ...]] = {
    "bn_add_relu": (
        Case("64 channels", (2, 64, 14, 14)),
        Case("37 channels, residual", (3, 37, 9, 7), residual=True),
        Case("1 channel, residual, no relu", (4, 1, 5, 6), residual=True, options={"relu": False}),
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
    ),
    "conv_bn_relu_maxpool": (
        Case("ResNet's stem", (2, 3, 33, 32), (64, 3, 7, 7)),
        Case("3x3, 17 channels, pool 2/2", (2, 5, 12, 13), (17, 5, 3, 3),
             options={"stride": 1, "padding": 1, "pool_kernel": 2, "pool_stride": 2,
                      "pool_padding": 0}),
    ),
    "conv_bn_add_relu_packed": (
        Case("1x1, residual", (2, 64, 14, 14), (128, 64, 1, 1), True),
        Case("3x3, residual", (2, 64, 10, 10), (64, 64, 3, 3), True, {"padding": 1}),
        Case("3x3/2, 29 to 31 channels", (2, 29, 15, 13), (31, 29, 3, 3),
             options={"stride": 2, "padding": 1}),
        Case("3x3, 4 groups", (2, 32, 11, 11), (48, 8, 3, 3), options={"padding": 1, "groups": 4}),
        Case("7x7/2, no relu", (2, 3, 32, 32), (64, 3, 7, 7),
             options={"stride": 2, "padding": 3, "relu": False}),
    ),
}  # fmt: skip

Function = Callable[..., Tensor]
Inputs = dict[str, Tensor]


def verify_operations(
    dtypes: Sequence[torch.dtype] = DTYPES,
    backend: str = "auto",
    progress: Callable[[str], None] = lambda what: None,
) -> Iterator[Row]:
    """One row an operation, dtype, memory format and mode; the worst of its cases and tensors.

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
            _comparisons(operation, dtype, memory_format, mode, backend),
            operation,
            mode,
            dtype,
            memory_format,
        )


def rows_of(dtypes: Sequence[torch.dtype], backend: str) -> list[tuple[str, torch.dtype, str, str]]:
    """Operation, dtype, memory format and mode of every row that there is."""
    # A packed weight is for the compiled kernels alone, and has no gradient.
    return [
        (operation, dtype, memory_format, mode)
        for operation in CASES
        for dtype in dtypes
        for memory_format in FORMATS
        for mode in MODES
        if not operation.endswith("_packed") or (mode == "inference" and backend != "reference")
    ]


def _comparisons(
    operation: str, dtype: torch.dtype, memory_format: str, mode: str, backend: str
) -> Iterator[Comparison]:
    packed = operation.endswith("_packed")
    unfused = getattr(reference, operation.removesuffix("_packed"))
    fused = _packed if packed else getattr(ops, operation)
    for number, case in enumerate(CASES[operation]):
        # The batch norm of a half-precision model is float32 under autocast and half after .half():
        # the cases take turns.
        affine = torch.float32 if number % 2 == 0 and dtype.itemsize == 2 else dtype
        inputs = _inputs(unfused, case, dtype, affine, FORMATS[memory_format], seed=number)
        truth = _run(unfused, case, _to(inputs, torch.float64), mode)
        with use_backend(backend):
            answer = _run(fused, case, inputs, mode)
        if dtype is torch.float64:
            for name in truth:
                error = relative_error([answer[name]], [truth[name]])
                yield Comparison(f"{case.name}: {name}", error, None, FLOAT64_BOUND)
            continue
        own = _run(unfused, case, inputs, mode)
        for name in truth:
            error, own_error = (
                relative_error([result[name]], [truth[name]]) for result in (answer, own)
            )
            yield compare(f"{case.name}: {name}", error, own_error, dtype)


def _inputs(
    unfused: Function,
    case: Case,
    dtype: torch.dtype,
    affine: torch.dtype,
    layout: torch.memory_format,
    seed: int,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale + mean

    def feature_map(*shape: int, **how: float) -> Tensor:
        return normal(*shape, **how).to(dtype).contiguous(memory_format=layout)

    channels = case.x[1]
    inputs = {"x": feature_map(*case.x, mean=0.3)}
    if case.weight is not None:
        channels = case.weight[0]
        fan_in = case.weight[1] * case.weight[2] * case.weight[3]
        inputs["conv_weight"] = feature_map(*case.weight, scale=(2 / fan_in) ** 0.5)
    inputs["bn_weight"] = normal(channels, scale=0.3, mean=1.0).to(affine)
    inputs["bn_bias"] = normal(channels, scale=0.3).to(affine)
    inputs["running_mean"] = normal(channels, scale=0.3).to(affine)
    inputs["running_var"] = (normal(channels, scale=0.3).abs() + 0.7).to(affine)
    with torch.no_grad():
        shape = _call(unfused, case, inputs).shape
    if case.residual:
        inputs["residual"] = feature_map(*shape)
    inputs["gradient"] = feature_map(*shape)
    return inputs


def _to(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: t.to(dtype) for name, t in inputs.items()}


def _call(function: Function, case: Case, inputs: Inputs, **more: Any) -> Tensor:
    arguments = {name: t for name, t in inputs.items() if name != "gradient"}
    return function(**arguments, **case.options, **more)


def _run(function: Function, case: Case, inputs: Inputs, mode: str) -> dict[str, Tensor]:
    """What one call gives, by name. The inputs stay as they were."""
    mine = {name: t.clone() for name, t in inputs.items()}
    if mode == "inference":
        with torch.inference_mode():
            return {"y": _call(function, case, mine)}
    training = mode != "backward in eval"
    if mode == "training":
        with torch.no_grad():
            y = _call(function, case, mine, training=True)
        return {"y": y} | {n: t for n, t in mine.items() if "running" in n}
    leaves = {
        name: t.requires_grad_()
        for name, t in mine.items()
        if "running" not in name and name != "gradient"
    }
    y = _call(function, case, mine, training=training)
    gradients = torch.autograd.grad(y, list(leaves.values()), mine["gradient"])
    return {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def _packed(
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
    """Fold and pack as ``freeze`` does, then call the packed operation."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    scale = bn_weight.double() * torch.rsqrt(running_var.double() + 1e-5)
    shift = bn_bias.double() - running_mean.double() * scale
    return ops.conv_bn_add_relu_packed(
        x,
        ops.pack_conv_weight(conv_weight, groups),
        scale.to(wide),
        shift.to(wide),
        residual,
        weight_shape=tuple(conv_weight.shape),  # type: ignore[arg-type]
        groups=groups,
        **options,
    )
