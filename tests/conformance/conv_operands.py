"""Operands of a convolution, in the layouts of the operators' schemas, and their truth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import Conv, batch_norm, conv_weight, doubled, normal
from precisions import Precision, tensor_core_depth
from shapes import channels_last, geometry
from torch import Tensor

from fused_resnet import reference
from fused_resnet.backends.activation import Activation

EPS = 1e-5
RELU, NONE = Activation.RELU, Activation.NONE


def out_shape(case: Conv) -> torch.Size:
    x, w = (
        torch.empty(case.x, device="meta"),
        torch.empty(case.k, case.x[1] // case.args.get("groups", 1), *case.kernel, device="meta"),
    )
    return F.conv2d(x, w, **case.args).shape


class Operands:
    """Of one case: random, and the same numbers for every backend."""

    def __init__(self, case: Conv, precision: Precision) -> None:
        dtype = precision.dtype
        self.case, self.precision = case, precision
        self.x = channels_last(normal(*case.x, dtype=dtype))
        self.weight = channels_last(conv_weight(case, dtype))
        self.bn = batch_norm(case.k, dtype)
        self.bias = torch.randn(case.k, dtype=self.bn[0].dtype)
        self.residual = channels_last(normal(*out_shape(case), dtype=dtype))

    def truth(self, residual: bool = True, activation: int = RELU, bias: bool = True) -> Tensor:
        weight, x = map(self.precision.operand, (self.weight, self.x))
        return reference.conv_bn_add_relu(
            x,
            weight,
            *doubled(self.bn),
            self.residual.double() if residual else None,
            conv_bias=self.bias.double() if bias else None,
            activation=Activation(activation),
            eps=EPS,
            **self.case.args,
        )

    def eager(self, residual: bool = True, activation: int = RELU, bias: bool = True) -> Tensor:
        return reference.conv_bn_add_relu(
            self.x,
            self.weight,
            *self.bn,
            self.residual if residual else None,
            conv_bias=self.bias.to(self.x.dtype) if bias else None,
            activation=Activation(activation),
            eps=EPS,
            **self.case.args,
        )

    def run(
        self, backend, residual: bool = True, activation: int = RELU, bias: bool = True, x=None
    ) -> Tensor:
        with self.precision.set():
            return backend.ops.conv_bn_add_relu(
                self.x if x is None else x,
                self.weight,
                self.bias if bias else None,
                *self.bn,
                self.residual if residual else None,
                *geometry(self.case),
                EPS,
                activation,
            )

    def folded(self) -> tuple[Tensor, Tensor]:
        """Batch norm and the bias as one scale and one shift, as a frozen network has them."""
        weight, bias, mean, var = doubled(self.bn)
        scale = weight / (var + EPS).sqrt()
        wide = self.bn[0].dtype
        return scale.to(wide), (bias + (self.bias.double() - mean) * scale).to(wide)

    def run_packed(self, backend, packed_weight: Tensor, activation: int = RELU) -> Tensor:
        """The frozen form of :meth:`run`."""
        with self.precision.set():
            return backend.ops.conv_bn_add_relu_packed(
                self.x,
                packed_weight,
                *self.folded(),
                self.residual,
                self.weight.shape,
                *geometry(self.case),
                activation,
            )

    def check(self, backend, result: Tensor, **flags) -> None:
        """Compare a result of :meth:`run` with float64."""
        depth = tensor_core_depth(backend, self.weight)
        self.precision.check(result, self.eager(**flags), self.truth(**flags), depth)


def check(backend, case: Conv, precision: Precision, **flags) -> None:
    operands = Operands(case, precision)
    result = operands.run(backend, **flags)
    operands.check(backend, result, **flags)
    assert result.is_contiguous(memory_format=torch.channels_last)


def with_affine_residual(operands: Operands, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's own run and the truth where the residual has an affine step of its own."""

    def along(t: Tensor) -> Tensor:
        return t.view(-1, 1, 1)

    dtype = operands.x.dtype
    added = operands.residual.double() * along(scale.double()) + along(shift.double())
    truth = (operands.truth(residual=False, activation=NONE) + added).relu()
    eager = operands.eager(residual=False, activation=NONE)
    eager += operands.residual * along(scale.to(dtype)) + along(shift.to(dtype))
    return eager.relu(), truth
