"""The kernels of a network, with their bytes and flops.

A kernel reads each of its inputs once and writes its result once; nothing stays in a cache between
kernels. A convolution whose stride is larger than its kernel reads only the pixels that it uses.
Flops are those of matrix products, two for a multiplication and its addition. The flops of batch
norm, additions, ReLU and pools are negligible against their bytes, and vectors of one number per
channel are below a thousandth of the maps: neither is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .cards import Card
from .layers import BlockShape, Conv, Network, Pool, network

#: Bytes of an element in memory, by precision.
ITEMSIZE = {"bfloat16": 2, "float16": 2, "tf32": 4, "float32": 4}

#: The stages whose blocks are one kernel each; None if nothing is fused.
FUSIONS: dict[str, tuple[int, ...] | None] = {
    "none": None,
    "conv": (),
    "block": (1, 2),
    "every block": (1, 2, 3, 4),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        path: Path of the first module that it computes.
        steps: Its operators, for example ``("conv", "bn", "relu")``, or ``("block",)``.
        layer: The layer of its shapes; for an operator after a convolution, those of the result.
        read: Bytes read.
        written: Bytes written.
        flops: Flops of matrix products.
    """

    path: str
    steps: tuple[str, ...]
    layer: Conv | Pool | BlockShape | str
    read: int
    written: int
    flops: int = 0

    @property
    def what(self) -> str:
        """Operators and shapes; equal for kernels with equal shapes."""
        if isinstance(self.layer, Conv) and self.steps[0] != "conv":
            return f"{self.steps[0]} {self.layer.filters}, {self.layer.out}x{self.layer.out}"
        return " + ".join((str(self.layer), *self.steps[1:]))

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    @property
    def intensity(self) -> float:
        """Flops per byte."""
        return self.flops / self.bytes

    def bound(self, card: Card, precision: str) -> str:
        """What limits it on a card: ``"memory"`` or ``"compute"``.

        Args:
            card: The GPU.
            precision: A key of :data:`ITEMSIZE`.
        """
        moving = self.bytes / card.bandwidth
        return "memory" if moving >= self.flops / card.peaks[precision] else "compute"

    def seconds(self, card: Card, precision: str) -> float:
        """The least time on a card.

        Args:
            card: The GPU.
            precision: A key of :data:`ITEMSIZE`.
        """
        return max(self.bytes / card.bandwidth, self.flops / card.peaks[precision])


def kernels(
    name: str, batch: int, precision: str, fusion: str, size: int = 224
) -> tuple[Kernel, ...]:
    """The kernels of one inference, in order.

    Args:
        name: One of :data:`fused_resnet.models.sources.MODELS`.
        batch: Number of images.
        precision: A key of :data:`ITEMSIZE`.
        fusion: ``"none"``: convolutions, batch norms, ReLUs, additions and pools each by itself.
            ``"conv"``: a convolution with its batch norm, addition and ReLU; the shortcut's
            convolution with its batch norm. ``"block"``: also the stem with its max-pool, and each
            block of stages 1 and 2 whole. ``"every block"``: of all four stages.
        size: Height and width of the images.

    Raises:
        ValueError: ``name``, ``precision`` or ``fusion`` is unknown.
    """
    for argument, value, known in (
        ("precision", precision, ITEMSIZE),
        ("fusion", fusion, FUSIONS),
    ):
        if value not in known:
            raise ValueError(
                f"roofline: {argument}: expected one of {', '.join(known)}, got {value!r}"
            )
    counter = _Counter(batch, ITEMSIZE[precision])
    return tuple(_network(network(name, size), counter, FUSIONS[fusion]))


def total(kernels: Iterable[Kernel], card: Card, precision: str) -> float:
    """Seconds of all kernels in sequence.

    Args:
        kernels: The kernels of a network.
        card: The GPU.
        precision: A key of :data:`ITEMSIZE`.
    """
    return sum(kernel.seconds(card, precision) for kernel in kernels)


def _network(net: Network, counter: _Counter, whole: tuple[int, ...] | None) -> Iterator[Kernel]:
    if whole:
        yield counter.stem(net.stem, net.pool)
    else:
        yield from counter.group(net.stem, fused=whole is not None)
        yield counter.pool(net.pool)
    for block in net.blocks:
        if block.stage in (whole or ()):
            yield counter.block(block)
        else:
            yield from _layers(block, counter, fused=whole is not None)
    yield counter.average(net)
    yield counter.linear(net)


def _layers(block: BlockShape, counter: _Counter, fused: bool) -> Iterator[Kernel]:
    for conv in block.convs[:-1]:
        yield from counter.group(conv, fused)
    # Fused, the last convolution adds the shortcut, which therefore comes before it.
    shortcut = [block.downsample] if block.downsample else []
    if fused:
        for conv in shortcut:
            yield from counter.group(conv, fused, relu=False)
        yield from counter.group(block.convs[-1], fused, add=True)
    else:
        for conv in (block.convs[-1], *shortcut):
            yield from counter.group(conv, fused, relu=False)
        yield from counter.add(block)


class _Counter:
    """Counts the kernels of a batch in a storage type."""

    def __init__(self, batch: int, itemsize: int) -> None:
        self.batch, self.itemsize = batch, itemsize

    def _kernel(
        self,
        path: str,
        steps: tuple[str, ...],
        layer: Conv | Pool | BlockShape | str,
        read: int,
        written: int,
        weight: int = 0,
        flops: int = 0,
    ) -> Kernel:
        """A kernel, from the elements and flops of one image and the elements of all weights."""
        return Kernel(
            path,
            steps,
            layer,
            (self.batch * read + weight) * self.itemsize,
            self.batch * written * self.itemsize,
            self.batch * flops,
        )

    def group(
        self, conv: Conv, fused: bool, relu: bool = True, add: bool = False
    ) -> Iterator[Kernel]:
        """A convolution, its batch norm, addition and ReLU, as one kernel or one each."""
        if fused:
            steps = ("conv", "bn", *(["add"] if add else []), *(["relu"] if relu else []))
            read = conv.read + (conv.written if add else 0)
            yield self._kernel(conv.path, steps, conv, read, conv.written, conv.weight, conv.flops)
            return
        yield self._kernel(
            conv.path, ("conv",), conv, conv.read, conv.written, conv.weight, conv.flops
        )
        owner, _, name = conv.path.rpartition(".")
        norm = "1" if name == "0" else name.replace("conv", "bn")
        yield self._pointwise(f"{owner}.{norm}".lstrip("."), "bn", conv)
        if relu:
            yield self._pointwise(f"{owner}.relu".lstrip("."), "relu", conv)

    def add(self, block: BlockShape) -> Iterator[Kernel]:
        """The addition of the shortcut, and its ReLU."""
        yield self._pointwise(block.path, "add", block.convs[-1], inputs=2)
        yield self._pointwise(f"{block.path}.relu", "relu", block.convs[-1])

    def _pointwise(self, path: str, step: str, conv: Conv, inputs: int = 1) -> Kernel:
        return self._kernel(path, (step,), conv, inputs * conv.written, conv.written)

    def pool(self, pool: Pool) -> Kernel:
        """The max-pool by itself."""
        read, written = pool.channels * pool.size**2, pool.channels * pool.out**2
        return self._kernel(pool.path, ("maxpool",), pool, read, written)

    def stem(self, conv: Conv, pool: Pool) -> Kernel:
        """The fused stem; the large map between convolution and pool is not written."""
        written = pool.channels * pool.out**2
        steps = ("conv", "bn", "relu", "maxpool")
        return self._kernel(conv.path, steps, conv, conv.read, written, conv.weight, conv.flops)

    def block(self, block: BlockShape) -> Kernel:
        """A fused block: it moves its input, all its weights and its result."""
        first, last = block.convs[0], block.convs[-1]
        return self._kernel(
            block.path,
            ("block",),
            block,
            first.channels * first.size**2,
            last.written,
            sum(conv.weight for conv in block.all_convs),
            sum(conv.flops for conv in block.all_convs),
        )

    def average(self, net: Network) -> Kernel:
        """The pool in front of the classifier."""
        what = f"average pool {net.features}, {net.last_size}x{net.last_size}"
        read = net.features * net.last_size**2
        return self._kernel("avgpool", ("average pool",), what, read, net.features)

    def linear(self, net: Network) -> Kernel:
        """The classifier."""
        weight = net.features * net.classes
        what = f"linear {net.features} to {net.classes}"
        return self._kernel("fc", ("linear",), what, net.features, net.classes, weight, 2 * weight)
