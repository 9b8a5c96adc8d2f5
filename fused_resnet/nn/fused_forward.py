"""Mixins with a fused forward: a module that inherits one runs its groups as single operations.

The modules of this package inherit from them, and :func:`fused_resnet.fuse` adds them to the
modules of other libraries. Each one also lists the groups that its forward runs, for the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .block_calls import run_residual_block, training_format
from .group_calls import conv_bn, run_sequence
from .groups import (
    Decision,
    Group,
    decide_residual_block,
    residual_block_groups,
    sequence_groups,
)
from .module_kinds import child_of, original_class, uses_batch_statistics


class FusedForward(nn.Module):
    """A module whose forward runs groups as operations.

    Attributes:
        fused_resnet_recompute: Whether a bottleneck computes convolutions again in backward; see
            :func:`fused_resnet.fuse`.
        fused_resnet_winograd: Whether Winograd's algorithm may run in training; see
            :func:`fused_resnet.fuse`.
    """

    fused_resnet_recompute: bool = False
    fused_resnet_winograd: bool = True

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script calls this first; it would otherwise fail later, on an unsupported type.
        raise RuntimeError(
            f"torch.jit.script: {type(self).__name__} has a forward that only Python runs; use "
            "torch.export or torch.jit.trace, or script the model that fuse() or freeze() was given"
        )

    def fused_groups(self) -> list[Group]:
        """The groups among the module's own children, as the next call runs them."""
        raise NotImplementedError

    def inlined_modules(self) -> list[nn.Module]:
        """Submodules whose forward is inlined into this one; their groups are listed here."""
        return []

    def block_modules(self) -> BlockModules | None:
        """The residual block that a call with one tensor computes; None if it is not a block.

        The caller has to check that an operation supports the block's convolutions.
        """
        return None

    def training_decision(self) -> Decision | None:
        """How the residual block that this module is runs in training; None for no block."""
        block = self.block_modules()
        return None if block is None else block.training_decision(self)


#: :attr:`BlockModules.padding` of a shortcut that is the identity or a convolution.
NO_PADDING = (0, 1)


class BlockModules(NamedTuple):
    """The modules of a residual block: a sequence of convolutions and a shortcut.

    Attributes:
        convs: The two or three convolutions of the main branch in order, followed by the
            shortcut's convolution if it has one.
        norms: The batch norm after each convolution, in the order of ``convs``.
        acts: The activation after each batch norm of the main branch, for the last one after the
            addition; None where the batch norm contains it.
        members: All modules that this description depends on.
        padding: Channels of zeros on each side, and the stride, of a shortcut without parameters.
        shortcut: Kind of the shortcut of a block without a projection: ``"identity"``, ``"zeros"``,
            or ``"none"``.
    """

    convs: Sequence[nn.Module]
    norms: Sequence[nn.Module]
    acts: Sequence[nn.Module | None]
    members: Sequence[nn.Module]
    padding: tuple[int, int] = NO_PADDING
    shortcut: str = "identity"

    def run_in_training(self, owner: nn.Module, x: Tensor) -> Tensor | None:
        """The block's result, if it runs as one training unit.

        Args:
            owner: The block.
            x: Input of the block.
        """
        return run_residual_block(
            owner, x, self.convs, self.norms, self.acts, self.members, self.shortcut, self.padding
        )

    def training_decision(self, owner: nn.Module) -> Decision | None:
        """How the block runs in training; None in inference.

        Args:
            owner: The block. In training its batch norms may be frozen.
        """
        if not (owner.training or any(map(uses_batch_statistics, self.norms))):
            return None
        return decide_residual_block(self.convs, self.norms, self.acts, self.members)


#: Children of a block as torchvision names them, of the longest that there is.
CONVOLUTIONS = ("conv1", "conv2", "conv3")
NORMS = ("bn1", "bn2", "bn3")


def block_modules_of(
    block: Any,
    count: int,
    shortcut: nn.Module | None,
) -> BlockModules | None:
    """The modules of a block whose children are named as in torchvision.

    Args:
        block: Has ``conv1``, ``bn1`` to ``conv<count>``, ``bn<count>`` and one ``relu``.
        count: Number of convolutions of the main branch.
        shortcut: An ``nn.Sequential`` of a convolution and a batch norm, or an empty one; None for
            the identity.

    Returns:
        The description, or None for any other shortcut.
    """
    relu = child_of(block, "relu")
    convs = [child_of(block, name) for name in CONVOLUTIONS[:count]]
    norms = [child_of(block, name) for name in NORMS[:count]]
    members: list[nn.Module] = [relu, *convs]
    if shortcut is not None:
        forward = original_class(shortcut).forward
        is_sequence = forward in (nn.Sequential.forward, SequentialForward.forward)
        if not is_sequence or len(shortcut._modules) not in (0, 2):
            return None
        pair: list[Any] = list(shortcut._modules.values())
        convs += pair[:1]
        norms += pair[1:]
        members += [shortcut, *pair]
    return BlockModules(convs, norms, [relu] * count, members)


class ResidualForward(FusedForward):
    """The forward of a residual block whose children are named as in torchvision.

    Attributes:
        convolutions: Number of convolutions of its main branch.
    """

    convolutions: int

    def forward(self, x: Tensor) -> Tensor:
        """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut)``, with as many layers as it has.

        Args:
            x: Input, ``(N, C, H, W)``.
        """
        block = self.block_modules()
        whole = None if block is None else block.run_in_training(self, x)
        if whole is not None:
            return whole
        y, last, relu = x, self.convolutions - 1, child_of(self, "relu")
        for i in range(last):
            y = conv_bn(child_of(self, CONVOLUTIONS[i]), child_of(self, NORMS[i]), relu, y)
        conv, bn = child_of(self, CONVOLUTIONS[last]), child_of(self, NORMS[last])
        return conv_bn(conv, bn, relu, y, self.shortcut_of(x))

    def shortcut_of(self, x: Tensor) -> Tensor | None:
        """What is added to the main branch; None for nothing.

        Args:
            x: Input of the block, ``(N, C, H, W)``.
        """
        downsample = child_of(self, "downsample")
        return x if downsample is None else downsample(x)

    def fused_groups(self) -> list[Group]:
        """The groups of all convolutions."""
        return residual_block_groups(self, self.convolutions)

    def block_modules(self) -> BlockModules | None:
        """The block's convolutions and its shortcut."""
        return block_modules_of(self, self.convolutions, child_of(self, "downsample"))


class BasicBlockForward(ResidualForward):
    """The forward of a basic block.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", 2015, figure 5 left;
        ``torchvision.models.resnet.BasicBlock.forward``.
    """

    convolutions = 2


class BottleneckForward(ResidualForward):
    """The forward of a bottleneck.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", 2015, figure 5 right;
        ``torchvision.models.resnet.Bottleneck.forward``.
    """

    convolutions = 3


class ResNetForward(FusedForward):
    """The forward of a ResNet whose children are named as in torchvision; the stem is one group."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        m: Any = self
        converted = training_format(x)
        y = run_sequence((m.conv1, m.bn1, m.relu, m.maxpool), converted)
        y = m.layer4(m.layer3(m.layer2(m.layer1(y))))
        if converted is not x:
            y = y.contiguous()  # small here: what follows sees the format of the input
        return m.fc(torch.flatten(m.avgpool(y), 1))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to logits ``(N, num_classes)``.

        Args:
            x: Images, ``(N, 3, H, W)``.
        """
        return self._forward_impl(x)

    def fused_groups(self) -> list[Group]:
        """The groups of the stem."""
        return sequence_groups({n: getattr(self, n) for n in ("conv1", "bn1", "relu", "maxpool")})


class SequentialForward(FusedForward):
    """The forward of an ``nn.Sequential`` with groups among its modules."""

    def forward(self, input: Tensor) -> Tensor:
        """Call the modules in order; the argument is named as in ``nn.Sequential.forward``.

        Args:
            input: Input of the first module.
        """
        return run_sequence(self._modules.values(), input)  # type: ignore[arg-type]

    def fused_groups(self) -> list[Group]:
        """The groups among its modules."""
        return sequence_groups(self._modules)  # type: ignore[arg-type]
