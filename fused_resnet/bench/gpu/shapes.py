"""ResNet-50's distinct convolutions, from its structure. Needs no built extension."""

from __future__ import annotations

from typing import NamedTuple


class Layer(NamedTuple):
    """A convolution with its batch norm, and what follows it.

    Attributes:
        channels: Input channels.
        filters: Output channels.
        kernel: Height and width of a filter; the padding is half of it.
        stride: Stride in both directions.
        size: Height and width of the input.
        add: Whether the shortcut is added.
        relu: Whether ReLU is applied.
        occurs: Number of times that the layer occurs in the network.
    """

    channels: int
    filters: int
    kernel: int
    stride: int
    size: int
    add: bool
    relu: bool
    occurs: int = 1

    @property
    def padding(self) -> int:
        """Zeros on each side."""
        return self.kernel // 2

    @property
    def out(self) -> int:
        """Height and width of the result."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def depth(self) -> int:
        """Products in each element of the result."""
        return self.channels * self.kernel**2

    @property
    def conv(self) -> str:
        """The convolution, in the words of the roofline."""
        stride = f"/{self.stride}" if self.stride > 1 else ""
        name = f"conv {self.kernel}x{self.kernel}{stride} {self.channels} to {self.filters}"
        return f"{name}, {self.size}x{self.size}"

    @property
    def what(self) -> str:
        """The kernel, in the words of the roofline."""
        steps = ["bn", *(["add"] if self.add else []), *(["relu"] if self.relu else [])]
        return " + ".join((self.conv, *steps))

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """``(K, C, kh, kw)``."""
        return self.filters, self.channels, self.kernel, self.kernel

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation and groups, as the operators take them."""
        return [self.stride] * 2, [self.padding] * 2, [1, 1], 1

    def input(self, batch: int) -> tuple[int, int, int, int]:
        """Shape of the input.

        Args:
            batch: Number of images.
        """
        return batch, self.channels, self.size, self.size

    def result(self, batch: int) -> tuple[int, int, int, int]:
        """Shape of the result.

        Args:
            batch: Number of images.
        """
        return batch, self.filters, self.out, self.out


STEM = Layer(3, 64, 7, 2, 224, False, True)

#: Blocks in each stage of ResNet-50.
BLOCKS = (3, 4, 6, 3)


def resnet50() -> list[Layer]:
    """The distinct convolutions of its blocks, in order, with how often each occurs."""
    found: dict[Layer, int] = {}
    channels, size = 64, 56
    for stage, blocks in enumerate(BLOCKS):
        width = 64 << stage
        for block in range(blocks):
            stride = 2 if block == 0 and stage > 0 else 1
            out = size // stride
            layers = [
                Layer(channels, width, 1, 1, size, False, True),
                Layer(width, width, 3, stride, size, False, True),
            ]
            if block == 0:
                layers.append(Layer(channels, 4 * width, 1, stride, size, False, False))
            layers.append(Layer(width, 4 * width, 1, 1, out, True, True))
            for layer in layers:
                found[layer] = found.get(layer, 0) + 1
            channels, size = 4 * width, out
    return [layer._replace(occurs=count) for layer, count in found.items()]


#: One of each kind for rehearsals: enough channels for large tiles, and too few for them.
TINY = (
    Layer(64, 64, 1, 1, 4, False, True),
    Layer(16, 16, 3, 2, 6, False, True),
    Layer(16, 32, 1, 1, 3, True, True),
)
TINY_STEM = Layer(3, 16, 7, 2, 16, False, True)


def layers(tiny: bool) -> list[Layer]:
    """The convolutions of a window.

    Args:
        tiny: Whether it is a rehearsal.
    """
    return list(TINY) if tiny else resnet50()


def stem(tiny: bool) -> Layer:
    """The stem's convolution, before a max-pool of 3x3 with stride 2.

    Args:
        tiny: Whether it is a rehearsal.
    """
    return TINY_STEM if tiny else STEM
