"""Which modules are traced, which of their children are traced with them, and what comes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import fx, nn

from ...nn.module_kinds import is_hooked, is_norm, original_class
from .emitting import Traced, called_elsewhere, emit
from .errors import Untraceable
from .matching import find
from .patterns import (
    addition,
    is_identity,
    is_normalisation,
    is_pool,
    is_relu_function,
    is_relu_module,
)
from .plan import Plan
from .results import AsksForResult
from .tracing import SEQUENCE, Argument, Trace, trace, ways_to_call
from .whole_block import trace_block


@dataclass(frozen=True)
class Left:
    """A module in which nothing is fused: its batch norms, by path, and why."""

    norms: list[tuple[str, str]]


_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def parents_of(model: nn.Module) -> Counter[int]:
    """In how many places each module of a model is, by identity."""
    return Counter(
        id(child) for module in model.modules() for child in module._modules.values() if child
    )


def plan_of(module: nn.Module, parents: Counter[int]) -> Plan | Left | str | None:
    """The fused forward of a module.

    Args:
        module: Any; it is as it was afterwards.
        parents: :func:`parents_of` the model that it is in.

    Returns:
        A plan, the reason why it is left, for the module or for each of its batch norms, or None
        when it has nothing that could be fused.
    """
    if not _is_composite(module) or not any(map(is_norm, module.modules())):
        return None
    mine = _calls_norms(module)
    if "forward" in module.__dict__:
        return "its forward was replaced" if mine else None
    found: list[Traced] = []
    failure = ""
    try:
        for arguments in ways_to_call(module):
            for mode in (False, True):  # a forward that asks for it does less in eval
                try:
                    with _mode(module, mode):
                        traced = _trace_with_children(module, arguments, parents)
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
        if not mine:
            return None
        return Left(found[0].matches.left) if found and found[0].matches.left else failure or None
    return emit(module, useful, failure, called_elsewhere(found))


def _is_composite(module: nn.Module) -> bool:
    """Whether the module has a forward of somebody's own."""
    cls = original_class(module)
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)) or is_norm(module):
        return False
    if cls.__module__.partition(".")[0] == "torch":
        return False
    return not any(cls.forward is base.forward for base in (*_LISTS, nn.Module))


def _calls_norms(module: nn.Module) -> bool:
    """Whether a batch norm is a child of the module, or of a plain list among its children."""
    for child in module.children():
        plain = any(original_class(child).forward is base.forward for base in _LISTS)
        if is_norm(child) or (plain and _calls_norms(child)):
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


def _trace_with_children(
    module: nn.Module, arguments: tuple[Argument, ...], parents: Counter[int]
) -> Traced:
    """Trace a module, and with it the children whose results a group could reach into."""
    whole = trace_block(module, arguments, lambda child: _may_enter(child, parents))
    if whole is not None:
        return whole
    entered: frozenset[str] = frozenset()
    result = _trace_knowing(module, arguments, entered, parents)
    tried: set[str] = set()
    while True:
        path = _worth_entering(module, result, parents, tried)
        if path is None:
            lists = frozenset(a.name for a in arguments if a.given == SEQUENCE)
            return Traced(result, find(result.graph, module, lists))
        tried.add(path)
        try:
            result = _trace_knowing(module, arguments, entered | {path}, parents)
        except Untraceable:
            continue
        entered |= {path}


def _may_enter(child: nn.Module, parents: Counter[int]) -> bool:
    """Whether a child may be traced with the module that calls it: nobody else does, or looks."""
    return (
        _has_code(child) and not is_norm(child) and not is_hooked(child) and parents[id(child)] == 1
    )


def _trace_knowing(
    module: nn.Module,
    arguments: tuple[Argument, ...],
    entered: frozenset[str],
    parents: Counter[int],
) -> Trace:
    """Trace a module; where its code asks what a child gives, look into that child first."""
    inside = entered
    proof: Trace | None = None
    while proof is None:
        try:
            proof = trace(module, arguments, inside)
        except AsksForResult as question:
            child = module.get_submodule(question.path)
            if not _has_code(child) or is_hooked(child) or parents[id(child)] != 1:
                raise
            inside |= {question.path}
    if inside == entered:
        return proof
    # The children stay as they are: only what they give was to be known.
    result = trace(module, arguments, entered, proof.gave)
    if len(result.conditions) != len(proof.conditions):
        raise Untraceable("what a child gives depends on a shape")
    result.reads = {**proof.reads, **result.reads}
    result.asked = tuple(dict.fromkeys((*result.asked, *proof.asked)))
    result.looked_into = tuple(path for path in proof.entered if path not in entered)
    result.asks_types = result.asks_types or proof.asks_types
    return result


def _has_code(module: nn.Module) -> bool:
    """Whether a module runs code that can be looked into."""
    return original_class(module).forward is nn.Sequential.forward or _is_composite(module)


def _worth_entering(
    module: nn.Module, result: Trace, parents: Counter[int], tried: set[str]
) -> str | None:
    calls = Counter(n.target for n in result.graph.nodes if n.op == "call_module")

    def may(node: fx.Node) -> bool:
        if node.op != "call_module" or node.target in tried or calls[node.target] > 1:
            return False
        return _may_enter(module.get_submodule(str(node.target)), parents)

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
                    if may(end) and (has_norm(end) or _passes(module, end)):
                        return str(end.target)
        elif is_relu_function(node) or is_relu_module(module, node) or is_pool(module, node):
            end = _behind(module, node.args[0])
            if may(end) and has_norm(end):
                return str(end.target)
        elif is_normalisation(module, node):
            end = _behind(module, node.args[0])
            if may(end) and _ends_in_convolution(module.get_submodule(str(end.target))):
                return str(end.target)
            ahead = next(iter(node.users), node)
            if may(ahead) and _passes(module, ahead):
                return str(ahead.target)
    return None


def _behind(module: nn.Module, node: fx.Node) -> fx.Node:
    while is_identity(module, node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _passes(module: nn.Module, node: fx.Node) -> bool:
    """Whether the node calls something without parameters, which may give back its input."""
    if node.op != "call_module":
        return False
    child = module.get_submodule(str(node.target))
    return not any(True for _ in child.parameters()) and not any(True for _ in child.buffers())


def _ends_in_convolution(module: nn.Module) -> bool:
    last = [m for m in module.modules() if not isinstance(m, nn.Identity)][-1]
    return isinstance(last, nn.Conv2d)
