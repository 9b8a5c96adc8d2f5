"""Wrong numbers and tensors in the place of each argument of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: What a wrong argument may raise.
ERRORS = (ValueError, TypeError, RuntimeError)

#: Numbers that are wrong for every size, stride, dilation and number of groups: not positive, or
#: beyond 2^31, among them those whose products wrap to zero in 64 bits.
NUMBERS = (0, -1, -(2**31) + 1, 2**31, 2**32, 2**61, 2**62, 2**63 - 1, -(2**63))


@dataclass(frozen=True)
class Call:
    """A call and its answer: an exception whose message has ``says``; None: that or a result."""

    label: str
    run: Callable[[], object]
    says: str | None = ""


def freed(t: Tensor) -> Tensor:
    """A tensor whose storage was freed, as sharded training does between uses."""
    t = t.clone(memory_format=torch.preserve_format)
    t.untyped_storage().resize_(0)
    return t


def shrunk(t: Tensor) -> Tensor:
    """A tensor whose storage is an element shorter than its sizes and strides say."""
    t = t.clone(memory_format=torch.preserve_format)
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - t.element_size())
    return t


#: Tensors that are wrong in every place.
BROKEN: dict[str, Callable[[Tensor], Any]] = {
    "freed": freed,
    "shrunk": shrunk,
    "of no elements": lambda t: t[:0] if t.dim() == 1 else t[:, :0],
    "of integers": lambda t: t.to(torch.int32),
    "of another rank": lambda t: t[None, None],
    "sparse": lambda t: t.to_sparse(),
}


def _replaced(arguments: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    return {**arguments, name: value}


def _variants(value: Any, least: int) -> Iterator[tuple[str, Any]]:
    """Wrong values in the place of an int, or of any one of a list's."""
    wrong = [n for n in NUMBERS if not least <= n < 2**31]
    if isinstance(value, int):
        yield from ((str(n), n) for n in wrong)
        return
    for i in range(len(value)):
        for n in wrong:
            changed = [*value[:i], n, *value[i + 1 :]]
            yield str(changed), changed


def calls_of(
    op: str,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    least: dict[str, int],
    says: str | None = None,
) -> Iterator[Call]:
    """A valid call, and one for every wrong number and tensor in each argument's place.

    Args:
        op: The operation's name.
        function: Takes ``arguments`` as keywords.
        arguments: Valid ones.
        least: For the arguments that are numbers, the least that is valid.
        says: What messages about numbers must have in them; None means the name.
    """
    name = op if says is None else says
    yield Call(f"{op}, valid", lambda: function(**arguments), None)
    for argument, bound in least.items():
        for label, value in _variants(arguments[argument], bound):
            wrong = _replaced(arguments, argument, value)
            yield Call(f"{op}, {argument}={label}", lambda wrong=wrong: function(**wrong), name)
        if not isinstance(arguments[argument], int):
            for value in ([], [1] * (len(arguments[argument]) + 1)):
                wrong = _replaced(arguments, argument, value)
                yield Call(f"{op}, {argument}={value}", lambda wrong=wrong: function(**wrong))
    for argument, tensor in arguments.items():
        for label, breaks in BROKEN.items():
            if isinstance(tensor, Tensor) and tensor.numel() > 0:
                values = [breaks(tensor)]
            elif isinstance(tensor, list) and tensor and isinstance(tensor[0], Tensor):
                values = [
                    [*tensor[:i], breaks(tensor[i]), *tensor[i + 1 :]] for i in range(len(tensor))
                ]
            else:
                continue
            for i, value in enumerate(values):
                wrong = _replaced(arguments, argument, value)
                says_of = op if label in ("freed", "shrunk") else ""
                yield Call(
                    f"{op}, {argument}[{i}] {label}",
                    lambda wrong=wrong: function(**wrong),
                    says_of if says is None else "",
                )
        if isinstance(tensor, list) and tensor and isinstance(tensor[0], Tensor):
            for i in range(len(tensor)):
                for value in ([*tensor[:i], None, *tensor[i + 1 :]], tensor[:i]):
                    wrong = _replaced(arguments, argument, value)
                    yield Call(
                        f"{op}, {argument} without {i}", lambda wrong=wrong: function(**wrong)
                    )


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)
