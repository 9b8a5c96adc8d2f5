"""Programs for the tests of ``run_program``, and the same computation by single operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from cases import normal
from torch import Tensor

from fused_resnet import ops

#: The operations by their numbers in csrc/program.h.
OPERATIONS = (
    "conv", "conv_max_pool", "max_pool", "zero_pad_shortcut", "global_avg_pool", "linear",
    "avg_pool", "add_relu",
)  # fmt: skip

#: The places of a step's integers, where two stand side by side of the first one.
PLACES = {
    "operation": 0, "input": 1, "residual": 2, "tensor": 3, "activation": 4, "kernel": 5,
    "stride": 7, "padding": 9, "dilation": 11, "groups": 13, "out_channels": 14, "winograd": 15,
    "pool_kernel": 16, "pool_stride": 18, "pool_padding": 20, "zeros": 22, "ceil_mode": 23,
}  # fmt: skip

Pool = tuple[int, int, int]


class Program:
    """A program under construction. Each method adds a step and returns its value.

    Args:
        channels: Of the input, value 0.
        dtype: Of all maps.
    """

    def __init__(self, channels: int, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.wide = torch.float64 if dtype is torch.float64 else torch.float32
        self.channels = [channels]
        self.tensors: list[Tensor] = []
        self.steps: list[int] = []
        self._single: list[Callable[[list[Tensor]], Tensor]] = []

    def __len__(self) -> int:
        return len(self._single)

    def conv(
        self, value: int, channels: int, kernel: int = 3, *, stride: int = 1, dilation: int = 1,
        groups: int = 1, residual: int = -1, relu: bool = True, winograd: bool = False,
        pool: Pool | None = None,
    ) -> int:  # fmt: skip
        """A convolution that keeps the map's size but for its stride; with ``pool`` a stem."""
        depth = self.channels[value] // groups * kernel * kernel
        sizes = (channels, self.channels[value] // groups, kernel, kernel)
        weight = normal(*sizes, dtype=self.dtype, scale=depth**-0.5)
        scale, shift = (torch.rand(channels, dtype=self.wide) + 0.5 for _ in range(2))
        packed = ops.pack_conv_weight(weight, groups)
        padding = kernel // 2 * dilation
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}

        def single(values: list[Tensor]) -> Tensor:
            x, operands = values[value], (packed, scale, shift)
            if pool is not None:
                names = ("pool_kernel", "pool_stride", "pool_padding")
                pooled = dict(zip(names, ([n, n] for n in pool), strict=True))
                plain = {k: v if k == "groups" else [v, v] for k, v in geometry.items()}
                bare = torch.ops.fused_resnet.conv_bn_relu_maxpool_packed
                return bare(x, *operands, weight_shape=sizes, **plain, **pooled)
            r = values[residual] if residual >= 0 else None
            return ops.conv_bn_add_relu_packed(
                x, *operands, r, weight_shape=sizes, **geometry, relu=relu, winograd=winograd
            )

        fields = {"kernel": kernel, "out_channels": channels, "winograd": winograd, **geometry}
        if pool is not None:
            fields |= {"pool_kernel": pool[0], "pool_stride": pool[1], "pool_padding": pool[2]}
        operation = "conv" if pool is None else "conv_max_pool"
        fields |= {"residual": residual, "activation": relu}
        return self._add(operation, value, channels, single, (packed, scale, shift), **fields)

    def max_pool(self, value: int, kernel: int, stride: int, padding: int, ceil: bool = False):
        return self._pool("max_pool", F.max_pool2d, value, kernel, stride, padding, ceil)

    def avg_pool(self, value: int, kernel: int, stride: int, padding: int, ceil: bool = False):
        return self._pool("avg_pool", F.avg_pool2d, value, kernel, stride, padding, ceil)

    def _pool(
        self, operation: str, single: Callable[..., Tensor], value: int, kernel: int, stride: int,
        padding: int, ceil: bool,
    ) -> int:  # fmt: skip
        return self._add(
            operation, value, self.channels[value],
            lambda values: single(values[value], kernel, stride, padding, ceil_mode=ceil),
            kernel=kernel, stride=stride, padding=padding, ceil_mode=ceil,
        )  # fmt: skip

    def zero_pad(self, value: int, zeros: int, stride: int) -> int:
        def single(values: list[Tensor]) -> Tensor:
            return F.pad(values[value][:, :, ::stride, ::stride], (0, 0, 0, 0, zeros, zeros))

        channels = self.channels[value] + 2 * zeros
        return self._add("zero_pad_shortcut", value, channels, single, zeros=zeros, stride=stride)

    def mean(self, value: int) -> int:
        """The global average; its truth is a program of one step."""
        return self._add("global_avg_pool", value, self.channels[value], value)

    def linear(self, value: int, classes: int, *, relu: bool = False) -> int:
        """A fully connected layer; its truth is a program of one step."""
        features = self.channels[value]
        weight = normal(classes, features, dtype=self.dtype, scale=features**-0.5)
        bias = normal(classes, dtype=self.dtype)
        fields = {"activation": relu, "out_channels": classes}
        return self._add("linear", value, classes, value, (weight, bias), **fields)

    def add(self, value: int, residual: int, *, relu: bool = True) -> int:
        def single(values: list[Tensor]) -> Tensor:
            y = values[value] + values[residual]
            return y.relu() if relu else y

        channels = self.channels[value]
        fields = {"residual": residual, "activation": relu}
        return self._add("add_relu", value, channels, single, **fields)

    def run(self, x: Tensor, outputs: Sequence[int] | None = None) -> list[Tensor]:
        """The operator's results: the last value, or ``outputs``."""
        wanted = [len(self)] if outputs is None else list(outputs)
        return torch.ops.fused_resnet.run_program(x, self.tensors, self.steps, wanted)

    def one_by_one(self, x: Tensor) -> list[Tensor]:
        """All values, each by its single operation."""
        values = [x]
        for step in self._single:
            values.append(step(values))
        return values

    def _add(
        self, operation: str, value: int, channels: int,
        single: Callable[[list[Tensor]], Tensor] | int, tensors: Sequence[Tensor] = (),
        **fields: int,
    ) -> int:  # fmt: skip
        """``single``: the single operation, or the value that a program of one step takes."""
        fields = {"residual": -1, "tensor": len(self.tensors) if tensors else -1, **fields}
        step = encode(operation, value, **fields)
        if isinstance(single, int):
            alone = encode(operation, 0, **{**fields, "tensor": 0})
            given, source = list(tensors), single

            def single(values: list[Tensor]) -> Tensor:
                x = values[source]
                x = x if x.dim() == 4 else x[..., None, None]
                return torch.ops.fused_resnet.run_program(x, given, alone, [1])[0]

        self.tensors += tensors
        self.steps += step
        self.channels.append(channels)
        self._single.append(single)
        return len(self)


def encode(operation: str, value: int, **fields: int) -> list[int]:
    """A step's 24 integers; kernels, strides, paddings and dilations are squares."""
    step = [0] * 24
    pairs = ("kernel", "stride", "padding", "dilation", "pool_kernel", "pool_stride")
    for name, number in {
        "operation": OPERATIONS.index(operation),
        "input": value,
        **fields,
    }.items():
        place = PLACES[name]
        step[place] = int(number)
        if name in (*pairs, "pool_padding"):
            step[place + 1] = int(number)
    return step


def basic_block(p: Program, x: int, channels: int, stride: int = 1, **options: bool) -> int:
    """Two 3x3 convolutions, with a projection where the shapes differ."""
    r = x
    if stride != 1 or p.channels[x] != channels:
        r = p.conv(x, channels, 1, stride=stride, relu=False)
    return p.conv(p.conv(x, channels, stride=stride, **options), channels, residual=r, **options)


def bottleneck(p: Program, x: int, width: int, channels: int, stride: int = 1, **more: int) -> int:
    """A 1x1, a 3x3 and a 1x1 convolution, with a projection where the shapes differ."""
    r = x
    if stride != 1 or p.channels[x] != channels:
        r = p.conv(x, channels, 1, stride=stride, relu=False)
    h = p.conv(p.conv(x, width, 1), width, stride=stride, **more)
    return p.conv(h, channels, 1, residual=r)


def head(p: Program, x: int, classes: int) -> int:
    """The average over all pixels and a fully connected layer."""
    return p.linear(p.mean(x), classes)
