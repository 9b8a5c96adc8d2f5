"""Triton's interpreter, hardened: kernels run on CPU tensors, and what cards do not forgive fails.

Triton's own interpreter computes with numpy, one program after another. It is lenient where a card
is not, and wrong in a few places; :class:`Interpreter` puts that right while it is entered:

- bfloat16 is computed with by value, rounded to nearest even, where Triton's interpreter adds the
  bit patterns; reductions over it are refused.
- ``tl.dot(..., input_precision="tf32")`` drops the 13 low bits, as tensor cores do.
- Every pointer remembers the tensor that it was made from. A load or a store outside of that
  tensor's elements is a fault, also where another tensor happens to lie there.
- Two programs that store to one address, two lanes of one store that do, and a program that loads
  what another one stores, are faults: nothing orders programs. :attr:`Interpreter.seed` shuffles
  them besides.
- A lane that is masked off and has no ``other`` reads NaN, or a number that is out of any range;
  memory that nobody wrote is NaN (torch fills it so in deterministic mode).
- Sums are added in a tree, as threads add them.
- A grid must have programs, and no more of them than a card allows.

Kernels stay what they were decorated as, so the same process can compile them too, elsewhere.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import types
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as upstream
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

Handle, Builder = upstream.TensorHandle, upstream.InterpreterBuilder
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)
_NOBODY, _SEVERAL = -1, -2


class InterpreterFault(AssertionError):  # noqa: N818
    """A kernel did what a card would not forgive."""


# Numbers


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def tf32(values: np.ndarray) -> np.ndarray:
    """What tensor cores read of a float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle: Any) -> np.ndarray:
    return bfloat16_values(handle.data) if _is_bfloat16(handle) else handle.data


# Memory


@dataclass
class Traffic:
    """Which program wrote and read each element of one storage, in one launch."""

    writer: np.ndarray
    reader: np.ndarray


@dataclass
class Extent:
    """The bytes between a tensor's first element and its last, and what happened to its storage."""

    name: str
    low: int
    high: int
    storage: int
    size: int
    traffic: Traffic

    def place(self, addresses: np.ndarray, kind: str, program: int) -> np.ndarray:
        outside = (addresses < self.low) | (addresses + self.size > self.high)
        if outside.any():
            first = int(addresses[outside][0]) - self.low
            raise InterpreterFault(
                f"{kind} out of bounds of {self.name}: {int(outside.sum())} of {addresses.size} "
                f"lanes of program {program}, the first {first} bytes from its beginning, of "
                f"{self.high - self.low}"
            )
        offsets = addresses - self.storage
        if (offsets % self.size).any():
            raise InterpreterFault(f"{kind} between the elements of {self.name}")
        return offsets // self.size

    def load(self, addresses: np.ndarray, program: int) -> None:
        at = self.place(addresses, "load", program)
        writer = self.traffic.writer[at]
        raced = (writer != _NOBODY) & (writer != program)
        if raced.any():
            raise InterpreterFault(
                f"race: program {program} loads of {self.name} what program "
                f"{int(writer[raced][0])} stores"
            )
        reader = self.traffic.reader[at]
        alone = (reader == _NOBODY) | (reader == program)
        self.traffic.reader[at] = np.where(alone, program, _SEVERAL)

    def store(self, addresses: np.ndarray, program: int) -> None:
        at = self.place(addresses, "store", program)
        if np.unique(at).size != at.size:
            raise InterpreterFault(
                f"two lanes of one store of program {program} write one element of {self.name}"
            )
        for other, kind in (
            (self.traffic.writer[at], "stores"),
            (self.traffic.reader[at], "loads"),
        ):
            raced = (other != _NOBODY) & (other != program)
            if raced.any():
                raise InterpreterFault(
                    f"race: program {program} stores to {self.name} where program "
                    f"{int(other[raced][0])} {kind}"
                )
        self.traffic.writer[at] = program


@dataclass
class Launch:
    """One call of a kernel: its name, its grid and its compile-time arguments."""

    kernel: str
    grid: tuple[int, ...]
    constants: dict[str, Any] = field(default_factory=dict)


class Interpreter:
    """While entered, calls of ``triton.jit`` kernels run here, on CPU tensors.

    Attributes:
        seed: 0 runs programs in order; another number in an order that it draws.
    """

    def __init__(self) -> None:
        self.seed = 0
        self._launches: list[Launch] = []
        self._functions: dict[Any, Any] = {}
        self._traffic: dict[tuple[int, int], Traffic] = {}
        self._program = 0

    def launches(self) -> list[Launch]:
        """Those since the last call."""
        found, self._launches = self._launches, []
        return found

    # Entering

    def __enter__(self) -> Interpreter:
        self._stack = contextlib.ExitStack()
        enter = self._stack.enter_context
        jit = {"run": lambda k, *a, grid, warmup=False, **kw: self.run(k, grid, a, kw),
               "__call__": lambda k, *a, **kw: self.function(k)(*a, **kw)}  # fmt: skip
        for name, value in jit.items():
            enter(mock.patch.object(JITFunction, name, value))
        for name, value in self._builder().items():
            enter(mock.patch.object(Builder, name, value, create=True))
        enter(mock.patch.object(upstream.ReduceScanOpInterface, "check_tensor", _check_reduced))
        enter(mock.patch.object(upstream.ReduceOps, "sum", _tree_sum))
        enter(mock.patch.object(upstream.TensorDescHandle, "materialize_pointers", _descriptor))
        # The check of overflow computes everything twice and, in this mode, reports nothing.
        options = upstream.InterpreterOptions(sanitize_overflow=False)
        enter(mock.patch.object(upstream.interpreter_builder, "options", options))
        # One patch of the language for all functions; each would else make, and leave, its own.
        visible = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
        scope = upstream._patch_lang(visible)
        self._stack.callback(scope.restore)
        # Triton 3.6 wants of numpy what numpy since 2.4 does not do: an int of a vector of one.
        enter(mock.patch.object(tl.tensor, "__index__", lambda t: int(t.handle.data.item())))
        enter(np.errstate(all="ignore"))
        before = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then fills with NaN
        self._stack.callback(torch.use_deterministic_algorithms, before, warn_only=warn_only)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # Running

    def function(self, jit: Any) -> Any:
        """The Python function of a kernel, rewritten for the interpreter."""
        if jit.fn not in self._functions:
            fn = jit.fn
            fn.__globals__.setdefault("interpreter_semantic", upstream.interpreter_semantic)
            rewriter = upstream.FunctionRewriter(fn)
            rewriter._compile_and_exec = lambda tree: _execute(tree, rewriter.filename, fn)
            self._functions[fn] = rewriter.rewrite_ast()
        return self._functions[jit.fn]

    def run(self, jit: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {k: v for k, v in kwargs.items() if k in jit.arg_names}
        bound = inspect.getcallargs(jit.fn, *args, **given)
        constants = {p.name for p in jit.params if p.is_constexpr}
        sizes = (*(grid(bound) if callable(grid) else grid), 1, 1)[:3]
        if any(not 0 < n <= most for n, most in zip(sizes, MOST_PROGRAMS, strict=True)):
            raise InterpreterFault(f"{jit.__name__}: a card has no grid of {sizes}")
        values = {k: v for k, v in bound.items() if k in constants}
        self._launches.append(Launch(jit.__name__, sizes, values))
        self._traffic = {}
        converted = {
            k: v if k in constants else self._argument(k, v, jit) for k, v in bound.items()
        }
        function, builder = self.function(jit), upstream.interpreter_builder
        builder.set_grid_dim(*sizes)
        programs = [(x, y, z) for x in range(sizes[0]) for y in range(sizes[1])
                    for z in range(sizes[2])]  # fmt: skip
        if self.seed:
            random.Random(self.seed).shuffle(programs)
        for self._program, program in enumerate(programs):
            builder.set_grid_idx(*program)
            function(**converted)

    def _argument(self, name: str, value: Any, jit: Any) -> Any:
        if isinstance(value, TensorDescriptor):
            converted = upstream._implicit_cvt(value)
            converted.handle.base.attr["extent"] = self._extent(
                f"{jit.__name__}'s {name}", value.base
            )
            return converted
        converted = upstream._implicit_cvt(value)
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                raise InterpreterFault(f"{jit.__name__}: {name} is on {value.device}")
            converted.handle.attr["extent"] = self._extent(f"{jit.__name__}'s {name}", value)
        return converted

    def _extent(self, name: str, t: torch.Tensor) -> Extent:
        storage, size = t.untyped_storage(), t.element_size()
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        count = last + 1 if t.numel() else 0
        key = (storage.data_ptr(), size)
        if key not in self._traffic:
            elements = max(1, storage.nbytes() // size)
            self._traffic[key] = Traffic(
                np.full(elements, _NOBODY, np.int32), np.full(elements, _NOBODY, np.int32)
            )
        low = t.data_ptr()
        return Extent(name, low, low + count * size, key[0], size, self._traffic[key])

    # The builder's methods

    def _touch(self, pointers: Any, mask: Any, kind: str) -> None:
        extent = pointers.attr.get("extent")
        if extent is None:
            raise InterpreterFault(f"{kind} through a pointer that belongs to no argument")
        addresses = np.broadcast_to(pointers.data, np.shape(mask))[mask].astype(np.int64)
        getattr(extent, kind)(addresses, self._program)

    def _builder(self) -> dict[str, Any]:
        own = {name: getattr(Builder, name) for name in (
            "create_masked_load", "create_masked_store", "binary_op", "unary_op", "create_dot",
            "cast_impl", "create_fma", "create_fabs",
        )}  # fmt: skip

        def create_masked_load(builder, pointers, mask, other, *rest, **named):
            mask = _as_array(mask)
            self._touch(pointers, mask, "load")
            element = pointers.get_element_ty()
            if other is None and not mask.all():
                other = Handle(_poison(mask.shape, element), element)
            return own["create_masked_load"](
                builder, pointers, Handle(mask, tl.int1), other, None, None, False
            )

        def create_masked_store(builder, pointers, value, mask, *_):
            mask = _as_array(mask)
            self._touch(pointers, mask, "store")
            element = pointers.get_element_ty()
            if value.dtype.scalar != element:
                raise InterpreterFault(f"store of {value.dtype} through a pointer to {element}")
            return own["create_masked_store"](
                builder, pointers, value, Handle(mask, tl.int1), None, None
            )

        def binary_op(builder, left, right, op):
            if not (_is_bfloat16(left) or _is_bfloat16(right)):
                return own["binary_op"](builder, left, right, op)
            result = op(_wide(left), _wide(right))
            if result.dtype == bool:
                return Handle(result, tl.int1)
            return Handle(bfloat16_bits(result), tl.bfloat16)

        def unary_op(builder, value, op):
            if not _is_bfloat16(value):
                return own["unary_op"](builder, value, op)
            return Handle(bfloat16_bits(op(_wide(value))), tl.bfloat16)

        def cast_impl(builder, value, to):
            if to.scalar == tl.bfloat16 and not _is_bfloat16(value):
                return Handle(bfloat16_bits(value.data.astype(np.float32)), tl.bfloat16)
            if _is_bfloat16(value) and to.scalar != tl.bfloat16:
                wide = _wide(value).astype(upstream._get_np_dtype(to))
                return Handle(wide, to.scalar)
            return own["cast_impl"](builder, value, to)

        def create_fp_to_fp(builder, value, to, rounding):
            if rounding is not None and "RTNE" not in str(rounding):
                raise InterpreterFault(f"conversion to {to} by {rounding}")
            return cast_impl(builder, value, to)

        def create_dot(builder, a, b, sum_, precision, imprecise):
            name = getattr(precision, "name", str(precision))
            operands = []
            for operand in (a, b):
                data = _wide(operand)
                if operand.dtype.scalar == tl.float32 and name == "TF32":
                    data = tf32(data)
                elif operand.dtype.scalar == tl.float32 and name != "IEEE":
                    raise InterpreterFault(f"dot by {name}")
                operands.append(Handle(data.astype(np.float32), tl.float32))
            if sum_.dtype.scalar != tl.float32:
                raise InterpreterFault(f"dot accumulates in {sum_.dtype.scalar}")
            return own["create_dot"](builder, *operands, sum_, precision, imprecise)

        def refuse_bfloat16(name):
            def method(builder, *operands):
                if any(_is_bfloat16(o) for o in operands):
                    raise InterpreterFault(f"{name} of bfloat16: convert to float32 first")
                return own[name](builder, *operands)

            return method

        def refuse(name):
            def method(builder, *_, **__):
                raise InterpreterFault(f"{name} has no place in a deterministic kernel")

            return method

        def get_bf16(builder, value):
            return Handle(bfloat16_bits(np.array([value], np.float32)), tl.bfloat16)

        methods = {
            "get_bf16": get_bf16,
            "create_masked_load": create_masked_load,
            "create_masked_store": create_masked_store,
            "binary_op": binary_op,
            "unary_op": unary_op,
            "cast_impl": cast_impl,
            "create_fp_to_fp": create_fp_to_fp,
            "create_dot": create_dot,
            "create_fma": refuse_bfloat16("create_fma"),
            "create_fabs": refuse_bfloat16("create_fabs"),
            "create_atomic_rmw": refuse("create_atomic_rmw"),
            "create_atomic_cas": refuse("create_atomic_cas"),
        }
        # Pointers that are moved, spread or shaped anew belong to the tensor that they belonged to.
        for name in ("create_addptr", "create_splat", "create_unsplat", "create_broadcast",
                     "create_expand_dims", "create_reshape", "create_trans"):  # fmt: skip
            methods[name] = _carrying(getattr(Builder, name))
        return methods


def _carrying(method: Any) -> Any:
    def carrying(builder, *args):
        result = method(builder, *args)
        for arg in args:
            if isinstance(arg, Handle) and "extent" in arg.attr:
                result.attr["extent"] = arg.attr["extent"]
        return result

    return carrying


def _as_array(mask: Any) -> np.ndarray:
    """A mask as numpy has it: descriptors give one, other loads a handle."""
    return np.asarray(mask.data if isinstance(mask, Handle) else mask, bool)


def _poison(shape: Any, element: Any) -> np.ndarray:
    kind = upstream._get_np_dtype(element)
    if element == tl.bfloat16:
        return np.full(shape, 0x7FC0, kind)
    if kind.kind == "f":
        return np.full(shape, np.nan, kind)
    return np.full(shape, True if kind.kind == "b" else np.iinfo(kind).max, kind)


_upstream_pointers = upstream.TensorDescHandle.materialize_pointers
_upstream_check = upstream.ReduceScanOpInterface.check_tensor


def _descriptor(descriptor: Any, offsets: Any) -> Any:
    pointers, mask = _upstream_pointers(descriptor, offsets)
    pointers.attr["extent"] = descriptor.base.attr["extent"]
    return pointers, mask


def _check_reduced(operation: Any, values: Any) -> None:
    if any(_is_bfloat16(v.handle) for v in values):
        raise InterpreterFault("reduction of bfloat16: convert to float32 first")
    _upstream_check(operation, values)


def _tree_sum(operation: Any, value: Any) -> Any:
    """As a card's threads add: in a tree. Numpy would add one row after another, and err more."""
    if operation.axis is None:
        rows = value.handle.data.reshape(-1)
    else:
        rows = np.moveaxis(value.handle.data, operation.axis, -1)
    total = np.ascontiguousarray(rows).sum(-1)
    if operation.keep_dims:
        total = np.expand_dims(total, operation.axis)
    return operation.to_tensor(total, value.dtype)


def _execute(tree: Any, filename: str, fn: Any) -> Any:
    found: dict[str, Any] = {}
    exec(compile(tree, filename, "exec"), fn.__globals__, found)
    return found[fn.__name__]
