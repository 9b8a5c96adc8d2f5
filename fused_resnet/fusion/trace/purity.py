"""What the Python code of a forward may do for one trace of it to stand for every call.

A trace records tensor operations. It does not record what else the code does: a write to a global,
a context such as ``no_grad``, an exception that is caught, a random number of Python's. The code of
every function that a trace enters is therefore read first, and refused where it could do such a
thing. Reads of a module's attributes are harmless here: the tracer records and guards them.
"""

from __future__ import annotations

import builtins
import dis
import functools
import gc
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import Untraceable

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

#: Files whose code is not looked at: torch's, whose operations the trace sees, and Python's own.
_NOT_USERS = (_TORCH, _OURS, sysconfig.get_path("stdlib") + os.sep, "<frozen ")

#: Files of torch whose functions change what the operations inside them mean.
_CONTEXTS = tuple(
    _TORCH + name
    for name in ("autograd/grad_mode.py", "amp/", "utils/_contextlib.py", "utils/checkpoint.py")
)

#: Builtins that compute from their arguments and do nothing else.
_PURE = {
    "abs", "all", "any", "bool", "callable", "dict", "enumerate", "filter", "float", "frozenset",
    "getattr", "hasattr", "int", "isinstance", "issubclass", "len", "list", "map", "max", "min",
    "range", "reversed", "round", "set", "slice", "sorted", "str", "sum", "super", "tuple", "type",
    "zip",
}  # fmt: skip

#: Modules whose functions depend on nothing but their arguments, or are seen by the tracer.
_MODULES = ("torch", "math", "operator", "collections", "typing", "functools", "itertools")

#: What asks for the state of the process, the thread or the call: another answer at another time.
_STATE = {
    "autocast", "enable_grad", "get_default_dtype", "get_rank", "get_rng_state", "get_world_size",
    "globals", "inference_mode", "initial_seed", "is_autocast_enabled", "is_available",
    "is_compiling", "is_exporting", "is_grad_enabled", "is_inference_mode_enabled",
    "is_initialized", "is_tracing", "locals", "manual_seed", "no_grad", "requires_grad",
    "requires_grad_", "seed", "set_grad_enabled", "vars",
}  # fmt: skip

#: Instructions that write where a later call, or somebody else, may read.
_WRITES = {
    "STORE_GLOBAL": "writes a global variable",
    "DELETE_GLOBAL": "writes a global variable",
    "STORE_ATTR": "writes an attribute",
    "DELETE_ATTR": "writes an attribute",
}
_HANDLERS = {"PUSH_EXC_INFO", "SETUP_FINALLY"}
_CONTEXT_INSTRUCTIONS = {"BEFORE_WITH", "SETUP_WITH", "LOAD_SPECIAL", "BEFORE_ASYNC_WITH"}


@contextmanager
def watching(names: set[str]) -> Iterator[None]:
    """Check the code of every function that is entered inside.

    Args:
        names: Gets the names that the code uses.

    Raises:
        Untraceable: From the function that enters it, when code could do more than compute.
    """
    before = sys.getprofile()

    def look(frame: types.FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        path = code.co_filename
        if path.startswith(_CONTEXTS):
            raise Untraceable(f"it runs under {code.co_name} of torch")
        # A named tuple's constructor is code that Python makes.
        if is_not_users(path) or str(frame.f_globals.get("__name__")).startswith("namedtuple_"):
            return
        names.update(names_of(code))
        why = why_impure(code, frame.f_globals)
        if why:
            raise Untraceable(f"{code.co_name} {why}")

    # A collection would run callbacks that are none of the forward's code.
    collects = gc.isenabled()
    gc.disable()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()


def is_not_users(path: str) -> bool:
    """Whether a file is PyTorch's, Python's or this package's own."""
    # Packages are below the standard library's folder, and torch among them.
    if path.startswith(_NOT_USERS[:2]):
        return True
    return path.startswith(_NOT_USERS[2:]) and "-packages" not in path


@functools.cache
def names_of(code: types.CodeType) -> frozenset[str]:
    """Every name that the code uses, those of the code inside it included."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(code.co_names).union(*map(names_of, inner))


def why_impure(code: types.CodeType, module_globals: dict[str, Any]) -> str:
    """What the code may do besides computing from its arguments; empty for nothing.

    Args:
        code: Of one function.
        module_globals: Where its global names are looked up.
    """
    for instruction in _instructions(code):
        name = instruction.opname
        if name in _WRITES:
            return _WRITES[name]
        if name == "STORE_DEREF" and instruction.argval in code.co_freevars:
            return "writes a variable of the function around it"
        if name in _HANDLERS:
            return "catches exceptions"
        if name in _CONTEXT_INSTRUCTIONS:
            return "uses a context (with)"
        if name == "LOAD_GLOBAL":
            why = _why_not_global(instruction.argval, module_globals)
            if why:
                return why
    asked = names_of(code) & _STATE
    return f"asks for {min(asked)}" if asked else ""


@functools.cache
def _instructions(code: types.CodeType) -> tuple[dis.Instruction, ...]:
    return tuple(dis.get_instructions(code))


def _why_not_global(name: str, module_globals: dict[str, Any]) -> str:
    if name not in module_globals:
        value = getattr(builtins, name, None)
        pure = name in _PURE or (isinstance(value, type) and issubclass(value, BaseException))
        return "" if pure else f"uses {name}"
    value = module_globals[name]
    if isinstance(value, types.ModuleType):
        known = value.__name__.partition(".")[0] in _MODULES
        return "" if known else f"uses the module {value.__name__}"
    return "" if _is_code(value) else f"reads the global {name}"


def _is_code(value: Any) -> bool:
    # A function's own code is checked when it is entered; one in C of torch is seen by the tracer.
    plain: tuple[type, ...] = (types.FunctionType, type, types.GenericAlias)
    if isinstance(value, plain) or getattr(value, "__module__", None) == "typing":
        return True
    return isinstance(value, Callable) and _belongs(value)  # type: ignore[arg-type]


def _belongs(function: Any) -> bool:
    home = getattr(function, "__module__", None) or type(function).__module__
    return str(home).partition(".")[0] in _MODULES or home == "_operator"
