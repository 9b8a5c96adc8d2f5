"""A module's fused forward as source text, and the route that runs it.

The text is made once, by :func:`fused_resnet.fuse`, and is all there is: it names children by their
paths and holds no tensor and no module, so it is copied and pickled with the module it belongs to.
"""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from ...nn.block_calls import run_residual_block
from ...nn.fused_forward import BlockModules, FusedForward
from ...nn.group_calls import conv_bn, norm_add_act, run_sequence
from ...nn.groups import Group, decide_conv_bn, decide_norm, hooked_relu_group
from ...nn.module_kinds import (
    FoldedBatchNorm,
    PackedConv,
    is_hooked,
    original_class,
)
from .matching import FUNCTION, NOTHING_AROUND

#: Stands for a ReLU that the module calls as a function. It keeps no state.
RELU = nn.ReLU()


@dataclass(frozen=True)
class PlannedGroup:
    """A group by paths into its owner's children.

    Attributes:
        conv: Empty for none, like ``act`` and ``pool``.
        bn: The normalisation; an activation inside it belongs to the group.
        act: A path, or :data:`~fused_resnet.swap.matching.FUNCTION`.
        pool: The max-pool.
        adds: Whether a residual is added.
        foldable: Whether its convolution and batch norm are called for no other group.
    """

    conv: str
    bn: str
    act: str
    pool: str
    adds: bool
    foldable: bool


@dataclass(frozen=True)
class BlockPaths:
    """A forward that is one residual block, by paths into its owner's children.

    Attributes:
        groups: The block's own convolutions, in order; the last one's activation is behind the
            addition.
        shortcut: The convolution and batch norm on the other side of the addition; None where that
            is the input.
        identities: Placeholder modules that are called on the way.
    """

    groups: tuple[PlannedGroup, ...]
    shortcut: PlannedGroup | None
    identities: tuple[str, ...]


@dataclass(frozen=True)
class Way:
    """One way that a forward may run: what it finds there.

    Attributes:
        groups: In the order in which they run.
        left: Batch norms in no group, with the reason.
        entered: Children whose forward is part of this one.
        block: What it is called with one tensor; None where that is no residual block.
        early: What the stages before the last two call, in order; empty where there are none.
    """

    groups: tuple[PlannedGroup, ...]
    left: tuple[tuple[str, str], ...]
    entered: tuple[str, ...]
    block: BlockPaths | None = None
    early: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A forward, and how it may run.

    Attributes:
        source: Python; for each way a function ``holds_<i>``, which asks for all that it assumes,
            and ``reads_<i>``, for the attributes alone; and ``forward``.
        constants: What the source calls by other names than its own.
        ways: See there.
        failure: Why there is no other way; empty when all calls were traced.
    """

    source: str
    constants: dict[str, Any]
    ways: tuple[Way, ...]
    failure: str = ""
    functions: dict[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        name = f"<fused_resnet plan {id(self.constants):x}>"
        namespace: dict[str, Any] = {**_HELPERS, **self.constants}
        exec(compile(self.source, name, "exec"), namespace)
        # So that a traceback shows the line.
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        object.__setattr__(self, "functions", namespace)

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (Plan, (self.source, self.constants, self.ways, self.failure))

    def current(self, module: nn.Module) -> Way | None:
        """The way that the module's plainest call goes now; None when it runs as it was."""
        index = self.current_index(module)
        return None if index is None else self.ways[index]

    def current_index(self, module: nn.Module) -> int | None:
        """Which of the ways :meth:`current` is."""
        if hooked_forward(module):
            return None
        for index in range(len(self.ways)):
            if self.functions[f"holds_{index}"](module):
                return index
        return None


def hooked_forward(module: nn.Module) -> bool:
    """Whether somebody replaced the forward of the instance."""
    return "forward" in module.__dict__


class TracedForward(FusedForward):
    """A module whose forward was traced, and runs as its plan says while that holds."""

    fused_resnet_plan: Plan

    @classmethod
    def fused_resnet_members(cls, base: type[nn.Module]) -> dict[str, Any]:
        """A forward with the signature of the base's, which exporters read."""
        parameters = list(inspect.signature(base.forward).parameters.values())
        names, passed, defaults = [], [], {}
        starred = False
        for parameter in parameters:
            text = parameter.name
            only = parameter.kind is parameter.KEYWORD_ONLY
            if only and not starred:
                names.append("*")
                starred = True
            passed.append(f"{text}={text}" if only else text)
            if parameter.default is not parameter.empty:
                defaults[f"_{text}"] = parameter.default
                text = f"{text}=_{text}"
            names.append(text)
        me = parameters[0].name
        line = f"return {me}.fused_resnet_plan.functions['forward']({', '.join(passed)})"
        source = f"def forward({', '.join(names)}):\n    {line}\n"
        exec(compile(source, "<fused_resnet forward>", "exec"), defaults)
        forward = defaults["forward"]
        forward.__doc__ = base.forward.__doc__
        return {"forward": forward}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own, with its groups as operations."""
        return self.fused_resnet_plan.functions["forward"](self, *args, **kwargs)

    def fused_groups(self) -> list[Group]:
        """See :meth:`fused_resnet.nn.fused_forward.FusedForward.fused_groups`."""
        plan = self.fused_resnet_plan
        way = plan.current(self)
        if way is None:
            why = plan.failure or "a hook or a change since fuse()"
            paths = dict.fromkeys(g.bn for w in plan.ways for g in w.groups)
            return [Group("", why, bn=path) for path in paths]
        groups = [g for planned in way.groups for g in _groups_of(self, planned)]
        return groups + [Group("", why, bn=path) for path, why in way.left]

    def covered(self) -> list[nn.Module]:
        """See :meth:`fused_resnet.nn.fused_forward.FusedForward.covered`."""
        way = self.fused_resnet_plan.current(self)
        return [self.get_submodule(path) for path in way.entered] if way else []

    def run_early(self, stages: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> Tensor:
        """The part of the forward before its last two stages, on its input."""
        return stages(self, x)

    def early_members(self) -> list[nn.Module]:
        """What that part calls."""
        way = self.fused_resnet_plan.current(self)
        return [self.get_submodule(path) for path in way.early] if way else []

    def block_modules(self) -> BlockModules | None:
        """See :meth:`fused_resnet.nn.fused_forward.FusedForward.block_modules`."""
        index = self.fused_resnet_plan.current_index(self)
        paths = None if index is None else self.fused_resnet_plan.ways[index].block
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
            self.fused_resnet_plan.functions[f"reads_{index}"],
        )


def _activation(owner: nn.Module, planned: PlannedGroup) -> nn.Module | None:
    """What is called behind the group's batch norm; None where that is inside of it."""
    if planned.act == FUNCTION:
        return RELU
    inside = planned.act == f"{planned.bn}.act"
    return None if inside or not planned.act else owner.get_submodule(planned.act)


def _groups_of(owner: nn.Module, planned: PlannedGroup) -> Iterator[Group]:
    bn = owner.get_submodule(planned.bn)
    act = _activation(owner, planned)
    foldable = planned.foldable
    if planned.conv:
        conv = owner.get_submodule(planned.conv)
        if isinstance(conv, PackedConv):
            yield Group(conv.operation, conv=planned.conv, length=conv.span)
            return
        decision = decide_conv_bn(conv, bn, act, planned.adds)
    else:
        decision = decide_norm(bn, act, planned.adds)
    relu, names = decision.relu, (planned.conv, planned.bn)
    if not decision.operation:
        yield Group("", decision.reason, *names)
        return
    if decision.operation == "bn_add_relu":
        if planned.adds or relu:
            yield Group("bn_add_relu", bn=planned.bn, relu=relu)
        else:
            yield Group("", decision.reason or NOTHING_AROUND, bn=planned.bn)
        if decision.reason:
            yield Group("", decision.reason, planned.conv)
    elif planned.pool and relu:
        yield Group("conv_bn_relu_maxpool", "", *names, planned.pool, True, 4, foldable)
    else:
        yield Group("conv_bn_add_relu", "", *names, "", relu, 3 if relu else 2, foldable)
    hooked = hooked_relu_group(act, planned.act)
    if hooked is not None:
        yield hooked


# What the source calls


def _watched(*arguments: Any) -> bool:
    """Whether someone watches every call, or only traces: then the base's own forward runs."""
    return _has_any_global_hook() or any(isinstance(a, Proxy) for a in arguments)


def _children(modules: Mapping[str, nn.Module | None], name: str) -> Mapping[str, Any]:
    """The children of a child; none where there is no such child any more."""
    child = modules.get(name)
    return {} if child is None else child._modules


def _is(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    """Whether a child is still of the class that it was, frozen or not."""
    if module is None:
        return False
    return original_class(module) is cls or isinstance(module, (PackedConv, FoldedBatchNorm))


def _unwatched(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    """Whether a child is still of its class, frozen or not, and nobody sees its result first."""
    return module is not None and _is(module, cls) and not is_hooked(module)


def _plain(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    """Whether a child is still of its class, and nobody looks at it."""
    return module is not None and original_class(module) is cls and not is_hooked(module)


def _unfused(module: nn.Module) -> Callable[..., Any]:
    """The base's own forward."""
    base: type[nn.Module] = type(module).fused_resnet_base  # type: ignore[attr-defined]
    return base.forward


def _run_block(
    owner: nn.Module,
    x: Tensor,
    groups: tuple[tuple[Any, Any, nn.Module | None], ...],
    shortcut: tuple[Any, ...],
    identities: tuple[nn.Module, ...],
) -> Tensor | None:
    """The result of a residual block that runs as one training unit; None where it does not.

    Args:
        owner: The block.
        x: Its input.
        groups: Convolution, batch norm and activation of its own groups, in order.
        shortcut: Convolution and batch norm of its shortcut; empty for the identity.
        identities: Placeholder modules that it calls on the way.
    """
    if any(original_class(module) is not nn.Identity for module in identities):
        return None
    convs, norms, acts = zip(*groups, strict=True)
    others = (*identities, *(act for act in acts if act is not None))
    return run_residual_block(
        owner, x, (*convs, *shortcut[:1]), (*norms, *shortcut[1:]), acts, others
    )


_HELPERS: dict[str, Any] = {
    "_run_block": _run_block,
    "_conv_bn": conv_bn,
    "_norm_add_act": norm_add_act,
    "_run_sequence": run_sequence,
    "_RELU": RELU,
    "_watched": _watched,
    "_children": _children,
    "_is": _is,
    "_plain": _plain,
    "_unwatched": _unwatched,
    "_unfused": _unfused,
}
