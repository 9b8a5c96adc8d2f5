"""Single operations at the shapes of ResNet-50, against the unfused calls that they replace."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..backends import reference
from .harness import Entry
from .networks import LIMITS, relative_error
from .subject import Subject


class Shape(NamedTuple):
    """One layer.

    Attributes:
        operation: Name of its operation in :mod:`fused_resnet.ops`.
        x: Shape of one image of its input, ``(C, H, W)``.
        weight: Shape of its filters, ``(K, C / groups, kh, kw)``; None for no convolution.
        residual: Whether a residual is added.
        options: The operation's further arguments, by name.
        training: Whether forward and backward by the batch's statistics are timed, not inference.
    """

    operation: str
    x: tuple[int, int, int]
    weight: tuple[int, int, int, int] | None = None
    residual: bool = False
    options: Mapping[str, Any] = MappingProxyType({})
    training: bool = False


#: One layer of each kind that takes a large share of ResNet-50's time.
SHAPES = {
    "stem 7x7/2 and max-pool": Shape("conv_bn_relu_maxpool", (3, 224, 224), (64, 3, 7, 7)),
    "1x1 64 to 256, 56x56, residual": Shape(
        "conv_bn_add_relu", (64, 56, 56), (256, 64, 1, 1), residual=True
    ),
    "3x3 64, 56x56": Shape(
        "conv_bn_add_relu", (64, 56, 56), (64, 64, 3, 3), options={"padding": 1}
    ),
    "3x3/2 128, 56x56": Shape(
        "conv_bn_add_relu", (128, 56, 56), (128, 128, 3, 3), options={"padding": 1, "stride": 2}
    ),
    "3x3 256, 14x14": Shape(
        "conv_bn_add_relu", (256, 14, 14), (256, 256, 3, 3), options={"padding": 1}
    ),
    "1x1 512 to 2048, 7x7, residual": Shape(
        "conv_bn_add_relu", (512, 7, 7), (2048, 512, 1, 1), residual=True
    ),
    "256, 56x56, residual, training": Shape(
        "bn_add_relu", (256, 56, 56), residual=True, training=True
    ),
}


def providers(shape: str) -> tuple[str, ...]:
    """The providers of a shape.

    ``unfused`` is PyTorch in channels_last, the baseline; ``packed`` the operation of ``freeze``.

    Args:
        shape: A key of :data:`SHAPES`.
    """
    packed = SHAPES[shape].operation == "conv_bn_add_relu"
    return ("unfused", "fused", "packed") if packed else ("unfused", "fused")


def build(provider: str, shape: str, batch: int, dtype: str) -> Subject:
    """Prepare one provider in a worker process. In training one call is a forward and a backward.

    Args:
        provider: A name of :func:`providers`.
        shape: A key of :data:`SHAPES`.
        batch: Number of images.
        dtype: Storage type, without ``torch.``.
    """
    layer = SHAPES[shape]
    inputs = _inputs(layer, batch)
    # In training the gradient of x is checked, since it depends on everything else.
    exact = _call(getattr(reference, layer.operation), layer, _cast(inputs, torch.float64))
    truth = exact()
    mine = _cast(inputs, getattr(torch, dtype))
    if provider == "packed":
        call = _packed_call(layer, mine)
    else:
        module = {"unfused": reference, "fused": ops}[provider]
        call = _call(getattr(module, layer.operation), layer, mine)
    return Subject(call, lambda: relative_error(call(), truth))


def entries(shape: str, batch: int, dtype: str) -> list[Entry]:
    """One entry per provider, for :func:`fused_resnet.bench.harness.compare`.

    Args:
        shape: A key of :data:`SHAPES`.
        batch: Number of images.
        dtype: Storage type, without ``torch.``.
    """
    return [
        Entry(
            name,
            f"{__name__}:build",
            {"provider": name, "shape": shape, "batch": batch, "dtype": dtype},
            LIMITS[dtype],
        )
        for name in providers(shape)
    ]


def _inputs(layer: Shape, batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale + mean

    inputs = {"x": normal(batch, *layer.x)}
    channels = layer.x[0]
    if layer.weight is not None:
        channels = layer.weight[0]
        fan_in = layer.weight[1] * layer.weight[2] * layer.weight[3]
        inputs["conv_weight"] = normal(*layer.weight, scale=(2 / fan_in) ** 0.5)
    inputs["bn_weight"] = normal(channels, scale=0.3, mean=1.0)
    inputs["bn_bias"] = normal(channels, scale=0.3)
    inputs["running_mean"] = normal(channels, scale=0.3)
    inputs["running_var"] = normal(channels, scale=0.3).abs() + 0.7
    if layer.residual:
        inputs["residual"] = normal(batch, channels, *layer.x[1:])
    return inputs


def _cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    result = {}
    for name, t in inputs.items():
        layout = torch.channels_last if t.dim() == 4 else torch.contiguous_format
        result[name] = t.to(dtype).contiguous(memory_format=layout)
    return result


def _call(
    function: Callable[..., Tensor], layer: Shape, inputs: dict[str, Tensor]
) -> Callable[[], Tensor]:
    if not layer.training:
        return lambda: function(**inputs, **layer.options)
    leaves = [inputs[n].requires_grad_() for n in ("x", "bn_weight", "bn_bias", "residual")]
    noise = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(1))
    gradient = torch.empty_like(inputs["x"]).copy_(noise)

    def step() -> Tensor:
        # The worker times in inference mode, which has no gradients.
        with torch.inference_mode(False), torch.enable_grad():
            y = function(**inputs, **layer.options, training=True)
            return torch.autograd.grad(y, leaves, gradient)[0]

    return step


def _packed_call(layer: Shape, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The operation of ``freeze``, with a packed weight and a folded batch norm."""
    assert layer.weight is not None
    packed = ops.pack_conv_weight(inputs["conv_weight"])
    scale = inputs["bn_weight"].double() * torch.rsqrt(inputs["running_var"].double() + 1e-5)
    shift = inputs["bn_bias"].double() - inputs["running_mean"].double() * scale
    return functools.partial(
        ops.conv_bn_add_relu_packed,
        inputs["x"],
        packed,
        scale.to(packed.dtype),
        shift.to(packed.dtype),
        inputs.get("residual"),
        weight_shape=layer.weight,
        **layer.options,
    )
