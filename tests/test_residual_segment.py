"""residual_segment against float64: blocks of every kind one after another."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import doubled, normal
from tolerances import DTYPES, error
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_resnet import ops


@dataclass(frozen=True)
class Step:
    """A block: channels behind each convolution, and its shortcut."""

    widths: tuple[int, ...]
    projected: bool = False
    padding: int = 0
    stride: int = 1
    dilation: int = 1
    groups: int = 1


ROWS = {
    "one block": (8, [Step((8, 8))]),
    "basic": (8, [Step((8, 8)), Step((12, 8)), Step((12, 12), True, stride=2)]),
    "bottleneck": (8, [Step((4, 6, 16), True, stride=2), Step((4, 8, 16), dilation=2, groups=2)]),
    "mixed": (8, [Step((8, 8)), Step((4, 4, 16), True), Step((16, 16))]),
    "padding": (8, [Step((14, 14), padding=3, stride=2), Step((14, 14))]),
    "padding of a bottleneck": (8, [Step((4, 4, 10), padding=1, stride=3)]),
    "padding alone": (8, [Step((16, 16), padding=4)]),
    "stride alone": (8, [Step((8, 8), stride=2), Step((8, 8))]),
    # Channels that fill vectors, where Winograd's algorithm may run.
    "winograd": (16, [Step((16, 16)), Step((32, 32), padding=8, stride=2), Step((32, 32))]),
}


class Operands:
    """Weights, scales and shifts of all blocks in a row."""

    def __init__(self, channels: int, steps: list[Step], dtype: torch.dtype) -> None:
        self.steps = steps
        self.weights: list[torch.Tensor] = []
        self.groups: list[int] = []
        for step in steps:
            sizes = [1, 3, 1] if len(step.widths) == 3 else [3, 3]
            ins, outs = [channels, *step.widths[:-1]], list(step.widths)
            if step.projected:
                sizes, ins, outs = [*sizes, 1], [*ins, channels], [*outs, outs[-1]]
            for i, (size, c, k) in enumerate(zip(sizes, ins, outs, strict=True)):
                groups = step.groups if i == 1 and len(step.widths) == 3 else 1
                depth = c // groups * size * size
                weight = normal(k, c // groups, size, size, dtype=dtype, scale=depth**-0.5)
                self.weights.append(weight)
                self.groups.append(groups)
            channels = step.widths[-1]
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        self.scale, self.shift = (
            [normal(w.shape[0], dtype=wide, shift=0.5) for w in self.weights] for _ in range(2)
        )

    def run(self, x: torch.Tensor, **changed) -> torch.Tensor:
        packed = [
            ops.pack_conv_weight(w, g) for w, g in zip(self.weights, self.groups, strict=True)
        ]
        arguments = {
            "packed": packed,
            "scale": self.scale,
            "shift": self.shift,
            "convs": [len(s.widths) for s in self.steps],
            "projected": [s.projected for s in self.steps],
            "padding": [s.padding for s in self.steps],
            "stride": [s.stride for s in self.steps],
            "dilation": [s.dilation for s in self.steps],
            "groups": [s.groups for s in self.steps],
            "winograd": [True] * len(self.steps),
        }
        return torch.ops.fused_resnet.residual_segment(x, *(arguments | changed).values())

    def truth(self, x: torch.Tensor) -> torch.Tensor:
        """The blocks in F.conv2d and F.pad, in float64."""
        tensors = (tuple(self.weights), tuple(self.scale), tuple(self.shift))
        left = list(zip(*map(doubled, tensors), strict=True))

        def conv(h: torch.Tensor, stride: int = 1, dilation: int = 1, groups: int = 1):
            weight, scale, shift = left.pop(0)
            pad = weight.shape[-1] // 2 * dilation
            z = F.conv2d(h, weight, None, stride, pad, dilation, groups)
            return z * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)

        x = doubled(x)
        for s in self.steps:
            if len(s.widths) == 3:
                h = conv(conv(x).relu(), s.stride, s.dilation, s.groups).relu()
            else:
                h = conv(x, s.stride).relu()
            h = conv(h)
            shortcut = F.pad(x[:, :, :: s.stride, :: s.stride], (0, 0, 0, 0, s.padding, s.padding))
            x = (h + (conv(x, s.stride) if s.projected else shortcut)).relu()
        return x


def operands(name: str, dtype: torch.dtype = torch.float32, batch: int = 2):
    channels, steps = ROWS[name]
    return Operands(channels, steps, dtype), normal(batch, channels, 13, 10, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", ROWS)
def test_residual_segment(name, dtype):
    row, x = operands(name, dtype)
    # Each block's result is rounded to the dtype, and the next one's error adds to its own.
    limit = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 2e-3}.get(dtype, 2e-2)
    y, truth = row.run(x), row.truth(x)
    assert y.dtype is dtype
    assert y.shape == truth.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, truth) < limit


@pytest.mark.parametrize("batch", [0, 1, 200])
def test_batches(batch):
    """The largest goes in parts."""
    row, x = operands("padding", batch=batch)
    x = x.repeat(1, 1, 4, 3)
    y = row.run(x)
    assert y.shape == (batch, 14, 26, 15)
    for n in {0, batch // 2, batch - 1} if batch else ():
        assert error(y[n : n + 1], row.truth(x[n : n + 1])) < 3e-6


@pytest.mark.parametrize("name", ROWS)
def test_any_number_of_threads_gives_the_same_bits(name):
    """More of them than processors too, and than there is work for."""
    row, x = operands(name)
    x = x.repeat(1, 1, 3, 2)
    given = x.clone()
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results += [row.run(x) for _ in range(3)]
    assert all(torch.equal(y, results[0]) for y in results)
    assert torch.equal(x, given)


def test_a_row_has_blocks():
    with pytest.raises(ValueError, match="convs: expected at least one block"):
        Operands(4, [], torch.float32).run(operands("basic")[1])


@pytest.mark.parametrize("name", ROWS)
def test_the_fake_knows_the_shape(name):
    row, x = operands(name)
    real = row.run(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = row.run(mode.from_tensor(x))
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"padding": [0]}, "an element for each of 2 blocks in every list, got 1"),
        ({"convs": [2, 4]}, "convs: expected 2 or 3, got 4"),
        ({"convs": [2, 3]}, "expected at least 5 tensors in every list, got 4"),
        ({"projected": [True, False]}, "padding: expected 0 beside a projection"),
        ({"padding": [-1, 0]}, "padding: expected 0 beside a projection, and else at least 0"),
        ({"padding": [2, 0]}, "residual: expected shape"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    row, x = operands("padding")
    with pytest.raises(ValueError, match=message):
        row.run(x, **changed)


def test_the_shortcut_strides_as_its_block():
    row, x = operands("padding")
    assert row.run(x, stride=[3, 1]).shape == (2, 14, 5, 4)
