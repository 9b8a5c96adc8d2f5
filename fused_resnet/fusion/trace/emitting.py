"""Python source of a fused forward, from traced graphs and the groups found in them."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ...nn.module_kinds import original_class
from .matching import FUNCTION, Match, Matches
from .plan import BlockPaths, Plan, PlannedGroup, Way
from .stages import early_stages
from .tracing import DEFAULT, SEQUENCE, TENSOR, UNUSED, Trace


@dataclass
class Block:
    """A residual block by its groups; see :class:`~fused_resnet.swap.plan.BlockPaths`."""

    groups: list[Match]
    shortcut: Match | None
    identities: list[str]


@dataclass
class Traced:
    """A trace, its groups, and the residual block that they are all of, if they are."""

    trace: Trace
    matches: Matches
    block: Block | None = None


def called_elsewhere(found: Iterable[Traced]) -> set[str]:
    """Children that some way calls outside of the one kind of group that they are in."""
    uses: dict[str, set[tuple[Any, ...]]] = {}
    for traced in found:
        inside: dict[fx.Node, tuple[Any, ...]] = {}
        for match in traced.matches.groups:
            pool = match.pool.target if match.pool else None
            conv = match.conv.target if match.conv else None
            inside |= dict.fromkeys(match.members, (conv, match.bn.target, pool))
        for node in traced.trace.graph.nodes:
            if node.op == "call_module":
                uses.setdefault(str(node.target), set()).add(inside.get(node, ()))
    return {path for path, kinds in uses.items() if len(kinds) > 1}


def emit(module: nn.Module, found: Iterable[Traced], failure: str, shared: set[str]) -> Plan:
    """The plan of a module.

    Args:
        module: That was traced.
        found: One for each way to call it.
        failure: Why another way was not traced; empty for none.
        shared: Children that must stay what they are when the model is frozen.
    """
    constants = _Constants()
    tests: list[str] = []
    bodies: list[str] = []
    ways: list[Way] = []
    first: Trace | None = None
    for traced in found:
        first = first or traced.trace
        way = _Way(module, traced, constants, shared)
        index = len(ways)
        test, body = way.test(index), way.body(index)
        tests += [test, *way.early_source(index)]
        bodies.append(body)
        ways.append(way.description())
    assert first is not None
    arguments = first.arguments
    passed = [f"{a.name}={a.name}" if a.keyword_only else a.name for a in arguments]
    watched = ", ".join(a.name for a in arguments if a.given != UNUSED)
    lines = [
        *tests,
        f"def forward({_signature(first, constants)}):",
        f"    if not _watched({watched}):",
        *bodies,
        f"    return _unfused(self)({', '.join(['self', *passed])})",
        "",
    ]
    return Plan("\n".join(lines), constants.values, tuple(ways), failure)


def _signature(trace: Trace, constants: _Constants) -> str:
    parts = ["self"]
    starred = False
    for argument in trace.arguments:
        if argument.keyword_only and not starred:
            parts.append("*")
            starred = True
        if argument.default is argument.__dataclass_fields__["default"].default:
            parts.append(argument.name)
        else:
            parts.append(f"{argument.name}={constants.literal(argument.default)}")
    return ", ".join(parts)


class _Constants:
    """Values that have no literal, by the names they get."""

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
    """Expressions for the children by path; their parents are looked up once, at the beginning."""

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
        """Statements that look the parents up.

        Args:
            certain: Whether it is known that they are there.
        """
        if certain:
            return [f"{name} = {self(path)}._modules" for path, name in self.parents.items()]
        lines = ["_c = self._modules"]
        for path, name in list(self.parents.items())[1:]:
            above, _, last = path.rpartition(".")
            lines.append(f"{name} = _children({self.parents[above]}, {last!r})")
        return lines


def _conjunction(name: str, tests: list[str], child: _Children) -> str:
    lines = [f"def {name}(self):", *(f"    {line}" for line in child.lines(certain=False))]
    lines += ["    return (", *(f"        {t} and" for t in tests), "        True", "    )"]
    return "\n".join(lines)


#: What an attribute is compared with by value; anything else is the same object or is not.
_COMPARED = (int, float, str, tuple, list, dict, set, frozenset)


class _Way:
    def __init__(
        self, module: nn.Module, traced: Traced, constants: _Constants, shared: set[str]
    ) -> None:
        self.module, self.shared = module, shared
        self.trace, self.matches, self.block = traced.trace, traced.matches, traced.block
        self.constants = constants
        tensors = {a.name for a in self.trace.arguments if a.given == TENSOR}
        self.early = early_stages(module, self.trace.graph, self.matches, tensors)
        self.names: dict[fx.Node, str] = {}
        for index, node in enumerate(self.trace.graph.nodes):
            named = node.op == "placeholder"
            self.names[node] = str(node.target) if named else f"_v{index}"

    def description(self) -> Way:
        groups = tuple(map(self._planned, self.matches.groups))
        block = None
        if self.block is not None:
            side = self.block.shortcut
            shortcut = None if side is None else self._planned(side)
            own = tuple(map(self._planned, self.block.groups))
            block = BlockPaths(own, shortcut, tuple(self.block.identities))
        early = tuple(self.early[1]) if self.early else ()
        return Way(groups, tuple(self.matches.left), self.trace.entered, block, early)

    def _planned(self, match: Match) -> PlannedGroup:
        conv = str(match.conv.target) if match.conv else ""
        pool = str(match.pool.target) if match.pool else ""
        bn, adds = str(match.bn.target), match.residual is not None
        foldable = not {conv, bn, pool} & self.shared
        return PlannedGroup(conv, bn, match.act, pool, adds, foldable)

    # Whether the way may be gone

    def test(self, index: int) -> str:
        """Two functions that ask for all that the trace assumed of the module."""
        attributes = _Children()
        reads = _conjunction(f"reads_{index}", self._attributes(attributes), attributes)
        structure = _Children()
        tests = self._structure(structure)
        tests += [f"reads_{index}(self)"] if self.trace.reads else []
        return f"{reads}\n{_conjunction(f'holds_{index}', tests, structure)}"

    def _structure(self, child: _Children) -> list[str]:
        tests: list[str] = []
        identities = {path for match in self.matches.groups for path in match.identities}
        called = {str(n.target) for n in self.trace.graph.nodes if n.op == "call_module"}
        inside = {"", *self.trace.entered, *self.trace.looked_into}
        for path in self._parents():
            owner = self.module.get_submodule(path)
            child(f"{path}.x" if path else "x")  # looks the children up
            mine = child.parents[path]
            tests.append(f"tuple({mine}) == {self.constants.literal(tuple(owner._modules))}")
            for name, member in owner._modules.items():
                at = f"{path}.{name}" if path else name
                if member is None:
                    tests.append(f"{mine}[{name!r}] is None")
                elif at in inside or at in identities:
                    tests.append(f"_plain({child(at)}, {self._class(member)})")
                elif at in self.trace.asked:
                    tests.append(f"_unwatched({child(at)}, {self._class(member)})")
                elif self.trace.asks_types:
                    tests.append(f"_is({child(at)}, {self._class(member)})")
                elif at in called:
                    tests.append(f"{mine}[{name!r}] is not None")
        tests += [f"{child(a)} is {child(b)}" for a, b in self._same()]
        return tests

    def _parents(self) -> list[str]:
        """The module, the children whose code was read, and the lists among their children."""
        paths = []
        pending = [("", self.module)]
        while pending:
            path, owner = pending.pop(0)
            paths.append(path)
            for name, member in owner._modules.items():
                at = f"{path}.{name}" if path else name
                lists = isinstance(member, (nn.ModuleList, nn.ModuleDict))
                read = at in self.trace.entered or at in self.trace.looked_into
                if member is not None and (lists or read):
                    pending.append((at, member))
        return paths

    def _same(self) -> list[tuple[str, str]]:
        """Pairs of paths that led to one module."""
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
        tests = []
        for (path, name), value in self.trace.reads.items():
            got = f"getattr({child(path)}, {name!r}, ...)" if path else f"self.{name}"
            if value is Tensor:
                tests.append(f"{got} is not None")
            elif value is None or type(value) is bool:
                tests.append(f"{got} is {value}")
            elif callable(value) or not isinstance(value, _COMPARED):
                tests.append(f"{got} is {self.constants.named(value)}")
            else:
                tests.append(f"{got} == {self.constants.literal(value)}")
        return tests

    def _of_arguments(self) -> list[str]:
        tests = []
        tensor = self.constants.named(Tensor)
        for argument in self.trace.arguments:
            if argument.given == TENSOR:
                tests.append(f"isinstance({argument.name}, {tensor})")
            elif argument.given == SEQUENCE:
                tests.append(f"isinstance({argument.name}, list)")
            elif argument.given == DEFAULT:
                default = argument.default
                if default is None or type(default) is bool:
                    tests.append(f"{argument.name} is {default}")
                else:
                    tests.append(f"{argument.name} == {self.constants.literal(default)}")
        for node, answer in self.trace.conditions:
            tests.append(self._expression(node) if answer else f"not {self._expression(node)}")
        return tests

    def _expression(self, node: fx.Node) -> str:
        """A question about shapes as one expression of the arguments."""
        if node.op == "placeholder":
            return self.names[node]
        parts = {source: self._expression(source) for source in node.all_input_nodes}
        return self._call(node, parts, _Children())

    # The operations

    def body(self, index: int) -> str:
        """The statements of the way, behind its test."""
        child = _Children()
        lines = self._statements(child)
        if self.early is not None:
            end, _, image = self.early
            child = _Children()
            lines = self._statements(child, after=end)
            stages = f"self.run_early(early_{index}, {self.names[image]})"
            lines.insert(0, f"{self.names[end]} = {stages}")
        lines = self._block(child) + lines
        tests = [f"holds_{index}(self)", *self._of_arguments()]
        head = " and ".join(tests)
        block = [f"            {line}" for line in [*child.lines(), *lines]]
        return "\n".join([f"        if {head}:", *block])

    def _block(self, child: _Children) -> list[str]:
        """Statements that run a residual block whole where it trains; none for another forward."""
        if self.block is None:
            return []
        own = [self._modules(match, child) for match in self.block.groups]
        groups = ", ".join(f"({', '.join(names)})" for names in own)
        side = self.block.shortcut
        shortcut = "()" if side is None else f"({', '.join(self._modules(side, child)[:2])})"
        identities = "".join(f"{child(path)}, " for path in self.block.identities)
        image = next(iter(self.names.values()))
        call = f"_run_block(self, {image}, ({groups}), {shortcut}, ({identities}))"
        return [f"_whole = {call}", "if _whole is not None: return _whole"]

    def early_source(self, index: int) -> list[str]:
        """A function of the stages before the last two; none where there are no stages."""
        if self.early is None:
            return []
        child = _Children()
        end, _, image = self.early
        lines = self._statements(child, until=end)
        lines = [*child.lines(), *lines, f"return {self.names[end]}"]
        head = f"def early_{index}(self, {self.names[image]}):"
        return ["\n".join([head, *(f"    {line}" for line in lines)])]

    def _statements(
        self, child: _Children, after: fx.Node | None = None, until: fx.Node | None = None
    ) -> list[str]:
        ends = {match.members[-1]: match for match in self.matches.groups}
        inner = {node for match in self.matches.groups for node in match.members[:-1]}
        readers = self._readers(ends, inner)
        lines: list[str] = []
        started = after is None
        for node in self.trace.graph.nodes:
            if not started:
                started = node is after
                continue
            if node in inner or node.op == "placeholder" or self._is_idle(node):
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
            if node is until:
                break
        return lines

    def _readers(self, ends: dict[fx.Node, Match], inner: set[fx.Node]) -> dict[fx.Node, fx.Node]:
        """The last statement that reads each result: memory is let go as early as it was."""
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

    def _is_idle(self, node: fx.Node) -> bool:
        """Whether a node only asked for a shape that nobody uses any more."""
        if node.op not in ("call_function", "call_method") or not _only_asks(node):
            return False
        return all(self._is_idle(user) for user in node.users)

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
        act = "None" if inside or not match.act else child(match.act)
        return conv, bn, "_RELU" if match.act == FUNCTION else act

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
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join(self._value(v, names) for v in parts)})"
        if isinstance(value, dict):
            pairs = (f"{self._value(k, names)}: {self._value(v, names)}" for k, v in value.items())
            return f"{{{', '.join(pairs)}}}"
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            inner = ", ".join(self._value(v, names) for v in value)
            if isinstance(value, list):
                return f"[{inner}]"
            return f"({inner}{',' if len(value) == 1 else ''})"
        return self.constants.literal(value)


def _only_asks(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype")
    if node.op == "call_method":
        return node.target in ("size", "dim", "ndimension")
    asking = (operator.getitem, operator.eq, operator.ne, operator.lt, operator.le, operator.gt,
              operator.ge)  # fmt: skip
    return node.target in asking and all(map(_only_asks, node.all_input_nodes))
