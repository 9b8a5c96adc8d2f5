"""Recognises a module whose whole forward is one residual block.

A block may call its convolutions itself or through submodules of any depth. All of them are
inlined, so that one graph has every operation of the block. It is a residual block if the groups in
the graph are a sequence of convolutions and a shortcut, and the graph has no other operation but
the subsampling and the zeros of a shortcut without parameters. The assumptions of the trace are
guarded at every call, as for any trace.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from torch import fx, nn

from ...nn.fused_forward import NO_PADDING
from ...nn.module_kinds import is_norm
from .arguments import TENSOR, Argument
from .codegen import BlockMatch, MatchedTrace
from .errors import Untraceable
from .matching import Match, Matches, find
from .patterns import is_identity, subsampling, zeros_of
from .tracing import Trace, trace

#: Number of convolutions in a block, including the shortcut's.
_CONVOLUTIONS = range(2, 5)


def trace_block(
    module: nn.Module, arguments: tuple[Argument, ...], may_inline: Callable[[nn.Module], bool]
) -> MatchedTrace | None:
    """Trace a module with all of its submodules inlined, if it is a residual block.

    Args:
        module: Module of any class.
        arguments: The assumed kind of each parameter of the forward.
        may_inline: Whether a submodule may be inlined.

    Returns:
        The trace, its groups and the block; None for a module that is not a block.
    """
    if not _has_the_size_of_a_block(module) or not _takes_one_tensor(arguments):
        return None
    inlined: frozenset[str] = frozenset()
    try:
        while True:
            result = trace(module, arguments, inlined)
            called = [str(n.target) for n in result.graph.nodes if n.op == "call_module"]
            more = {
                path
                for path in called
                if called.count(path) == 1 and may_inline(module.get_submodule(path))
            }
            if not more - inlined:
                break
            inlined |= more
    except Untraceable:
        return None
    matches = find(result.graph, module)
    block = _block_of(module, result, matches)
    return None if block is None else MatchedTrace(result, matches, block)


def _has_the_size_of_a_block(module: nn.Module) -> bool:
    members = list(module.modules())
    convolutions = sum(isinstance(member, nn.Conv2d) for member in members)
    return convolutions in _CONVOLUTIONS and sum(map(is_norm, members)) == convolutions


def _takes_one_tensor(arguments: tuple[Argument, ...]) -> bool:
    """Whether the call passes a tensor as its first argument and nothing else."""
    return (
        bool(arguments)
        and arguments[0].kind == TENSOR
        and not arguments[0].keyword_only
        and all(
            a.kind != TENSOR and a.default is not inspect.Parameter.empty for a in arguments[1:]
        )
    )


def _block_of(module: nn.Module, result: Trace, matches: Matches) -> BlockMatch | None:
    nodes = list(result.graph.nodes)
    image, output = nodes[0], nodes[-1]
    if result.conditions or matches.unfused or not isinstance(output.args[0], fx.Node):
        return None
    ends = {match.members[-1]: match for match in matches.groups}
    known = {image, output, *(node for match in matches.groups for node in match.members)}
    identities: list[str] = []

    def skip_identities(node: fx.Node) -> fx.Node:
        """The node whose result identities return."""
        while is_identity(module, node):
            identities.append(str(node.target))
            known.add(node)
            node = node.args[0]  # type: ignore[assignment]
        return node

    last = ends.get(skip_identities(output.args[0]))
    if last is None or last.residual is None or not _is_convolution(last, activated=True):
        return None
    if skip_identities(last.source) is image:
        # The shortcut's batch norm comes last, so the matcher gave it the addition.
        other = ends.get(skip_identities(last.residual))
        if (
            other is None
            or other.residual is not None
            or not _is_convolution(other, activated=False)
        ):
            return None
        groups, shortcut = [replace(other, act=last.act)], replace(last, act="")
    else:
        groups, shortcut = [last], None
    while (source := skip_identities(groups[0].source)) is not image:
        match = ends.get(source)
        if (
            match is None
            or match.residual is not None
            or not _is_convolution(match, activated=True)
        ):
            return None
        groups.insert(0, match)
    side = image if shortcut is not None else skip_identities(last.residual)
    padding = NO_PADDING
    padded = _zero_padding(side)
    if padded is not None and skip_identities(padded.source) is image:
        known.update(padded.members)
        padding, side = padded.padding, image
    if side is not image:
        shortcut = ends.get(side)
        if shortcut is None or shortcut.residual is not None:
            return None
        if (
            not _is_convolution(shortcut, activated=False)
            or skip_identities(shortcut.source) is not image
        ):
            return None
    found = len(groups) + (shortcut is not None)
    unused = {node for node in nodes if node.op == "placeholder" and not node.users}
    if len(groups) not in (2, 3) or found != len(matches.groups) or set(nodes) - known - unused:
        return None
    return BlockMatch(groups, shortcut, identities, padding)


class _ZeroPadding(NamedTuple):
    """``pad(x[:, :, ::s, ::s])`` with channels of zeros on both sides, or only one of the two.

    Attributes:
        source: The node of ``x``.
        members: The nodes that subsample and pad.
        padding: Channels of zeros on each side, and the stride.
    """

    source: fx.Node
    members: tuple[fx.Node, ...]
    padding: tuple[int, int]


def _zero_padding(node: fx.Node) -> _ZeroPadding | None:
    """The shortcut without parameters that ends in a node, as CIFAR's option A; None for none."""
    members: list[fx.Node] = []
    zeros, strides = zeros_of(node), (1, 1)
    if zeros is not None:
        members.append(node)
        node = node.args[0]  # type: ignore[assignment]
    found = subsampling(node)
    if found is not None:
        members.append(node)
        node, strides = node.args[0], found  # type: ignore[assignment]
    plain = strides[0] == strides[1] > 0 and (zeros or 0) >= 0 and isinstance(node, fx.Node)
    if not members or not plain:
        return None
    return _ZeroPadding(node, tuple(members), (zeros or 0, strides[0]))


def _is_convolution(match: Match, *, activated: bool) -> bool:
    return match.conv is not None and match.pool is None and bool(match.act) is activated
