"""The shipped table of timings, for calls that may not be timed.

``defaults.json`` documents where and how its numbers were measured; :func:`nearest` picks an entry.
It has entries only for devices that were measured.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("defaults.json")

#: The largest distance of an entry: the sum of the absolute binary logarithms of the ratios of
#: images, pixels, input channels and output channels. At 1, one of them may be twice or half.
REACH = 1.0


class Conv(NamedTuple):
    """A call of ``conv_bn_add_relu``, parsed from its key.

    Attributes:
        x: Shape of the input.
        weight: Shape of the weight.
        dtype: Dtype of both.
        layout: Memory format of the input: ``channels_last``, ``contiguous`` or ``strided``.
        residual: Whether a residual is added.
        stride: Stride of the convolution, ``(height, width)`` as text.
        padding: Zeros on each side, ``(height, width)`` as text.
        dilation: Distance between the filter's taps, ``(height, width)`` as text.
        groups: Number of groups as text.
        activation: Name of the activation.
    """

    x: tuple[int, ...]
    weight: tuple[int, ...]
    dtype: str
    layout: str
    residual: bool
    stride: str
    padding: str
    dilation: str
    groups: str
    activation: str

    @property
    def kind(self) -> tuple[Any, ...]:
        """The properties that must be equal in an entry and the call."""
        return (self.weight[2:], *self[2:])

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The sizes that may differ: images, pixels of each, input channels, output channels."""
        n, c, h, w = self.x
        return n, h * w, c, self.weight[0]

    def words(self) -> str:
        """A short description: the input, the filters, and settings other than the defaults."""
        shape, filters = ("x".join(map(str, sizes)) for sizes in (self.x, self.weight[2:]))
        words = [f"{shape} {self.layout}", f"{self.weight[0]} of {filters}"]
        words += [f"stride {self.stride}"] if self.stride != "(1, 1)" else []
        words += [f"dilation {self.dilation}"] if self.dilation != "(1, 1)" else []
        words += [f"{self.groups} groups"] if self.groups != "1" else []
        words += ["residual"] if self.residual else []
        words += [] if self.activation == "relu" else [f"activation {self.activation}"]
        return ", ".join(words)


def read_key(key: str) -> Conv | None:
    """The call of a key.

    Args:
        key: Key of a call, from :func:`.tuner.key_of`.

    Returns:
        The call; None for a key of another operator, and for any other text.
    """
    op, _, rest = key.partition("(")
    words = re.split(r", (?![^(\[]*[)\]])", rest.removesuffix(")"))
    if op != "conv_bn_add_relu" or len(words) != 14:
        return None
    x, weight = words[0].split(" "), words[1].split(" ")
    stride, padding, dilation, groups, _, activation = words[8:]
    settings = (stride, padding, dilation, groups, activation)
    return Conv(_sizes(x[0]), _sizes(weight[0]), x[1], x[-1], words[7] != "None", *settings)


def _sizes(word: str) -> tuple[int, ...]:
    return tuple(map(int, word.split("x")))


def nearest(device: str, isa: str, key: str) -> dict[str, float]:
    """The timings of the entry nearest to a call.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        isa: Instruction set in use on a CPU; each has its own table.
        key: Key of the call, from :func:`.tuner.key_of`.

    Returns:
        Milliseconds of each candidate; empty if no entry is within :data:`REACH`.
    """
    call = read_key(key)
    if call is None:
        return {}
    best, found = REACH, dict[str, float]()
    for entry, times in _entries(device, table_of(isa, call.dtype)):
        if entry.kind == call.kind and (distance := _distance(entry, call)) <= best:
            best, found = distance, times
    return found


def table_of(isa: str, dtype: str) -> str:
    """The instruction set whose table applies.

    AVX512-BF16 and AMX have tables for bfloat16 only; other dtypes run as on AVX-512.

    Args:
        isa: The instruction set in use.
        dtype: Dtype of the call.
    """
    if dtype == "bfloat16":
        return isa
    return "avx512" if isa.startswith("amx") else isa.removesuffix("_bf16")


def _distance(one: Conv, other: Conv) -> float:
    pairs = zip(one.sizes, other.sizes, strict=True)
    return sum(abs(math.log2(a / b)) for a, b in pairs)


@functools.cache
def _entries(device: str, isa: str) -> list[tuple[Conv, dict[str, float]]]:
    tables = json.loads(FILE.read_text())["devices"][device]
    calls = tables.get(isa, {}).get("calls", {})
    entries = ((read_key(key), times) for key, times in calls.items())
    return [(call, times) for call, times in entries if call is not None]
