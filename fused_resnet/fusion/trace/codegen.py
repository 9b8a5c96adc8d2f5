"""Generates the Python source of a fused forward from traced graphs and their groups."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ...nn.fused_forward import NO_PADDING
from ...nn.module_kinds import original_class
from .arguments import DEFAULT, SEQUENCE, TENSOR, UNUSED
from .generated_forward import BlockPaths, GeneratedForward, GroupPaths, Specialization
from .matching import Match, Matches
from .outside import Outside
from .patterns import FUNCTION_PATHS
from .tracing import Trace


@dataclass
class BlockMatch:
    """The matches that make up one residual block.

    Attributes:
        groups: The matches of the main branch, in order.
        shortcut: The match of the shortcut; None for one without parameters.
        identities: Paths of the ``nn.Identity`` modules that the block calls.
        padding: Channels of zeros on each side, and the stride, of a shortcut that subsamples and
            pads with zeros; those of the identity otherwise.
    """

    groups: list[Match]
    shortcut: Match | None
    identities: list[str]
    padding: tuple[int, int] = NO_PADDING


@dataclass
class MatchedTrace:
    """A trace and the groups in its graph.

    Attributes:
        trace: The graph and its assumptions.
        matches: The groups of the graph.
        block: The residual block that the whole graph computes; None if it is not a block.
    """

    trace: Trace
    matches: Matches
    block: BlockMatch | None = None


def shared_modules(traces: Iterable[MatchedTrace]) -> set[str]:
    """Paths of the modules that are called by different groups, or by a group and outside of it.

    Args:
        traces: All traces of one module.
    """
    uses: dict[str, set[tuple[Any, ...]]] = {}
    for traced in traces:
        inside: dict[fx.Node, tuple[Any, ...]] = {}
        for match in traced.matches.groups:
            pool = match.pool.target if match.pool else None
            conv = match.conv.target if match.conv else None
            inside |= dict.fromkeys(match.members, (conv, match.bn.target, pool))
        for node in traced.trace.graph.nodes:
            if node.op == "call_module":
                uses.setdefault(str(node.target), set()).add(inside.get(node, ()))
    return {path for path, kinds in uses.items() if len(kinds) > 1}


def generate_source(
    module: nn.Module, traces: Iterable[MatchedTrace], failure: str, shared: set[str]
) -> GeneratedForward:
    """The generated forward of a module.

    Args:
        module: The traced module.
        traces: One for each specialization, in the order in which their guards are tried.
        failure: Why a call of the module could not be traced; empty when all could.
        shared: Paths of the modules that ``freeze`` must not fold, from :func:`shared_modules`.
    """
    constants = _Constants()
    functions: list[str] = []
    bodies: list[str] = []
    specializations: list[Specialization] = []
    first: Trace | None = None
    outsides: dict[Any, Outside] = {}
    for index, traced in enumerate(traces):
        first = first or traced.trace
        writer = _SpecializationWriter(module, traced, constants, shared)
        guard, body = writer.guard(index), writer.body(index)
        functions.append(guard)
        bodies.append(body)
        specializations.append(writer.description())
        outsides |= {found.function: found for found in traced.trace.outside}
    assert first is not None
    arguments = first.arguments
    passed = [f"{a.name}={a.name}" if a.keyword_only else a.name for a in arguments]
    used = ", ".join(a.name for a in arguments if a.kind != UNUSED)
    lines = [
        *functions,
        f"def forward({_signature(first, constants)}):",
        f"    if not _observed({used}):",
        *bodies,
        f"    return _original_forward(self)({', '.join(['self', *passed])})",
        "",
    ]
    source, outside = "\n".join(lines), tuple(outsides.values())
    return GeneratedForward(source, constants.values, tuple(specializations), failure, outside)


def _signature(trace: Trace, constants: _Constants) -> str:
    declared = ["self"]
    starred = False
    for argument in trace.arguments:
        if argument.keyword_only and not starred:
            declared.append("*")
            starred = True
        if argument.default is argument.__dataclass_fields__["default"].default:
            declared.append(argument.name)
        else:
            declared.append(f"{argument.name}={constants.literal(argument.default)}")
    return ", ".join(declared)


class _Constants:
    """Values that cannot be written as a literal, by their names in the source."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def named(self, value: Any) -> str:
        for name, known in self.values.items():
            if known is value:
                return name
        name = f"_k{len(self.values)}"
        self.values[name] = value
        return name

    def literal(self, value: Any) -> str:
        if value is None or value is ... or type(value) in (bool, int, str):
            return repr(value)
        if type(value) is float and value - value == 0:
            return repr(value)
        if type(value) is tuple:
            return f"({', '.join(map(self.literal, value))}{',' if len(value) == 1 else ''})"
        if type(value) is list:
            return f"[{', '.join(map(self.literal, value))}]"
        return self.named(value)


class _Children:
    """Expressions for submodules by path; their parents are looked up once, at the beginning."""

    def __init__(self) -> None:
        self.parents: dict[str, str] = {"": "_c"}

    def __call__(self, path: str) -> str:
        if not path:
            return "self"
        parent, _, name = path.rpartition(".")
        if parent not in self.parents:
            self(parent)
            self.parents[parent] = f"_c{len(self.parents)}"
        return f"{self.parents[parent]}[{name!r}]"

    def lines(self, certain: bool = True) -> list[str]:
        """Statements that look up the parents.

        Args:
            certain: Whether a guard has checked that the parents exist.
        """
        if certain:
            return [f"{name} = {self(path)}._modules" for path, name in self.parents.items()]
        lines = ["_c = self._modules"]
        for path, name in list(self.parents.items())[1:]:
            above, _, last = path.rpartition(".")
            lines.append(f"{name} = _children({self.parents[above]}, {last!r})")
        return lines


def _conjunction(name: str, conditions: list[str], child: _Children) -> str:
    lines = [f"def {name}(self):", *(f"    {line}" for line in child.lines(certain=False))]
    lines += ["    return (", *(f"        {c} and" for c in conditions), "        True", "    )"]
    return "\n".join(lines)


#: Types of attributes that guards compare by value; all others are compared by identity.
_COMPARED = (int, float, str, tuple, list, dict, set, frozenset)


class _SpecializationWriter:
    """Writes the source of one specialization."""

    def __init__(
        self, module: nn.Module, traced: MatchedTrace, constants: _Constants, shared: set[str]
    ) -> None:
        self.module, self.shared = module, shared
        self.trace, self.matches, self.block = traced.trace, traced.matches, traced.block
        self.constants = constants
        self.names: dict[fx.Node, str] = {}
        for index, node in enumerate(self.trace.graph.nodes):
            is_argument = node.op == "placeholder"
            self.names[node] = str(node.target) if is_argument else f"_v{index}"

    def description(self) -> Specialization:
        groups = tuple(map(self._paths, self.matches.groups))
        block = None
        if self.block is not None:
            side = self.block.shortcut
            shortcut = None if side is None else self._paths(side)
            main = tuple(map(self._paths, self.block.groups))
            block = BlockPaths(main, shortcut, tuple(self.block.identities), self.block.padding)
        unfused = tuple(self.matches.unfused)
        return Specialization(groups, unfused, self.trace.inlined, block)

    def _paths(self, match: Match) -> GroupPaths:
        conv = str(match.conv.target) if match.conv else ""
        pool = str(match.pool.target) if match.pool else ""
        bn, adds = str(match.bn.target), match.residual is not None
        foldable = not {conv, bn, pool} & self.shared
        return GroupPaths(conv, bn, match.act, pool, adds, foldable)

    # The guard

    def guard(self, index: int) -> str:
        """Two functions that check all that the trace assumed of the module.

        Args:
            index: Index of the specialization; part of the functions' names.
        """
        attributes = _Children()
        check_attributes = _conjunction(
            f"check_attributes_{index}", self._attributes(attributes), attributes
        )
        structure = _Children()
        conditions = self._structure(structure)
        conditions += [f"check_attributes_{index}(self)"] if self.trace.reads else []
        return f"{check_attributes}\n{_conjunction(f'check_{index}', conditions, structure)}"

    def _structure(self, child: _Children) -> list[str]:
        conditions: list[str] = []
        identities = {path for match in self.matches.groups for path in match.identities}
        called = {str(n.target) for n in self.trace.graph.nodes if n.op == "call_module"}
        traced = {"", *self.trace.inlined, *self.trace.examined}
        for path in self._parents():
            owner = self.module.get_submodule(path)
            child(f"{path}.x" if path else "x")  # registers the parent
            children = child.parents[path]
            conditions.append(
                f"tuple({children}) == {self.constants.literal(tuple(owner._modules))}"
            )
            for name, member in owner._modules.items():
                at = f"{path}.{name}" if path else name
                if member is None:
                    conditions.append(f"{children}[{name!r}] is None")
                elif at in traced or at in identities or at in self.trace.inspected_outputs:
                    conditions.append(f"_is_original({child(at)}, {self._class(member)})")
                elif self.trace.inspects_types:
                    conditions.append(f"_has_class({child(at)}, {self._class(member)})")
                elif at in called:
                    conditions.append(f"{children}[{name!r}] is not None")
        conditions += [f"{child(a)} is {child(b)}" for a, b in self._same()]
        return conditions

    def _parents(self) -> list[str]:
        """The module, the submodules that were traced, and the containers among their children."""
        paths = []
        pending = [("", self.module)]
        while pending:
            path, owner = pending.pop(0)
            paths.append(path)
            for name, member in owner._modules.items():
                at = f"{path}.{name}" if path else name
                is_container = isinstance(member, (nn.ModuleList, nn.ModuleDict))
                traced = at in self.trace.inlined or at in self.trace.examined
                if member is not None and (is_container or traced):
                    pending.append((at, member))
        return paths

    def _same(self) -> list[tuple[str, str]]:
        """Pairs of paths that lead to the same module."""
        first: dict[nn.Module, str] = {}
        pairs = []
        parents = set(self._parents())
        for path, member in self.module.named_modules(remove_duplicate=False):
            if path and path.rpartition(".")[0] in parents:
                if member in first:
                    pairs.append((path, first[member]))
                first.setdefault(member, path)
        return pairs

    def _class(self, module: nn.Module) -> str:
        return self.constants.named(original_class(module))

    def _attributes(self, child: _Children) -> list[str]:
        conditions = []
        for (path, name), value in self.trace.reads.items():
            got = f"getattr({child(path)}, {name!r}, ...)" if path else f"self.{name}"
            if value is Tensor:
                conditions.append(f"{got} is not None")
            elif value is None or type(value) is bool:
                conditions.append(f"{got} is {value}")
            elif callable(value) or not isinstance(value, _COMPARED):
                conditions.append(f"{got} is {self.constants.named(value)}")
            else:
                conditions.append(f"_equals({got}, {self.constants.literal(value)})")
        return conditions

    def _argument_checks(self) -> list[str]:
        conditions = []
        tensor = self.constants.named(Tensor)
        for argument in self.trace.arguments:
            if argument.kind == TENSOR:
                conditions.append(f"isinstance({argument.name}, {tensor})")
            elif argument.kind == SEQUENCE:
                conditions.append(f"isinstance({argument.name}, list)")
            elif argument.kind == DEFAULT:
                default = argument.default
                if default is None or type(default) is bool:
                    conditions.append(f"{argument.name} is {default}")
                else:
                    literal = self.constants.literal(default)
                    conditions.append(f"_equals({argument.name}, {literal})")
        for node, answer in self.trace.conditions:
            conditions.append(self._expression(node) if answer else f"not {self._expression(node)}")
        return conditions

    def _expression(self, node: fx.Node) -> str:
        """A condition on shapes, as one expression of the arguments."""
        if node.op == "placeholder":
            return self.names[node]
        inputs = {source: self._expression(source) for source in node.all_input_nodes}
        return self._call(node, inputs, _Children())

    # The operations

    def body(self, index: int) -> str:
        """The statements of the specialization, under its guard.

        Args:
            index: Index of the specialization; part of its functions' names.
        """
        child = _Children()
        lines = self._statements(child)
        lines = self._whole_block(child) + lines
        head = " and ".join([f"check_{index}(self)", *self._argument_checks()])
        block = [f"            {line}" for line in [*child.lines(), *lines]]
        return "\n".join([f"        if {head}:", *block])

    def _whole_block(self, child: _Children) -> list[str]:
        """Statements that train a residual block as one operation; none for another forward.

        Args:
            child: Names of the children in the source.
        """
        if self.block is None:
            return []
        own = [self._modules(match, child) for match in self.block.groups]
        groups = ", ".join(f"({', '.join(names)})" for names in own)
        side = self.block.shortcut
        shortcut = "()" if side is None else f"({', '.join(self._modules(side, child)[:2])})"
        identities = "".join(f"{child(path)}, " for path in self.block.identities)
        image = next(iter(self.names.values()))
        rest = f"({identities}), {self.block.padding}"
        call = f"_run_block(self, {image}, ({groups}), {shortcut}, {rest})"
        return [f"_whole = {call}", "if _whole is not None: return _whole"]

    def _statements(self, child: _Children) -> list[str]:
        ends = {match.members[-1]: match for match in self.matches.groups}
        inner = {node for match in self.matches.groups for node in match.members[:-1]}
        readers = self._readers(ends, inner)
        lines: list[str] = []
        for node in self.trace.graph.nodes:
            if node in inner or node.op == "placeholder" or self._is_unused_query(node):
                continue
            if node.op == "output":
                lines.append(f"return {self._value(node.args[0], self.names)}")
                break
            match = ends.get(node)
            text = self._group(match, child) if match else self._call(node, self.names, child)
            lines.append(f"{self.names[node]} = {text}")
            done = [self.names[n] for n, last in readers.items() if last is node]
            if done:
                lines.append(f"{' = '.join(done)} = None")
        return lines

    def _readers(self, ends: dict[fx.Node, Match], inner: set[fx.Node]) -> dict[fx.Node, fx.Node]:
        """The last statement that reads each result, after which its memory can be freed."""
        last: dict[fx.Node, fx.Node] = {}
        for node in self.trace.graph.nodes:
            if node in inner:
                continue
            match = ends.get(node)
            read = [match.source, match.residual] if match else node.all_input_nodes
            for source in read:
                if source is not None and source.op != "placeholder":
                    last[source] = node
        return {s: n for s, n in last.items() if n.op != "output"}

    def _is_unused_query(self, node: fx.Node) -> bool:
        """Whether a node only queries a shape, and its result is unused."""
        if node.op not in ("call_function", "call_method") or not _is_shape_query(node):
            return False
        return all(self._is_unused_query(user) for user in node.users)

    def _group(self, match: Match, child: _Children) -> str:
        conv, bn, act = self._modules(match, child)
        x = self.names[match.source]
        rest = ""
        if match.residual is not None:
            rest = f", {self.names[match.residual]}"
            if not match.in_place:
                rest += f", {self.constants.named(operator.add)}"
        if match.conv is None:
            return f"_norm_add_act({bn}, {act}, {x}{rest})"
        if match.pool is not None:
            return f"_run_sequence(({conv}, {bn}, {act}, {child(str(match.pool.target))}), {x})"
        return f"_conv_bn({conv}, {bn}, {act}, {x}{rest})"

    def _modules(self, match: Match, child: _Children) -> tuple[str, str, str]:
        """Expressions for the convolution, the batch norm and the activation of a group."""
        conv = "None" if match.conv is None else child(str(match.conv.target))
        bn = child(str(match.bn.target))
        inside = match.act == f"{match.bn.target}.act"
        if match.act in FUNCTION_PATHS:
            return conv, bn, f"_{FUNCTION_PATHS[match.act].name}"
        return conv, bn, "None" if inside or not match.act else child(match.act)

    def _call(self, node: fx.Node, names: dict[fx.Node, str], child: _Children) -> str:
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            return f"{child(path)}.{name}"
        args = [self._value(a, names) for a in node.args]
        keywords = [f"{k}={self._value(v, names)}" for k, v in node.kwargs.items()]
        if node.op == "call_module":
            return f"{child(str(node.target))}({', '.join([*args, *keywords])})"
        if node.op == "call_method":
            return f"{args[0]}.{node.target}({', '.join([*args[1:], *keywords])})"
        if node.target is getattr:
            return f"{args[0]}.{node.args[1]}"
        return f"{self.constants.named(node.target)}({', '.join([*args, *keywords])})"

    def _value(self, value: Any, names: dict[fx.Node, str]) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, slice):
            bounds = (value.start, value.stop, value.step)
            return f"slice({', '.join(self._value(v, names) for v in bounds)})"
        if isinstance(value, dict):
            pairs = (f"{self._value(k, names)}: {self._value(v, names)}" for k, v in value.items())
            return f"{{{', '.join(pairs)}}}"
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            inner = ", ".join(self._value(v, names) for v in value)
            if isinstance(value, list):
                return f"[{inner}]"
            return f"({inner}{',' if len(value) == 1 else ''})"
        return self.constants.literal(value)


def _is_shape_query(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype")
    if node.op == "call_method":
        return node.target in ("size", "dim", "ndimension")
    queries = (operator.getitem, operator.eq, operator.ne, operator.lt, operator.le, operator.gt,
              operator.ge)  # fmt: skip
    return node.target in queries and all(map(_is_shape_query, node.all_input_nodes))
