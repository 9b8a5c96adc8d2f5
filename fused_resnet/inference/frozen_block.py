"""Frozen residual blocks: a whole block is one operation.

On the CPU a large batch goes through the block in micro-batches that stay in the cache, and the
maps between its convolutions use memory that the next block reuses. On CUDA there are two gains
over one call for each convolution: where a bottleneck has 64 or 128 middle channels its last two
convolutions are one kernel (``csrc/cuda/kernels/residual_block.cuh``); and where a block has a
projection shortcut, the shortcut's convolution and the block's last are one GEMM over their
concatenated input channels, so that the shortcut's result is never stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.availability import resolve_backend
from ..nn.fused_forward import NO_PADDING, BlockModules, FusedForward
from ..nn.module_kinds import FoldedBatchNorm, inner_activation, is_hooked, is_observed, is_relu
from ..ops import packed as packed_ops
from . import export
from .frozen_conv import FrozenConv
from .frozen_module import Frozen

#: The arguments of the operator ``residual_block`` after the input, in its order; cached, so that a
#: call builds nothing.
BlockOperands = tuple[Any, ...]


class FrozenBlock(Frozen):
    """Mixin for a frozen basic block or bottleneck: its forward is :func:`ops.residual_block`.

    The block's own forward runs instead where a hook or a tracer observes the inner modules.

    Attributes:
        whole: Whether the block runs as one operation; False inside
            :func:`separate_convolutions`.
    """

    whole = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``(N, C, H, W)`` to ``(N, K, OH, OW)``, channels_last."""
        # Other arguments may have a meaning to the block's own forward.
        if self.whole and len(args) == 1 and not kwargs:
            x = args[0]
            if isinstance(x, Tensor) and not is_observed(x):
                backend = resolve_backend("residual_block", x)
                operands = self._operands(backend)
                if operands is not None:
                    module = export if export.is_exporting() else packed_ops
                    return module.run_residual_block(backend, x, operands)
        return super().forward(*args, **kwargs)

    def _operands(self, backend: str) -> BlockOperands | None:
        """The operands on a backend; None if the modules must run.

        Args:
            backend: The backend that runs the operation.
        """
        if backend not in ("cpu", "cuda", "triton"):
            return None
        if torch.compiler.is_compiling():  # a trace must not keep what it computes
            block = self._without_padding()
            return None if block is None else block_operands(block)
        concatenates = backend != "cpu"
        purpose = "concatenated operands" if concatenates else "operands"
        operands: BlockOperands | None = self.derived(
            purpose, lambda: self._make_operands(concatenates)
        )
        return operands

    def _make_operands(self, concatenates: bool) -> BlockOperands | None:
        block = self._without_padding()
        if block is None:
            return None
        convs: Any = block.convs
        has_shortcut = len(convs) > len(block.acts)
        both = concatenate(*convs[-2:]) if concatenates and has_shortcut else (None, None)
        return block_operands(block, *both)

    def _without_padding(self) -> BlockModules | None:
        """:meth:`supported_modules`; None for a zero-padded shortcut, which only segments take."""
        block = self.supported_modules()
        return None if block is None or block.padding != NO_PADDING else block

    def supported_modules(self) -> BlockModules | None:
        """The block's modules as they are now; None if the operation does not compute them."""
        m: Any = self
        block = m.block_modules()
        if block is None or any(map(is_hooked, block.members)):
            return None
        for conv, norm in zip(block.convs, block.norms, strict=True):
            if not isinstance(conv, FrozenConv) or not isinstance(norm, FoldedBatchNorm):
                return None
        own = len(block.acts)
        inner = [inner_activation(norm) for norm in block.norms]
        # One activation after each convolution, in the batch norm or in the block; the last one
        # after the addition.
        if any(inner[own - 1 :]) or any(map(_are_both, inner, block.acts)):
            return None
        if not all(is_relu(act or inner[i]) for i, act in enumerate(block.acts)):
            return None
        return block if _is_supported(block.convs, own, block.padding) else None


def _are_both(inner: nn.Module | None, act: nn.Module | None) -> bool:
    return inner is not None and act is not None


def block_operands(
    block: BlockModules,
    concatenated: Tensor | None = None,
    concatenated_shift: Tensor | None = None,
) -> BlockOperands:
    """The operands of ``residual_block`` for a block.

    Args:
        block: The result of :meth:`FrozenBlock.supported_modules`.
        concatenated: The last convolution's and the shortcut's weight in one tensor, from
            :func:`concatenate`; None to compute them separately.
        concatenated_shift: ``(K,)``, the sum of their shifts; None as well.

    Returns:
        The tuple of arguments after the input.
    """
    convs: Any = block.convs
    own = len(block.acts)
    middle = convs[own - 2]
    return (
        [c.operand for c in convs],
        [c.scale for c in convs],
        [c.shift for c in convs],
        concatenated,
        concatenated_shift,
        own == 3,
        middle.stride[0],
        middle.dilation[0],
        middle.groups,
        all(c.winograd for c in convs),
    )


def _is_supported(convs: list[Any], own: int, padding: tuple[int, int]) -> bool:
    """Whether the operation computes convolutions of this geometry and these channels.

    Args:
        convs: :class:`~fused_resnet.inference.frozen_conv.FrozenConv`, the block's own and then its
            shortcut's.
        own: Number of the block's own convolutions.
        padding: Channels of zeros on each side and stride of a shortcut without parameters.
    """
    bottleneck = own == 3
    spatial = convs[own - 2]
    stride, dilation = spatial.stride[0], spatial.dilation[0]
    plain: dict[str, Any] = {"stride": (1, 1), "dilation": (1, 1), "groups": 1}
    strided: dict[str, Any] = {"stride": (stride, stride), "dilation": (dilation, dilation)}
    if bottleneck:
        expected: list[tuple[int, dict[str, Any]]] = [(1, plain), (3, strided), (1, plain)]
    else:
        expected = [(3, {**plain, **strided}), (3, plain)]
        if dilation != 1:
            return False
    if len(convs) > own:
        expected.append((1, {**plain, "stride": (stride, stride)}))
    for conv, (size, settings) in zip(convs, expected, strict=True):
        border = conv.dilation[0] if size == 3 else 0
        if conv.kernel_size != (size, size) or conv.padding != (border, border):
            return False
        if any(getattr(conv, name) != value for name, value in settings.items()):
            return False
    # PyTorch would broadcast one channel, or one pixel; the operation does not.
    result = (convs[own - 1].out_channels, stride)
    if len(convs) > own:
        return (convs[own].out_channels, stride) == result and padding == NO_PADDING
    channels, step = padding
    return (convs[0].in_channels + 2 * channels, step) == result


@torch.no_grad()
def concatenate(last: FrozenConv, shortcut: FrozenConv) -> tuple[Tensor, Tensor]:
    """Weights of two convolutions whose results are added, each times its scale, filter by filter.

    Products with the scale are float64, rounded once to the weights' dtype.

    Args:
        last: The block's last convolution.
        shortcut: The shortcut's convolution.

    Returns:
        The concatenated weight, flat, and the sum of the shifts, ``(K,)``.
    """
    scaled = [
        (conv.packed.double().view(conv.out_channels, -1) * conv.scale.double().view(-1, 1))
        for conv in (last, shortcut)
    ]
    weight = torch.cat(scaled, 1).to(last.packed.dtype).flatten()
    return weight, last.shift + shortcut.shift


@contextlib.contextmanager
def separate_convolutions(model: nn.Module) -> Iterator[None]:
    """Run each convolution of a frozen model's blocks as its own operation, to time it.

    Args:
        model: A frozen model.
    """
    blocks = [module for module in model.modules() if isinstance(module, FrozenBlock)]
    try:
        for block in blocks:
            block.__dict__["whole"] = False
        yield
    finally:
        for block in blocks:
            del block.__dict__["whole"]


def is_block(module: nn.Module) -> bool:
    """Whether :class:`FrozenBlock` can be mixed into the module."""
    return isinstance(module, FusedForward) and module.block_modules() is not None
