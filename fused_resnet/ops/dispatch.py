"""The backend that runs a call: the one that was forced, or the fastest one under ``auto``.

While a compiler traces, ``auto`` means the device's own kernels, and nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.availability import current_backend
from ..tuning import tuner
from ..tuning.tf32 import conv_allows_tf32
from .registry import candidates
from .training_unit import is_transformed


def fastest_backend(op: str, backend: str, arguments: tuple[Any, ...]) -> str:
    """The fastest of the backends that can run an operator on the device of its arguments.

    Args:
        op: Name of the operator.
        backend: The backend of the device's own kernels, ``"cpu"`` or ``"cuda"``, or the one that
            was forced.
        arguments: All arguments of the operator; the first is the feature map.
    """
    if torch.compiler.is_compiling() or current_backend() != "auto":
        return backend
    options = candidates(op, backend)
    return tuner.choose(op, backend, options, arguments) if len(options) > 1 else backend


def call_operator(operator: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call an operator that has a gradient; past its kernel for autograd where none is wanted.

    That kernel is in Python and takes longer than the operator on a small map.

    Args:
        operator: An operator of :data:`.registry.OPERATORS`.
        arguments: All of its arguments.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def overload_of(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The only overload of an operator, whose call is the cheaper one.

    Args:
        operator: An operator of :data:`.registry.OPERATORS`; Triton's are functions, and are
            returned as they are.
    """
    overload: Callable[..., Any] = getattr(operator, "default", operator)
    return overload


class CheckedCall(NamedTuple):
    """What the checks of a call and the choice of its backend came to.

    Attributes:
        operator: Operator that computes the call.
        settings: The operator's arguments after its tensors.
    """

    operator: Callable[..., Any]
    settings: tuple[Any, ...]


def call_key(
    op: str, tensors: tuple[Tensor | None, ...], settings: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """All that the checks of an eager call and the choice of its backend depend on.

    A call with the key of one that was checked need not be checked again: on a small map that
    takes longer than the kernel.

    Args:
        op: Name of the operation.
        tensors: Tensors of the call as they came; the first is the feature map.
        settings: Other arguments of the call as they came.

    Returns:
        None for a call that is looked at each time: in a compiler, a trace or a transform, under
        autocast or a forced backend, and with arguments of other types than they should have.
    """
    if (
        type(tensors[0]) is not Tensor
        or torch.compiler.is_compiling()
        or current_backend() != "auto"
        or is_transformed()
        or torch.jit.is_tracing()
        or torch._C._is_any_autocast_enabled()
        or tuner.is_recording()
    ):
        return None
    try:
        metadata = tuple(
            [None if t is None else (t.dtype, t.shape, t.stride(), t.device) for t in tensors]
        )
        # 1, True and 1.0 are equal, and not all of them are what a setting may be.
        kinds = tuple([type(v) for s in settings for v in (s if type(s) is tuple else (s,))])
        tf32 = tensors[0].is_cuda and conv_allows_tf32()
        key = (op, tuner.circumstances(), tf32, settings, kinds, metadata)
        hash(key)
    except (AttributeError, TypeError):
        return None
    return key


def checked_call(key: tuple[Any, ...] | None) -> CheckedCall | None:
    """What is known of a call that was checked before; None for any other.

    Args:
        key: Key of the call, from :func:`call_key`; None for a call that has none.
    """
    return None if key is None else tuner.calls.get(key)


def remember_call(
    key: tuple[Any, ...] | None, result: Sequence[int], x: Tensor, call: CheckedCall
) -> None:
    """Keep what is known of a call, if the next one like it will be run in the same way.

    Args:
        key: Key of the call, from :func:`call_key`; None for a call that has none.
        result: Shape of the result, ``(N, C, H, W)``.
        x: The feature map.
        call: What is known of the call; kept until the tuner forgets its decisions, or there are
            too many.
    """
    # A size of 1 is left out: there the strides of the result must be looked at.
    if key is not None and 1 not in result[1:] and tuner.may_time(x):
        tuner.make_room(tuner.calls)
        tuner.calls[key] = call
