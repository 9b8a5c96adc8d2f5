"""Traces of a frozen model: the graph of a module with all that it calls, and of each part."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from ..fusion.trace.arguments import SEQUENCE, TENSOR, Argument, call_signatures
from ..fusion.trace.errors import Untraceable
from ..fusion.trace.tracing import _Tracer, first_trace
from ..nn.module_kinds import PackedConv, is_hooked, original_class


@dataclass(frozen=True)
class FrozenGraph:
    """The graph of one module.

    Attributes:
        path: Path of the module, relative to the traced one.
        graph: Graph of its calls, by paths relative to the module.
        tensors: Names of its arguments that are tensors, in order; they come first.
        defaults: The values that all other arguments are assumed to have, by name.
        conditions: Nodes on whose truth the code branched, and the outcome.
    """

    path: str
    graph: fx.Graph
    tensors: tuple[str, ...]
    defaults: dict[str, Any]
    conditions: list[tuple[fx.Node, bool]]


class _Call(NamedTuple):
    """A call of an inlined module: its argument, its result and the nodes in between."""

    path: str
    x: fx.Node
    result: Any
    begin: int
    end: int


class _FrozenTracer(_Tracer):
    """Traces a frozen module; records the calls of the modules that it inlines."""

    def __init__(
        self,
        module: nn.Module,
        arguments: tuple[Argument, ...],
        inline: frozenset[str],
        outcomes: list[bool],
    ) -> None:
        kinds = {p: None for p, m in module.named_modules() if isinstance(m, PackedConv)}
        super().__init__(module, arguments, inline, outcomes, kinds)
        self.calls: list[_Call] = []
        self.counted = 0

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        begin = self.counted
        result = super().call_module(m, forward, args, kwargs)
        if m in self.inline and len(args) == 1 and not kwargs and isinstance(args[0], fx.Proxy):
            self.calls.append(_Call(self.inline[m], args[0].node, result, begin, self.counted))
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.counted += 1
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and dataclasses.is_dataclass(a):  # a result of transformers
            fields = {key: self.create_arg(value) for key, value in a.items()}
            return self.create_node("call_function", type(a), (), fields)
        return super().create_arg(a)


def graphs_of(module: nn.Module, inline: frozenset[str]) -> Iterator[FrozenGraph]:
    """The graph of a module for a call with tensors alone, and those of the modules that it calls.

    Args:
        module: A frozen module, not sealed yet.
        inline: Paths of the submodules that are traced as part of it.

    Raises:
        Untraceable: Its forward cannot be proved to do the same at every call.
    """
    arguments = next(call_signatures(module))
    given = [a for a in arguments if a.kind == TENSOR]
    if any(a.kind == SEQUENCE for a in arguments) or list(arguments[: len(given)]) != given:
        raise Untraceable("it takes more than tensors")
    tracer, traced = first_trace(
        lambda outcomes: _FrozenTracer(module, arguments, inline, outcomes)
    )
    defaults = {a.name: a.default for a in arguments[len(given) :]}
    names = tuple(a.name for a in given)
    yield FrozenGraph("", traced.graph, names, defaults, traced.conditions)
    nodes = list(traced.graph.nodes)
    times = Counter(call.path for call in tracer.calls)
    for call in tracer.calls:
        if times[call.path] == 1:
            part = _part(call, nodes[call.begin : call.end], dict(traced.conditions))
            if part is not None:
                yield FrozenGraph(call.path, part, ("x",), {}, [])


def _part(call: _Call, nodes: list[fx.Node], conditions: Any) -> fx.Graph | None:
    """The graph of one call; None where it reads more than its argument."""
    graph = fx.Graph()
    copies = {call.x: graph.placeholder("x")}
    prefix = f"{call.path}."

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies and node.op == "get_attr":
            copy(node)
        return copies[node]

    def copy(node: fx.Node) -> None:
        if node in conditions:
            raise KeyError(node)
        copies[node] = graph.node_copy(node, copy_of)
        if node.op in ("call_module", "get_attr"):
            if not str(node.target).startswith(prefix):
                raise KeyError(node)
            copies[node].target = str(node.target)[len(prefix) :]

    def result_of(value: Any) -> Any:
        return copy_of(value.node) if isinstance(value, fx.Proxy) else value

    try:
        for node in nodes:
            copy(node)
        graph.output(fx.node.map_aggregate(call.result, result_of))
    except (KeyError, NotImplementedError):
        return None
    return graph


def has_code(module: nn.Module) -> bool:
    """Whether a module has a forward that can be traced, and is no layer of PyTorch's.

    Args:
        module: Any module.
    """
    if isinstance(module, (PackedConv, torch.jit.ScriptModule, fx.GraphModule)):
        return False
    cls = original_class(module)
    if cls.forward is nn.Sequential.forward:
        return True
    return not cls.__module__.startswith("torch.") and "forward" not in module.__dict__


def is_inlinable(module: nn.Module) -> bool:
    """Whether a module may be traced as part of another one.

    Args:
        module: Any module.
    """
    return has_code(module) and not is_hooked(module) and module._compiled_call_impl is None
