"""What traced functions have beside their code: variables of the functions around them, defaults.

A variable can be assigned anew (``nonlocal``), and ``__defaults__`` too: what a trace read of them
is compared with what they are at each call of a module whose trace ran such functions.
"""

from __future__ import annotations

import functools
import gc
import importlib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from .errors import Untraceable

#: The most functions of the same code, with equal variables, that are looked at in each call.
_MOST_ALIKE = 4

#: Of these, equal values are the same. All others are compared by identity.
_PLAIN = (bool, int, float, complex, str, bytes, frozenset)

#: The kinds of a value: a variable of a function around, and defaults.
_VARIABLE, _DEFAULT, _KEYWORD = "variable", "default", "keyword"


def equals(value: Any, traced: Any) -> bool:
    """Whether a value is the traced one: 1, 1.0 and True are equal, but not the same argument.

    Args:
        value: An attribute, an argument or a variable.
        traced: What it was when it was traced.
    """
    if value is traced:
        return True
    if type(value) is not type(traced):
        return False
    if isinstance(traced, (tuple, list)):
        pairs = zip(value, traced, strict=False)
        return len(value) == len(traced) and all([equals(*pair) for pair in pairs])
    if isinstance(traced, dict):
        return equals(list(value.items()), list(traced.items()))
    return isinstance(traced, (*_PLAIN, set)) and value == traced


@dataclass(frozen=True)
class Outside:
    """A traced function, and what it had beside its code.

    Attributes:
        function: The function; None where it was unpickled and is not found by its name.
        defaults: The number of ``function.__defaults__``.
        values: Where each value is, and what it was when it was traced: its kind, its index in
            ``__closure__`` or ``__defaults__`` or its name in ``__kwdefaults__``, and the value.
    """

    function: types.FunctionType | None
    defaults: int
    values: tuple[tuple[str, Any, Any], ...]

    @property
    def has_variables(self) -> bool:
        """Whether any of the values is a variable of a function around this one."""
        return any([kind == _VARIABLE for kind, _, _ in self.values])

    def is_unchanged(self) -> bool:
        """Whether all is as it was traced."""
        f = self.function
        if f is None or len(f.__defaults__ or ()) != self.defaults:
            return False
        try:
            return all([equals(_value(f, kind, at), traced) for kind, at, traced in self.values])
        except (LookupError, TypeError, ValueError):  # gone
            return False

    def __reduce__(self) -> tuple[Any, ...]:
        # By name, as functions are pickled. A function or class among the values, such as the one
        # that a decorator wraps, need not have a name, and is taken as it will be found.
        f = self.function
        name = ("", "") if f is None else (f.__module__, f.__qualname__)
        values = [v for v in self.values if not isinstance(v[2], (types.FunctionType, type))]
        return (_of_name, (*name, self.defaults, tuple(values)))


def _value(function: types.FunctionType, kind: str, at: Any) -> Any:
    if kind == _VARIABLE:
        return function.__closure__[at].cell_contents  # type: ignore[index]
    held = function.__defaults__ if kind == _DEFAULT else function.__kwdefaults__
    return held[at]  # type: ignore[index]


def _of_name(module: str, name: str, *others: Any) -> Outside:
    try:
        found: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError):
        found = None
    return Outside(found if isinstance(found, types.FunctionType) else None, *others)


def outside_of(
    frame: types.FrameType, variables: set[str], made: set[types.CodeType]
) -> Iterator[Outside]:
    """What the function of a frame has beside its code, if anything of it can change.

    Args:
        frame: The frame, at the beginning of its call.
        variables: The variables of the functions around it that the trace has as constants.
        made: Code of the functions that are made in the traced call, whose variables and defaults
            are traced themselves.

    Raises:
        Untraceable: The function is not found, or too many are like it.
    """
    code = frame.f_code
    if code in made:
        return
    count = code.co_argcount + code.co_kwonlyargcount
    arguments = [frame.f_locals.get(name) for name in code.co_varnames[:count]]
    if not variables and all(isinstance(v, (fx.Proxy, nn.Module)) for v in arguments):
        return
    indices = [i for i, name in enumerate(code.co_freevars) if name in variables]
    read = [(i, frame.f_locals[code.co_freevars[i]]) for i in indices]
    found = [f for f in _named(frame) if _has(f, read)] or [
        f
        for f in gc.get_referrers(code)
        if isinstance(f, types.FunctionType) and f.__code__ is code and _has(f, read)
    ]
    if (variables and not found) or len(found) > _MOST_ALIKE:
        name = min(variables, default="a default")
        raise Untraceable(
            f"{code.co_name} reads {name} of the function around it, which can change unseen"
        )
    for function in found:
        defaults = function.__defaults__ or ()
        values: list[tuple[str, Any, Any]] = [(_VARIABLE, i, value) for i, value in read]
        values += [(_DEFAULT, i, value) for i, value in enumerate(defaults)]
        values += [(_KEYWORD, k, value) for k, value in (function.__kwdefaults__ or {}).items()]
        if values:
            yield Outside(function, len(defaults), tuple(values))


def _has(function: types.FunctionType, read: list[tuple[int, Any]]) -> bool:
    try:
        return all(_value(function, _VARIABLE, i) is value for i, value in read)
    except ValueError:  # not assigned yet
        return False


def _named(frame: types.FrameType) -> Iterator[types.FunctionType]:
    """The function of a frame, if it is a method of its first argument or a global function."""
    code, name = frame.f_code, frame.f_code.co_name
    owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    candidates = [cls.__dict__.get(name) for cls in type(owner).__mro__]
    for candidate in (*candidates, frame.f_globals.get(name)):
        function = getattr(candidate, "__func__", getattr(candidate, "fget", candidate))
        while isinstance(function, types.FunctionType):
            if function.__code__ is code:
                yield function
                return
            function = function.__dict__.get("__wrapped__")
