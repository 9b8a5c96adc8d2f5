"""Generates the fused forward of a module, and decides which submodules to trace with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import fx, nn

from ...nn.module_kinds import is_hooked, is_norm, original_class
from .arguments import SEQUENCE, Argument, call_signatures
from .codegen import MatchedTrace, generate_source, shared_modules
from .errors import Untraceable
from .generated_forward import GeneratedForward
from .matching import find
from .output_kinds import NeedsOutputKind
from .patterns import (
    activation_path,
    addition,
    is_identity,
    is_normalisation,
    is_pool,
)
from .tracing import Trace, trace
from .whole_block import trace_block


@dataclass(frozen=True)
class Unfused:
    """A module in which nothing is fused.

    Attributes:
        norms: ``(path, reason)`` of its batch norms.
    """

    norms: list[tuple[str, str]]


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def parents_of(model: nn.Module) -> Counter[int]:
    """How many parents each module of a model has, by the module's ``id``.

    Args:
        model: The model.
    """
    return Counter(
        id(child)
        for module in model.modules()
        for child in module._modules.values()
        if child is not None  # an empty container is false
    )


def generate_forward(
    module: nn.Module, parents: Counter[int]
) -> GeneratedForward | Unfused | str | None:
    """The fused forward of a module.

    Args:
        module: Module of any class; it is not changed.
        parents: :func:`parents_of` the model that contains it.

    Returns:
        The generated forward; the reason why nothing is fused, for the module or for each of its
        batch norms; or None when the module has nothing to fuse.
    """
    if not _is_composite(module) or not any(map(is_norm, module.modules())):
        return None
    has_norms = _calls_norms(module)
    if "forward" in module.__dict__:
        return "its forward was replaced" if has_norms else None
    found: list[MatchedTrace] = []
    failure = ""
    try:
        for arguments in call_signatures(module):
            for mode in (False, True):  # eval first: it is often the simpler of the two
                try:
                    with _mode(module, mode):
                        traced = _trace_and_inline(module, arguments, parents)
                except Untraceable as error:
                    failure = failure or str(error)
                    continue
                found.append(traced)
                if not any(name == "training" for _, name in traced.trace.reads):
                    break
    except Untraceable as error:
        failure = str(error)
    useful = [t for t in found if t.matches.groups]
    if not useful:
        if not has_norms:
            return None
        norms = found[0].matches.unfused if found else []
        return Unfused(norms) if norms else failure or None
    return generate_source(module, useful, failure, shared_modules(found))


def _is_composite(module: nn.Module) -> bool:
    """Whether the module has a forward that is neither PyTorch's nor compiled."""
    cls = original_class(module)
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)) or is_norm(module):
        return False
    if cls.__module__.partition(".")[0] == "torch":
        return False
    return not any(cls.forward is base.forward for base in (*_CONTAINERS, nn.Module))


def _calls_norms(module: nn.Module) -> bool:
    """Whether a batch norm is a child of the module, or of a container among its children."""
    for child in module.children():
        is_container = any(original_class(child).forward is c.forward for c in _CONTAINERS)
        if is_norm(child) or (is_container and _calls_norms(child)):
            return True
    return False


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in before:
            m.__dict__["training"] = training
        yield
    finally:
        for m, mode in before:
            m.__dict__["training"] = mode


def _trace_and_inline(
    module: nn.Module, arguments: tuple[Argument, ...], parents: Counter[int]
) -> MatchedTrace:
    """Trace a module, inlining the submodules that may contain a part of a group."""
    whole = trace_block(module, arguments, lambda child: _may_inline(child, parents))
    if whole is not None:
        return whole
    inlined: frozenset[str] = frozenset()
    result = _trace_with_output_kinds(module, arguments, inlined, parents)
    tried: set[str] = set()
    while True:
        path = _child_to_inline(module, result, parents, tried)
        if path is None:
            lists = frozenset(a.name for a in arguments if a.kind == SEQUENCE)
            return MatchedTrace(result, find(result.graph, module, lists))
        tried.add(path)
        try:
            result = _trace_with_output_kinds(module, arguments, inlined | {path}, parents)
        except Untraceable:
            continue
        inlined |= {path}


def _may_inline(child: nn.Module, parents: Counter[int]) -> bool:
    """Whether a child may be inlined: it has no hooks, and no other module calls it."""
    return (
        _has_code(child) and not is_norm(child) and not is_hooked(child) and parents[id(child)] == 1
    )


def _trace_with_output_kinds(
    module: nn.Module,
    arguments: tuple[Argument, ...],
    inlined: frozenset[str],
    parents: Counter[int],
) -> Trace:
    """Trace a module; where it depends on the kind of a submodule's result, find that out first."""
    traced = inlined
    probe: Trace | None = None
    while probe is None:
        try:
            probe = trace(module, arguments, traced)
        except NeedsOutputKind as error:
            child = module.get_submodule(error.path)
            if not _has_code(child) or is_hooked(child) or parents[id(child)] != 1:
                raise
            traced |= {error.path}
    if traced == inlined:
        return probe
    # Only the kinds of those results are needed: their submodules stay leaves.
    result = trace(module, arguments, inlined, probe.output_kinds)
    if len(result.conditions) != len(probe.conditions):
        raise Untraceable("the class of a child's result depends on a shape")
    result.reads = {**probe.reads, **result.reads}
    result.inspected_outputs = tuple(
        dict.fromkeys((*result.inspected_outputs, *probe.inspected_outputs))
    )
    result.examined = tuple(path for path in probe.inlined if path not in inlined)
    result.inspects_types = result.inspects_types or probe.inspects_types
    result.outside = (*result.outside, *(o for o in probe.outside if o not in result.outside))
    return result


def _has_code(module: nn.Module) -> bool:
    """Whether a module has a forward that can be traced."""
    return original_class(module).forward is nn.Sequential.forward or _is_composite(module)


def _child_to_inline(
    module: nn.Module, result: Trace, parents: Counter[int], tried: set[str]
) -> str | None:
    """The next submodule to inline: one that a group's neighbouring operations may be part of.

    Args:
        module: The traced module.
        result: Trace of the module so far.
        parents: :func:`parents_of` the model.
        tried: Paths of the submodules that were inlined, or could not be.

    Returns:
        Its path; None when there is no more to inline.
    """
    calls = Counter(n.target for n in result.graph.nodes if n.op == "call_module")

    def may_inline(node: fx.Node) -> bool:
        if node.op != "call_module" or node.target in tried or calls[node.target] > 1:
            return False
        return _may_inline(module.get_submodule(str(node.target)), parents)

    def has_norm(node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        return any(map(is_norm, module.get_submodule(str(node.target)).modules()))

    for node in result.graph.nodes:
        sides = addition(node)
        if sides is not None:
            ends = [_behind(module, side) for side in sides[:2]]
            if sides[2]:
                ends = ends[:1]
            if not any(is_normalisation(module, end) for end in ends):
                order = {n: i for i, n in enumerate(result.graph.nodes)}
                for end in sorted(ends, key=order.__getitem__, reverse=True):
                    if may_inline(end) and (has_norm(end) or _may_pass_through(module, end)):
                        return str(end.target)
        elif activation_path(module, node) or is_pool(module, node):
            end = _behind(module, node.args[0])
            if may_inline(end) and has_norm(end):
                return str(end.target)
        elif is_normalisation(module, node):
            end = _behind(module, node.args[0])
            if may_inline(end) and _ends_in_convolution(module.get_submodule(str(end.target))):
                return str(end.target)
            ahead = next(iter(node.users), node)
            if may_inline(ahead) and _may_pass_through(module, ahead):
                return str(ahead.target)
    return None


def _behind(module: nn.Module, node: fx.Node) -> fx.Node:
    while is_identity(module, node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _may_pass_through(module: nn.Module, node: fx.Node) -> bool:
    """Whether the node calls a module without parameters, which may return its input."""
    if node.op != "call_module":
        return False
    child = module.get_submodule(str(node.target))
    return not any(True for _ in child.parameters()) and not any(True for _ in child.buffers())


def _ends_in_convolution(module: nn.Module) -> bool:
    last = [m for m in module.modules() if not isinstance(m, nn.Identity)][-1]
    return isinstance(last, nn.Conv2d)
