"""residual_block against float64: every kind of block, in every dtype, on every instruction set."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import doubled, normal
from tolerances import DTYPES, error

import fused_resnet as fr
from fused_resnet import ops

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@dataclass(frozen=True)
class Block:
    """A block: input (n, c, h, w), channels behind each convolution, and the rest."""

    why: str
    x: tuple[int, int, int, int]
    widths: tuple[int, ...]
    shortcut: bool = False
    stride: int = 1
    dilation: int = 1
    groups: int = 1

    def __str__(self) -> str:
        return self.why

    @property
    def bottleneck(self) -> bool:
        return len(self.widths) == 3

    @property
    def settings(self) -> dict:
        names = ("bottleneck", "stride", "dilation", "groups")
        return {name: getattr(self, name) for name in names}


BLOCKS = [
    Block("basic", (2, 8, 7, 6), (8, 8)),
    Block("basic-shortcut", (2, 8, 7, 6), (12, 12), True),
    Block("basic-strided", (3, 8, 7, 6), (12, 12), True, 2),
    Block("basic-other-middle", (1, 16, 9, 5), (24, 16)),
    Block("basic-no-images", (0, 8, 7, 6), (8, 8)),
    Block("basic-one-pixel", (17, 8, 1, 1), (8, 8)),
    Block("bottleneck", (2, 16, 7, 6), (4, 6, 16)),
    Block("bottleneck-shortcut", (1, 8, 7, 6), (4, 6, 16), True),
    Block("bottleneck-strided", (3, 8, 7, 6), (4, 6, 16), True, 2),
    Block("bottleneck-stride3", (17, 8, 8, 7), (4, 6, 16), True, 3),
    Block("bottleneck-dilated", (2, 16, 9, 7), (8, 8, 16), dilation=2),
    Block("bottleneck-grouped", (2, 16, 5, 5), (8, 12, 16), groups=4),
    Block("bottleneck-all", (3, 8, 11, 7), (8, 12, 16), True, 2, 2, 4),
    Block("bottleneck-no-images", (0, 8, 7, 6), (4, 6, 16), True, 2),
    Block("prime-channels", (1, 17, 5, 7), (13, 11, 17)),
    # Widths that fill panels and maps of many tiles: Winograd's algorithm may run.
    Block("basic-winograd", (3, 32, 13, 10), (32, 32)),
    Block("basic-too-few-tiles", (1, 32, 7, 7), (32, 32)),
    Block("basic-winograd-strided", (3, 32, 13, 10), (64, 64), True, 2),
    Block("bottleneck-winograd", (3, 32, 13, 10), (32, 32, 64), True),
]

#: More bytes of maps than a part of the batch may have, at an odd number of images.
PARTED = [
    Block("basic-in-parts", (17, 32, 57, 55), (32, 32)),
    Block("bottleneck-in-parts", (17, 32, 57, 55), (8, 8, 48), True, 2),
    Block("one-image-is-more-than-a-part", (2, 16, 275, 273), (16, 16)),
]


class Operands:
    """Weights, scales and shifts of a block, its own convolutions first."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        b = self.block = block
        own = [(1, 1), (3, b.groups), (1, 1)] if b.bottleneck else [(3, 1), (3, 1)]
        ins, outs = [b.x[1], *b.widths[:-1]], list(b.widths)
        if b.shortcut:
            own, ins, outs = [*own, (1, 1)], [*ins, b.x[1]], [*outs, b.widths[-1]]
        self.groups = [g for _, g in own]
        self.weights = [
            normal(k, c // g, s, s, dtype=dtype, scale=(c // g * s * s) ** -0.5)
            for k, c, (s, g) in zip(outs, ins, own, strict=True)
        ]
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        self.scale, self.shift = (
            [normal(k, dtype=wide, shift=1.0) for k in outs] for _ in range(2)
        )
        self.x = normal(*b.x, dtype=dtype)

    def packed(self) -> list[torch.Tensor]:
        pairs = zip(self.weights, self.groups, strict=True)
        return [ops.pack_conv_weight(w, g) for w, g in pairs]

    def run(self, x: torch.Tensor | None = None, **extra) -> torch.Tensor:
        x = self.x if x is None else x
        arguments = (self.packed(), self.scale, self.shift)
        return ops.residual_block(x, *arguments, **self.block.settings, **extra)

    def truth(self) -> torch.Tensor:
        """The block in F.conv2d, in float64."""
        b, own = self.block, len(self.block.widths)
        middle = 1 if b.bottleneck else 0
        weights, scale, shift = (doubled(tuple(t)) for t in (self.weights, self.scale, self.shift))

        def conv(i: int, h: torch.Tensor, relu: bool) -> torch.Tensor:
            dilation = b.dilation if i == middle else 1
            stride = b.stride if i in (middle, own) else 1
            pad = weights[i].shape[-1] // 2 * dilation
            z = F.conv2d(h, weights[i], None, stride, pad, dilation, self.groups[i])
            z = z * scale[i].view(-1, 1, 1) + shift[i].view(-1, 1, 1)
            return z.relu() if relu else z

        x = h = doubled(self.x)
        for i in range(own - 1):
            h = conv(i, h, True)
        return (conv(own - 1, h, False) + (conv(own, x, False) if b.shortcut else x)).relu()

    def chain(self) -> torch.Tensor:
        """The block, one packed convolution after another."""
        b, own, packed = self.block, len(self.block.widths), self.packed()
        middle = 1 if b.bottleneck else 0

        def conv(i: int, h: torch.Tensor, residual: torch.Tensor | None, relu: bool):
            dilation = b.dilation if i == middle else 1
            return ops.conv_bn_add_relu_packed(
                h,
                packed[i],
                self.scale[i],
                self.shift[i],
                residual,
                weight_shape=tuple(self.weights[i].shape),
                stride=b.stride if i in (middle, own) else 1,
                padding=self.weights[i].shape[-1] // 2 * dilation,
                dilation=dilation,
                groups=self.groups[i],
                relu=relu,
            )

        residual = conv(own, self.x, None, False) if b.shortcut else self.x
        h = self.x
        for i in range(own - 1):
            h = conv(i, h, None, True)
        return conv(own - 1, h, residual, True)


@dtypes
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_residual_block(dtype, backend, block):
    operands = Operands(block, dtype)
    with fr.use_backend(backend):
        y = operands.run()
    truth = operands.truth()
    assert y.dtype is dtype
    assert y.shape == truth.shape
    assert backend == "reference" or y.is_contiguous(memory_format=torch.channels_last)
    # What is between the convolutions is rounded to the storage type: a few roundings.
    assert y.numel() == 0 or error(y, truth) < 4 * torch.finfo(dtype).eps


@dtypes
@pytest.mark.parametrize("block", [*BLOCKS, *PARTED], ids=str)
def test_the_bits_are_those_of_the_chain(dtype, block):
    """Parts of the batch, and memory that is used again, must not show."""
    operands = Operands(block, dtype)
    expected = operands.chain()
    assert torch.equal(operands.run(), expected)
    assert torch.equal(operands.run(operands.x.contiguous()), expected)
    sliced = torch.cat([operands.x, operands.x], 3)[..., : block.x[3]]
    assert torch.equal(operands.run(sliced), expected)


def with_threads(threads: int, call):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("block", PARTED, ids=str)
def test_any_number_of_threads_gives_the_same_bits(block):
    operands = Operands(block, torch.float32)
    one, two, three = (with_threads(n, operands.run) for n in (1, 2, 3))
    assert torch.equal(one, two)
    assert torch.equal(one, three)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_winograd_inside_a_block(block):
    operands = Operands(block, torch.float32)
    y, direct = operands.run(winograd=True), operands.run()
    assert y.numel() == 0 or error(y, operands.truth()) < 5e-6
    # Where channels fill panels and maps have many tiles the algorithm did run.
    assert torch.equal(y, direct) is ("winograd" not in str(block))


def test_a_block_after_a_larger_one_and_before():
    """Scratch memory is the last block's: its size and its numbers must not matter."""
    large, small = (Operands(b, torch.float32) for b in (PARTED[0], BLOCKS[8]))
    first = small.run()
    large.run()
    assert torch.equal(small.run(), first)
    half = Operands(BLOCKS[8], torch.bfloat16)
    assert torch.equal(half.run(), half.chain())


def test_not_a_number_stays_in_its_image():
    operands = Operands(BLOCKS[6], torch.float32)
    clean = operands.run()
    operands.x[1] = torch.nan
    y = operands.run()
    assert torch.equal(y[0], clean[0])
    assert y[1].isnan().all()


def test_it_names_what_is_wrong():
    operands = Operands(BLOCKS[6], torch.float32)
    x, settings = operands.x, operands.block.settings
    packed, scale, shift = operands.packed(), operands.scale, operands.shift
    run = ops.residual_block
    with pytest.raises(ValueError, match="residual_block: packed: expected 3 or 4 tensors, got 2"):
        run(x, packed[:2], scale, shift, **settings)
    with pytest.raises(ValueError, match="residual_block: scale, shift: expected 3 tensors"):
        run(x, packed, scale[:2], shift, **settings)
    with pytest.raises(
        ValueError, match=r"residual_block: residual: expected shape \[2, 16, 4, 3\]"
    ):
        run(x, packed, scale, shift, **{**settings, "stride": 2})
    with pytest.raises(ValueError, match="residual_block: packed: expected shape"):
        run(x, [packed[1], *packed[1:]], scale, shift, **settings)
    with pytest.raises(TypeError, match="residual_block: scale: expected dtype"):
        run(x, packed, [s.double() for s in scale], shift, **settings)
    with pytest.raises(ValueError, match="4 dimensions"):
        run(x[0], packed, scale, shift, **settings)
