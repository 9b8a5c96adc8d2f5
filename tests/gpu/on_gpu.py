"""What the tests of the public functions share: operands on the device, and PyTorch's own run."""

from __future__ import annotations

from typing import Any

import torch
from cases import FORMATS, Conv, batch_norm, conv_weight, doubled, normal
from precisions import Precision
from torch import Tensor

import fused_resnet as fr
from fused_resnet import ops, reference

DEVICE = torch.device("cuda")
BACKEND = "cuda"


def there(values: Any) -> Any:
    """The same on the device, in the same memory format."""
    if isinstance(values, Tensor):
        return values.to(DEVICE)
    if isinstance(values, dict):
        return {name: there(v) for name, v in values.items()}
    return None if values is None else type(values)(there(v) for v in values)


def called(operation: str, operands: dict[str, Any], **options: Any) -> Tensor:
    """One of our operations, on the device's kernels and no other's."""
    with fr.use_backend(BACKEND):
        return getattr(ops, operation)(**operands, **options)


def unfused(operation: str, operands: dict[str, Any], **options: Any) -> Tensor:
    """PyTorch's own operators, where the operands are."""
    return getattr(reference, operation)(**operands, **options)


def exact(operands: dict[str, Any], precision: Precision | None = None) -> dict[str, Any]:
    """In float64 on the CPU; what a convolution multiplies is rounded as the precision rounds."""
    result = {}
    for name, value in operands.items():
        multiplied = precision is not None and name in ("x", "conv_weight")
        t = None if value is None else value.detach().cpu()
        result[name] = None if t is None else precision.operand(t) if multiplied else doubled(t)
    return result


def bn_operands(shape: tuple[int, ...], dtype: torch.dtype, fmt: str, *, residual: bool) -> Any:
    """Of bn_add_relu, on the CPU."""
    names = ("bn_weight", "bn_bias", "running_mean", "running_var")
    x = normal(*shape, dtype=dtype, shift=0.5).contiguous(memory_format=FORMATS[fmt])
    result = {"x": x, **dict(zip(names, batch_norm(shape[1], dtype), strict=True))}
    if residual:
        result["residual"] = normal(*shape, dtype=dtype).contiguous(memory_format=FORMATS[fmt])
    return result


def conv_operands(case: Conv, dtype: torch.dtype, fmt: str, *, residual: bool) -> Any:
    """Of conv_bn_add_relu, on the CPU."""
    result = bn_operands((1, case.k, 1, 1), dtype, fmt, residual=False)
    result["x"] = normal(*case.x, dtype=dtype).contiguous(memory_format=FORMATS[fmt])
    result["conv_weight"] = conv_weight(case, dtype).contiguous(memory_format=FORMATS[fmt])
    if residual:
        shape = unfused("conv_bn_add_relu", result, **case.args).shape
        result["residual"] = normal(*shape, dtype=dtype).contiguous(memory_format=FORMATS[fmt])
    return result


def on_the_device(result: Tensor, fmt: str) -> Tensor:
    """The result on the CPU, after a look at where it is and how it lies."""
    assert result.device.type == DEVICE.type
    assert result.is_contiguous(memory_format=FORMATS[fmt])
    return result.cpu()


def folded(operands: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm, float32, as a frozen network keeps them."""
    names = ("bn_weight", "bn_bias", "running_mean", "running_var")
    weight, bias, mean, var = (operands[name].double() for name in names)
    scale = weight / (var + 1e-5).sqrt()
    return scale.float(), (bias - mean * scale).float()
