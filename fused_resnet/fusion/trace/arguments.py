"""The arguments of a traced forward: which kind each is assumed to be."""

from __future__ import annotations

import dis
import inspect
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import Untraceable
from .purity import names_of

#: The kind of an argument during a trace; a sequence is a list of tensors.
TENSOR, SEQUENCE, DEFAULT, UNUSED = "tensor", "sequence", "default", "unused"


@dataclass(frozen=True)
class Argument:
    """A parameter of a forward and the kind that it is assumed to be.

    Attributes:
        name: Name of the parameter.
        kind: :data:`TENSOR`, :data:`SEQUENCE`, :data:`DEFAULT` or :data:`UNUSED`.
        default: Default of the parameter; ``inspect.Parameter.empty`` for none.
        keyword_only: Whether it can only be passed by keyword.
    """

    name: str
    kind: str
    default: Any = inspect.Parameter.empty
    keyword_only: bool = False


def call_signatures(module: nn.Module) -> Iterator[tuple[Argument, ...]]:
    """Combinations of argument kinds to trace the forward with, the simplest call first.

    Arguments without a default are tensors, or lists where their annotation says so; the first is
    also tried as a list where the code uses ``isinstance``. Those whose default is None are tried
    as None and as tensors. All others keep their default.

    Args:
        module: The module; its forward is the one of its class.

    Yields:
        The arguments of one call, in the order of the parameters.

    Raises:
        Untraceable: The forward has no signature, or accepts arbitrary arguments.
    """
    forward = type(module).forward
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError) as error:
        raise Untraceable("its forward has no signature") from error
    base: list[Argument] = []
    optional: list[int] = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Untraceable("its forward takes any arguments")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise Untraceable("its forward takes positional arguments only")
        kind = DEFAULT
        if not _uses(forward, parameter.name):
            kind = UNUSED
        elif parameter.default is parameter.empty:
            kind = SEQUENCE if _is_sequence(parameter.annotation) else TENSOR
        elif parameter.default is None:
            optional.append(len(base))
        only = parameter.kind is parameter.KEYWORD_ONLY
        base.append(Argument(parameter.name, kind, parameter.default, only))
    for as_tensor in range(1 << min(len(optional), 2)):  # a bit for each optional argument
        arguments = list(base)
        for bit, index in enumerate(optional):
            if as_tensor >> bit & 1:
                old = arguments[index]
                arguments[index] = Argument(old.name, TENSOR, old.default, old.keyword_only)
        yield tuple(arguments)
    tensors = [a for a in base if a.kind == TENSOR]
    if tensors and "isinstance" in _code_names(forward):
        first = tensors[0]
        as_list = Argument(first.name, SEQUENCE, first.default, first.keyword_only)
        yield tuple(as_list if a is first else a for a in base)


def _code_names(forward: Callable[..., Any]) -> frozenset[str]:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return frozenset() if code is None else names_of(code)


def _uses(forward: Callable[..., Any], name: str) -> bool:
    function = inspect.unwrap(forward)
    code = getattr(function, "__code__", None)
    if code is None or name in code.co_cellvars:
        return True
    for instruction in dis.get_instructions(code):
        if "FAST" in instruction.opname and name in _names(instruction.argval):
            return True
    return False


def _names(argument: Any) -> tuple[Any, ...]:
    return argument if isinstance(argument, tuple) else (argument,)


def _is_sequence(annotation: Any) -> bool:
    if isinstance(annotation, str):
        text = annotation.rpartition(".")[2] if "[" not in annotation else annotation
        return text.removeprefix("typing.").partition("[")[0] in ("List", "list", "Sequence")
    return typing.get_origin(annotation) in (list, tuple) or annotation in (list, tuple)
