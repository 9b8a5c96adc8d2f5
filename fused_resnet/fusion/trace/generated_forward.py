"""The fused forward that is generated for a traced module, and the mixin that runs it.

:func:`fused_resnet.fuse` generates the source once. It refers to children by their paths and holds
no tensor and no module, so it can be copied and pickled with its module.
"""

from __future__ import annotations

import linecache
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from ...nn.block_calls import run_residual_block
from ...nn.fused_forward import NO_PADDING, BlockModules, FusedForward
from ...nn.group_calls import conv_bn, norm_add_act, run_sequence
from ...nn.groups import Group, called_activation_group, decide_conv_bn, decide_norm
from ...nn.module_kinds import FUNCTIONS, inner_activation, is_hooked, original_class
from .matching import NOTHING_AROUND
from .outside import Outside, equals
from .patterns import FUNCTION_PATHS


@dataclass(frozen=True)
class GroupPaths:
    """A group, as paths of its owner's submodules.

    Attributes:
        conv: Path of the convolution; empty for none.
        bn: Path of the batch norm; an activation inside it belongs to the group.
        act: Path of the activation; empty for none, one of
            :data:`.patterns.FUNCTION_PATHS` for a function.
        pool: Path of the max-pool; empty for none.
        adds: Whether a residual is added.
        foldable: Whether the convolution and the batch norm are called by this group only.
    """

    conv: str
    bn: str
    act: str
    pool: str
    adds: bool
    foldable: bool


@dataclass(frozen=True)
class BlockPaths:
    """A forward that computes one residual block, as paths of its owner's submodules.

    Attributes:
        groups: The groups of the main branch, in order; the last one's activation comes after the
            addition.
        shortcut: The convolution and batch norm of the shortcut; None for one without parameters.
        identities: Paths of the ``nn.Identity`` modules that the block calls.
        padding: Channels of zeros on each side, and the stride, of a shortcut that subsamples and
            pads with zeros; those of the identity otherwise.
    """

    groups: tuple[GroupPaths, ...]
    shortcut: GroupPaths | None
    identities: tuple[str, ...]
    padding: tuple[int, int] = NO_PADDING


@dataclass(frozen=True)
class Specialization:
    """The forward for one set of assumptions about the module and its arguments.

    Attributes:
        groups: The groups, in the order in which they run.
        unfused: ``(path, reason)`` of the batch norms in no group.
        inlined: Paths of the submodules whose forward is part of this one.
        block: The residual block that the forward computes; None if it is not a block.
    """

    groups: tuple[GroupPaths, ...]
    unfused: tuple[tuple[str, str], ...]
    inlined: tuple[str, ...]
    block: BlockPaths | None = None


@dataclass(frozen=True)
class GeneratedForward:
    """A generated forward: Python source with a guard for each specialization.

    Attributes:
        source: Defines ``forward``, and for each specialization ``check_<i>``, the guard for all
            that it assumes of the module, and ``check_attributes_<i>``, the part of that guard
            that compares attributes.
        constants: Values that the source refers to by name.
        specializations: Tried in order; the original forward runs where no guard passes.
        failure: Why a call of the module has no specialization; empty when every call has one.
        outside: The variables and the defaults of the traced functions.
        functions: The namespace of the executed source.
    """

    source: str
    constants: dict[str, Any]
    specializations: tuple[Specialization, ...]
    failure: str = ""
    outside: tuple[Outside, ...] = ()
    functions: dict[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        name = f"<fused_resnet forward {id(self.constants):x}>"
        namespace: dict[str, Any] = {**_HELPERS, **self.constants}
        exec(compile(self.source, name, "exec"), namespace)
        # Tracebacks then show the generated line.
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        weakref.finalize(self, linecache.cache.pop, name, None)
        object.__setattr__(self, "functions", namespace)

    def __deepcopy__(self, memo: Any) -> GeneratedForward:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            GeneratedForward,
            (self.source, self.constants, self.specializations, self.failure, self.outside),
        )

    def active(self, module: nn.Module) -> Specialization | None:
        """The specialization that runs now for a call with tensors and default arguments.

        Args:
            module: The module that this forward was generated for.

        Returns:
            The first whose guard passes; None when the original forward runs.
        """
        index = self.active_index(module)
        return None if index is None else self.specializations[index]

    def is_current(self) -> bool:
        """Whether the traced functions have the variables and the defaults that they had.

        No compiler can compare variables of a function around another: it takes the original
        forward, and looks at them itself.
        """
        if torch.compiler.is_compiling() and any([found.has_variables for found in self.outside]):
            return False
        return all([found.is_unchanged() for found in self.outside])

    def active_index(self, module: nn.Module) -> int | None:
        """The index of :meth:`active` among the specializations.

        Args:
            module: The module that this forward was generated for.
        """
        if has_replaced_forward(module) or not self.is_current():
            return None
        for index in range(len(self.specializations)):
            if self.functions[f"check_{index}"](module):
                return index
        return None


def has_replaced_forward(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own instead of its class's.

    Args:
        module: Any module.
    """
    return "forward" in module.__dict__


class TracedForward(FusedForward):
    """A module with a generated forward; its original forward runs where no guard passes.

    Attributes:
        fused_resnet_generated: The generated forward.
    """

    fused_resnet_keeps_signature = True
    fused_resnet_generated: GeneratedForward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the original class, with its groups as single operations.

        Args:
            args: Positional arguments of the original forward.
            kwargs: Keyword arguments of the original forward.
        """
        generated = self.fused_resnet_generated
        # Not bool(): PyTorch 2.11 can't compile that of a tuple.
        stale = len(generated.outside) > 0 and not generated.is_current()
        if stale or any(isinstance(value, Proxy) for value in args):
            return _original_forward(self)(self, *args, **kwargs)
        return generated.functions["forward"](self, *args, **kwargs)

    def fused_groups(self) -> list[Group]:
        """The groups of the active specialization, and the reasons of its unfused batch norms."""
        generated = self.fused_resnet_generated
        active = generated.active(self)
        if active is None:
            reason = generated.failure or "a hook or a change since fuse()"
            norms = dict.fromkeys(g.bn for s in generated.specializations for g in s.groups)
            return [Group("", reason, bn=path) for path in norms]
        groups = [g for paths in active.groups for g in _groups_of(self, paths)]
        return groups + [Group("", reason, bn=path) for path, reason in active.unfused]

    def inlined_modules(self) -> list[nn.Module]:
        """Submodules whose forward is inlined into this one; their groups are listed here."""
        active = self.fused_resnet_generated.active(self)
        return [self.get_submodule(path) for path in active.inlined] if active else []

    def block_modules(self) -> BlockModules | None:
        """The residual block that a call with one tensor computes; None if it is not a block."""
        generated = self.fused_resnet_generated
        index = generated.active_index(self)
        paths = None if index is None else generated.specializations[index].block
        if paths is None:
            return None
        get = self.get_submodule
        for path in paths.identities:
            if original_class(get(path)) is not nn.Identity:
                return None
        shortcut = [] if paths.shortcut is None else [paths.shortcut]
        groups = [*paths.groups, *shortcut]
        return BlockModules(
            [get(group.conv) for group in groups],
            [get(group.bn) for group in groups],
            [_activation(self, group) for group in paths.groups],
            [member for member in self.modules() if member is not self],
            paths.padding,
            _kind_without_parameters(paths.padding),
        )


def _kind_without_parameters(padding: tuple[int, int]) -> str:
    """The kind of a shortcut that has no convolution."""
    return "identity" if padding == NO_PADDING else "zeros"


def _activation(owner: nn.Module, paths: GroupPaths) -> nn.Module | None:
    """The activation after the group's batch norm; None where there is none, or it is inside."""
    if paths.act in FUNCTION_PATHS:
        return FUNCTIONS[FUNCTION_PATHS[paths.act]]
    inside = paths.act == f"{paths.bn}.act"
    return None if inside or not paths.act else owner.get_submodule(paths.act)


def _groups_of(owner: nn.Module, paths: GroupPaths) -> Iterator[Group]:
    bn = owner.get_submodule(paths.bn)
    act = _activation(owner, paths)
    foldable = paths.foldable
    if paths.conv:
        conv = owner.get_submodule(paths.conv)
        decision = decide_conv_bn(conv, bn, act, paths.adds)
    else:
        decision = decide_norm(bn, act, paths.adds)
    activation, names = decision.activation, (paths.conv, paths.bn)
    if not decision.operation:
        yield Group("", decision.reason, *names)
        return
    if decision.operation == "bn_add_relu":
        if paths.adds or activation:
            yield Group("bn_add_relu", bn=paths.bn, activation=activation)
        else:
            yield Group("", decision.reason or NOTHING_AROUND, bn=paths.bn)
        if decision.reason:
            yield Group("", decision.reason, paths.conv)
    elif paths.pool and activation:
        yield Group("conv_bn_relu_maxpool", "", *names, paths.pool, activation, foldable)
    else:
        yield Group("conv_bn_add_relu", "", *names, "", activation, foldable)
    called = called_activation_group(act or inner_activation(bn), paths.act)
    if called is not None:
        yield called


# Helpers that the generated source calls


def _observed(*arguments: Any) -> bool:
    """Whether a global hook is set or ``torch.fx`` traces: then the original forward runs."""
    return _has_any_global_hook() or any(isinstance(a, Proxy) for a in arguments)


def _children(modules: Mapping[str, nn.Module | None], name: str) -> Mapping[str, Any]:
    """The children of the child ``name``; none if that child no longer exists."""
    child = modules.get(name)
    return {} if child is None else child._modules


def _has_class(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    """Whether a child still has its class."""
    return module is not None and original_class(module) is cls


def _is_original(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    """Whether a child still has its class and no hooks."""
    return module is not None and original_class(module) is cls and not is_hooked(module)


def _original_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the class that the module had before it was fused."""
    base: type[nn.Module] = type(module).fused_resnet_base  # type: ignore[attr-defined]
    return base.forward


def _run_block(
    owner: nn.Module,
    x: Tensor,
    groups: tuple[tuple[Any, Any, nn.Module | None], ...],
    shortcut: tuple[Any, ...],
    identities: tuple[nn.Module, ...],
    padding: tuple[int, int],
) -> Tensor | None:
    """Run a residual block as one training operation.

    Args:
        owner: The block.
        x: Input of the block.
        groups: Convolution, batch norm and activation of each of its own groups, in order.
        shortcut: Convolution and batch norm of its shortcut; empty for one without parameters.
        identities: Placeholder modules among its children that it calls.
        padding: Channels of zeros on each side, and the stride, of a shortcut without parameters.

    Returns:
        The block's result; None where its groups must run one by one.
    """
    if any(original_class(module) is not nn.Identity for module in identities):
        return None
    convs, norms, acts = zip(*groups, strict=True)
    others = (*identities, *(act for act in acts if act is not None))
    kind = _kind_without_parameters(padding)
    return run_residual_block(
        owner, x, (*convs, *shortcut[:1]), (*norms, *shortcut[1:]), acts, others, kind, padding
    )


_HELPERS: dict[str, Any] = {
    "_run_block": _run_block,
    "_conv_bn": conv_bn,
    "_norm_add_act": norm_add_act,
    "_run_sequence": run_sequence,
    **{f"_{activation.name}": module for activation, module in FUNCTIONS.items()},
    "_observed": _observed,
    "_children": _children,
    "_has_class": _has_class,
    "_is_original": _is_original,
    "_equals": equals,
    "_original_forward": _original_forward,
}
