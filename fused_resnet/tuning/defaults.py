"""What the tuner believes where nothing may be timed: a table that is shipped.

``defaults.json`` says of itself where its numbers are from, how they were made and how an
entry is picked; the rule is :func:`nearest`. It holds times only of devices that were measured.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("defaults.json")

#: How far an entry may be: the binary logarithms of images, pixels of each, input and output
#: channels, each over the entry's, added up without signs. 1: one may be twice or half the entry's.
REACH = 1.0


class Conv(NamedTuple):
    """A call of ``conv_bn_add_relu``, read back from its key.

    Attributes:
        x: Shape of the input.
        weight: Shape of the weight.
        dtype: Of both.
        layout: Memory format of the input: ``channels_last``, ``contiguous`` or ``strided``.
        residual: Whether one is added.
        stride: As the key has it, and so ``padding``, ``dilation``, ``groups`` and ``relu``.
        padding: See there.
        dilation: See there.
        groups: See there.
        relu: See there.
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
    relu: str

    @property
    def kind(self) -> tuple[Any, ...]:
        """All in which an entry must be the same as the call."""
        return (self.weight[2:], *self[2:])

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """In which it may differ: images, pixels of each, input channels, output channels."""
        n, c, h, w = self.x
        return n, h * w, c, self.weight[0]

    def words(self) -> str:
        """The call in a few of them: its input, its filters, what is not plain."""
        shape, filters = ("x".join(map(str, sizes)) for sizes in (self.x, self.weight[2:]))
        words = [f"{shape} {self.layout}", f"{self.weight[0]} of {filters}"]
        words += [f"stride {self.stride}"] if self.stride != "(1, 1)" else []
        words += [f"dilation {self.dilation}"] if self.dilation != "(1, 1)" else []
        words += [f"{self.groups} groups"] if self.groups != "1" else []
        words += ["residual"] if self.residual else []
        words += [] if self.relu == "True" else ["no ReLU"]
        return ", ".join(words)


def read_key(key: str) -> Conv | None:
    """The call that a key stands for; None where it is another operator's, or no key."""
    op, _, rest = key.partition("(")
    words = re.split(r", (?![^(\[]*[)\]])", rest.removesuffix(")"))
    if op != "conv_bn_add_relu" or len(words) != 14:
        return None
    x, weight = words[0].split(" "), words[1].split(" ")
    stride, padding, dilation, groups, _, relu = words[8:]
    settings = (stride, padding, dilation, groups, relu)
    return Conv(_sizes(x[0]), _sizes(weight[0]), x[1], x[-1], words[7] != "None", *settings)


def _sizes(word: str) -> tuple[int, ...]:
    return tuple(map(int, word.split("x")))


def nearest(device: str, isa: str, key: str) -> dict[str, float]:
    """Milliseconds by candidate of the entry that is nearest to a call; empty where none is near.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        isa: On a CPU, the instruction set in use: each has a table of its own.
        key: Of the call (:func:`fused_resnet.tuner.key_of`).
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
    """The instruction set whose table holds: but for bfloat16, AVX512-BF16 and AMX are AVX-512."""
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
