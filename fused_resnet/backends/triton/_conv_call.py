"""One call of the convolution kernels: its operands, checked, and its launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..activation import Activation
from ._common import REGISTERS, cdiv, check_map, check_same, on_device, vector
from ._conv_kernels import (
    MERGED_SLABS,
    STATISTICS_C,
    STATISTICS_S,
    conv_bn_add_relu_kernel,
    conv_split_finish_kernel,
    conv_statistics_kernel,
)
from ._conv_plan import (
    FINISH_TILE,
    GROUP_M,
    ConvConfig,
    choose,
    is_matrix,
    mode_of,
    parts_of,
    precision_of,
    programs_of,
    registers_of,
    steps_of,
    tap_channels,
    tiles_of,
)
from ._conv_shape import check_pair, conv_shape
from ._device import device_of


class Affine(NamedTuple):
    """The batch norm after a convolution, with the convolution's bias; or a scale and a shift.

    Attributes:
        conv_bias: Bias of the convolution, ``(K,)``; None means 0.
        weight: Scale, ``(K,)``; None means 1.
        bias: Shift, ``(K,)``; None means 0.
        mean: Mean, ``(K,)``; None means 0.
        var: Variance, ``(K,)``; None means that ``weight`` is the scale already.
        eps: Added to the variance.
    """

    conv_bias: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = 0.0

    def checked(self, op: str, names: Sequence[str], channels: int, x: Tensor) -> Affine:
        """A copy whose vectors are checked and contiguous.

        Args:
            op: Name of the operation, for messages.
            names: Names of the vectors in messages, in the order of the attributes.
            channels: Expected length of the vectors.
            x: Input of the convolution, whose device the vectors must have.
        """
        dense = [vector(op, *pair, channels, x) for pair in zip(names, self[:5], strict=True)]
        return Affine(dense[0], dense[1], dense[2], dense[3], dense[4], self.eps)


BATCH_NORM = ("conv_bias", "bn_weight", "bn_bias", "mean", "var")
FOLDED = ("", "scale", "shift", "", "")


class Second(NamedTuple):
    """A 1x1 convolution that is added to the result.

    Attributes:
        x: Input of that convolution, ``(N, C2, H2, W2)``.
        stride: Stride of that convolution, ``(height, width)``.
    """

    x: Tensor
    stride: tuple[int, int]


class BatchNorm(NamedTuple):
    """What the kernel that finishes the statistics makes of them for the batch norm that follows.

    Attributes:
        scale: Scale of the batch norm, ``(K,)`` float32, written to.
        shift: Shift of the batch norm, ``(K,)`` float32, written to.
        weight: Weight of the batch norm, ``(K,)``, any float; None means 1.
        bias: Bias of the batch norm, ``(K,)``, any float; None means 0.
        running_mean: Running mean, ``(K,)``, any float, written to; None for none.
        running_var: Running variance, ``(K,)``, any float, written to; None for none.
        batches: ``int64`` scalar, counted up; None for none.
        eps: Added to the variance.
        momentum: Weight of the batch in the running statistics.
    """

    scale: Tensor
    shift: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batches: Tensor | None
    eps: float
    momentum: float


class ConvCall:
    """One call of the convolution: checked sizes and operands.

    Args:
        op: Name of the operation, for messages.
        x: Input, ``(N, C, H, W)``.
        weight: Filters as a vector, [k][kh][kw][c / groups], followed by those of ``second``.
        weight_shape: Shape of the filters, ``(K, C / groups, kh, kw)``.
        geometry: Stride, padding and dilation as ``(height, width)``, and the number of groups.
        affine: The batch norm after the convolution.
        names: Names of the vectors of ``affine`` in messages.
        residual: Map that is added, shape of the result, dtype of ``x``; None for none.
        residual_affine: Scale and shift of the residual, ``(K,)`` each, or two None.
        prologue: Scale and shift of ``x`` before an activation, ``(C,)`` float32 each, checked; or
            two None.
        second: A 1x1 convolution that is added; None for none.
        activation: Activation that is applied to the sum.
        in_activation: Activation that is applied to the input after the prologue.

    Attributes:
        shape: The checked sizes.
        like: ``x`` as it was given; the results have its dtype and device.
        depth: Terms of each sum: taps and input channels, and the channels of ``second``.
    """

    def __init__(
        self,
        op: str,
        x: Tensor,
        weight: Tensor,
        weight_shape: Sequence[int],
        geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
        affine: Affine,
        names: Sequence[str],
        residual: Tensor | None = None,
        residual_affine: tuple[Tensor | None, Tensor | None] = (None, None),
        prologue: tuple[Tensor | None, Tensor | None] = (None, None),
        second: Second | None = None,
        activation: int = Activation.RELU,
        in_activation: int = Activation.RELU,
    ) -> None:
        s = conv_shape(op, x, weight_shape, *geometry)
        self.op, self.shape, self.like = op, s, x
        self.activation = int(activation)
        self.in_activation = 0 if prologue[0] is None else int(in_activation)
        self.x = self.map(x)
        self.second = second and self._second(second)
        self.depth = s.depth + (second.x.shape[1] if second else 0)
        check_same(op, "packed", weight.reshape(-1), [s.k * self.depth], x)
        self.weight = weight.contiguous().view(s.k, self.depth)
        self.affine = affine.checked(op, names, s.k, x)
        check_same(op, "residual", residual, s.result, x)
        self.residual = None if residual is None else self.map(residual)
        if (residual_affine[0] is None) != (residual_affine[1] is None):
            raise ValueError(f"{op}: residual_scale, residual_shift: expected both or neither")
        self.residual_affine = [
            vector(op, f"residual_{name}", v, s.k, x)
            for name, v in zip(("scale", "shift"), residual_affine, strict=True)
        ]
        self.prologue = prologue

    @staticmethod
    def map(t: Tensor) -> Tensor:
        """A map in channels_last order, copied only if it is not."""
        return t.contiguous(memory_format=torch.channels_last)

    def _second(self, second: Second) -> Second:
        op, s, (x, stride) = self.op, self.shape, second
        check_map(op, "x2", x)
        stride = check_pair(op, "stride2", stride, 1)
        size = [(n - 1) // by + 1 for n, by in zip(x.shape[2:], stride, strict=True)]
        if s.groups != 1:
            raise ValueError(f"{op}: groups: expected 1, got {s.groups}")
        if x.shape[0] != s.n or size != [s.out_h, s.out_w]:
            raise ValueError(
                f"{op}: x2: expected {s.n} images with a pixel for each of {s.out_h} x {s.out_w} "
                f"results, got {list(x.shape)} with stride {list(stride)}"
            )
        check_same(op, "x2", x, x.shape, self.like)
        if x.shape[1:].numel() >= 2**31:
            raise ValueError(
                f"{op}: x2: expected less than 2^31 elements in an image, got {list(x.shape)}"
            )
        return Second(self.map(x), stride)

    def empty(self, channels: int | None = None) -> Tensor:
        """An uninitialised map of the result's size, channels_last."""
        n, k, h, w = self.shape.result
        return torch.empty(
            (n, channels or k, h, w),
            dtype=self.like.dtype,
            device=self.like.device,
            memory_format=torch.channels_last,
        )

    def choose(self, may_split: bool) -> ConvConfig:
        """The configuration with the least estimated cost."""
        second = self.second.x.shape[1] if self.second else 0
        precision, device = precision_of(self.x), device_of(self.x)
        residual = self.residual is not None
        return choose(self.shape, precision, device, second, residual, self.has_prologue, may_split)

    def operands(self, config: ConvConfig) -> dict[str, Any]:
        """The kernel's arguments for input and filters, and how it traverses the depth."""
        s, size = self.shape, self.x.element_size()
        mode = mode_of(s, config)
        even = s.group_c % config.block_k == 0

        def fits(t: Tensor, row: int) -> bool:
            return config.descriptors and t.data_ptr() % 16 == 0 and row * size % 16 == 0

        # A tile of filters must not extend into the next tap, nor one of pixels into another group.
        by_tile = is_matrix(s, config) and self.second is None
        x_rows = s.n * s.h * s.w
        w_fits = fits(self.weight, self.depth) and mode != "flat" and (even or by_tile)
        x_fits = fits(self.x, s.c) and by_tile
        x: Any = self.x
        w: Any = self.weight
        if w_fits:
            w = TensorDescriptor(
                w, [s.k, self.depth], [self.depth, 1], [config.block_n, config.block_k]
            )
        if x_fits:
            flat = self.x.permute(0, 2, 3, 1).view(x_rows, s.c)
            x = TensorDescriptor(flat, [x_rows, s.c], [s.c, 1], [config.block_m, config.block_k])
        return {
            "x_ptr": x,
            "w_ptr": w,
            "MODE": mode,
            "EVEN_C": even and mode != "flat",
            "PRECISION": precision_of(self.x),
            "X_DESCRIPTOR": x_fits,
            "W_DESCRIPTOR": w_fits,
        }

    @property
    def has_prologue(self) -> bool:
        """Whether a batch norm is applied to the input."""
        return self.prologue[0] is not None

    def geometry(self) -> dict[str, Any]:
        """The sizes among the arguments of ``accumulate``."""
        s = self.shape
        return {
            "H": s.h, "W": s.w, "C": s.c, "KH": s.kh, "KW": s.kw, "TAP_C": tap_channels(s),
            "stride_h": s.stride[0], "stride_w": s.stride[1],
            "pad_h": s.padding[0], "pad_w": s.padding[1],
            "dil_h": s.dilation[0], "dil_w": s.dilation[1],
            "group_c": s.group_c, "w_stride": self.depth,
        }  # fmt: skip

    def epilogue(self) -> dict[str, Any]:
        """The arguments of ``finish``."""
        a = self.affine
        return {
            "conv_bias_ptr": a.conv_bias, "weight_ptr": a.weight, "bias_ptr": a.bias,
            "mean_ptr": a.mean, "var_ptr": a.var, "eps": float(a.eps),
            "residual_ptr": self.residual,
            "residual_scale_ptr": self.residual_affine[0],
            "residual_shift_ptr": self.residual_affine[1],
            "K": self.shape.k, "ACTIVATION": self.activation,
        }  # fmt: skip

    def run(self, config: ConvConfig | None, statistics: Tensor | None = None) -> Tensor:
        """The result, channels_last.

        Args:
            config: Forces a configuration; None chooses one.
            statistics: Receives the mean and M2 of each tile of rows; None for none.
        """
        s, y = self.shape, self.empty()
        if y.numel() == 0:
            return y
        config = config or self.choose(may_split=True)
        second, (h2, w2, c2, stride2) = None, (1, 1, 1, (1, 1))
        if self.second:
            second, stride2 = self.second
            c2, h2, w2 = second.shape[1:]
        steps = steps_of(s, config)
        added = c2 if self.second else 0
        all_steps = steps + cdiv(added, config.block_k)
        precision, device = precision_of(y), device_of(y)
        registers = registers_of(config, device, precision, self.has_prologue)
        programs = programs_of(s, config, precision, device, added, self.has_prologue)
        partial = None
        if config.split_k > 1:
            partial = torch.empty(
                (config.split_k, s.rows, s.k), dtype=torch.float32, device=y.device
            )
        with on_device(y):
            conv_bn_add_relu_kernel[(programs, s.groups, config.split_k)](
                **self.operands(config), **self.geometry(), **self.epilogue(),
                second_ptr=second, y_ptr=y, partial_ptr=partial, statistics_ptr=statistics,
                in_scale_ptr=self.prologue[0], in_shift_ptr=self.prologue[1],
                IN_ACTIVATION=self.in_activation,
                M=s.rows, OH=s.out_h, OW=s.out_w, group_k=s.group_k,
                H2=h2, W2=w2, C2=c2, stride2_h=stride2[0], stride2_w=stride2[1],
                steps=steps, steps_per_split=cdiv(all_steps, config.split_k),
                GROUP_M=GROUP_M, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                BLOCK_K=config.block_k, PARTS=parts_of(config),
                PERSISTENT=programs < tiles_of(s, config), num_warps=config.warps,
                num_stages=config.stages, maxnreg=registers,
            )  # fmt: skip
            if partial is not None:
                m, n, warps = FINISH_TILE
                conv_split_finish_kernel[(cdiv(s.rows, m), cdiv(s.k, n))](
                    partial, y, **self.epilogue(), M=s.rows, splits=config.split_k,
                    BLOCK_M=m, BLOCK_N=n, num_warps=warps, maxnreg=REGISTERS,
                )  # fmt: skip
        return y

    def run_with_statistics(
        self, config: ConvConfig | None, norm: BatchNorm | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The result, and the mean and biased variance of each of its channels.

        Args:
            config: Forces a configuration, of which split_k is ignored; None chooses one.
            norm: The batch norm that follows, which the last kernel finishes; None if there is
                none, and for an empty result.
        """
        s = self.shape
        config = (config or self.choose(may_split=False))._replace(split_k=1)
        mean = torch.empty((s.k,), dtype=torch.float32, device=self.x.device)
        var = torch.empty_like(mean)
        if s.rows == 0:
            return self.empty(), mean.zero_(), var.zero_()
        slabs, slab_rows = cdiv(s.rows, config.block_m), config.block_m
        statistics = torch.empty((slabs, 2, s.k), dtype=torch.float32, device=mean.device)
        y = self.run(config, statistics)

        def merge(span: int, merged: Tensor | None) -> None:
            last = norm if norm is not None and merged is None else None
            conv_statistics_kernel[(cdiv(s.k, STATISTICS_C), cdiv(slabs, span))](
                statistics, merged, mean, var,
                last and last.weight, last and last.bias, last and last.scale, last and last.shift,
                last and last.running_mean, last and last.running_var, last and last.batches,
                s.rows, s.k, slabs, slab_rows, span, min(span * slab_rows, s.rows),
                float(last.eps) if last else 1.0, float(last.momentum) if last else 0.0,
                BLOCK_S=STATISTICS_S, BLOCK_C=STATISTICS_C, num_warps=4, maxnreg=REGISTERS,
            )  # fmt: skip

        with on_device(y):
            if slabs > MERGED_SLABS:
                span = cdiv(slabs, MERGED_SLABS)
                merged = statistics.new_empty((cdiv(slabs, span), 2, s.k))
                merge(span, merged)
                statistics, slabs, slab_rows = merged, merged.shape[0], slab_rows * span
            merge(slabs, None)
        return y, mean, var


def filters(op: str, weight: Tensor, x: Tensor) -> Tensor:
    """A weight ``(K, C / groups, kh, kw)`` as a vector in the order [k][kh][kw][c / groups]."""
    check_same(op, "weight", weight, weight.shape, x)
    return weight.permute(0, 2, 3, 1).reshape(-1) if weight.dim() == 4 else weight
