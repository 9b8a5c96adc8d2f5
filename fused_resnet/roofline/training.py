"""The bytes of a training step on a GPU, pass by pass: arithmetic from shapes, not a measurement.

A pass reads each of its inputs once and writes each result once; nothing stays in a cache between
passes, and neighbouring programs of one pass find what they share in the L2 cache. Counted are maps
in the step's dtype, weights and their gradients. Vectors of one number per channel, partial sums,
the optimizer, the average pool and the classifier are not: together below a hundredth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .kernels import ITEMSIZE
from .layers import BlockShape, Conv, Network, network

#: ``"unfused"``: PyTorch's operators. ``"batch norm"``: PyTorch's convolutions, and batch norm with
#: addition and ReLU as one operation, as this package's single operations are. ``"primitives"``:
#: convolutions that apply the batch norms on both sides, as a training unit is made of.
IMPLEMENTATIONS = ("unfused", "batch norm", "primitives")

#: Bytes of the place of a pool's maximum: PyTorch's index, and the place in its window.
_INDEX = {"unfused": 8, "batch norm": 8, "primitives": 1}


@dataclass(frozen=True)
class Pass:
    """One pass over memory.

    Attributes:
        path: Path of the module that it belongs to.
        what: What the pass does, in a few words.
        backward: Whether it belongs to the backward.
        read: Bytes read.
        written: Bytes written.
    """

    path: str
    what: str
    backward: bool
    read: int
    written: int

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def passes(
    name: str, batch: int, precision: str, implementation: str, size: int = 224
) -> list[Pass]:
    """The passes of a training step, in no particular order.

    Args:
        name: One of :data:`fused_resnet.models.sources.MODELS`.
        batch: Number of images.
        precision: A key of :data:`.ITEMSIZE`: the dtype of maps.
        implementation: One of :data:`IMPLEMENTATIONS`.
        size: Height and width of the images.

    Raises:
        ValueError: ``name``, ``precision`` or ``implementation`` is unknown.
    """
    for argument, value, known in (
        ("precision", precision, ITEMSIZE),
        ("implementation", implementation, IMPLEMENTATIONS),
    ):
        if value not in known:
            raise ValueError(
                f"roofline: {argument}: expected one of {', '.join(known)}, got {value!r}"
            )
    counter = _Counter(batch, ITEMSIZE[precision], implementation)
    return list(counter.network(network(name, size)))


def saved_bytes(name: str, precision: str, implementation: str, size: int = 224) -> int:
    """The bytes of maps that a step keeps for its backward, for one image.

    The image itself, each convolution's result, and the maps after ReLU: of all layers where
    operations are separate, of blocks alone by the primitives; and the places of the pool's maxima.

    Args:
        name: One of :data:`fused_resnet.models.sources.MODELS`.
        precision: A key of :data:`.ITEMSIZE`: the dtype of maps.
        implementation: One of :data:`IMPLEMENTATIONS`.
        size: Height and width of the images.
    """
    net, itemsize = network(name, size), ITEMSIZE[precision]
    convs = [net.stem, *(conv for block in net.blocks for conv in block.all_convs)]
    elements = net.stem.channels * net.stem.size**2 + sum(conv.written for conv in convs)
    pooled = net.pool.channels * net.pool.out**2
    elements += pooled + sum(block.convs[-1].written for block in net.blocks)
    if implementation != "primitives":
        # The normalised maps inside of blocks, and in front of the pool.
        elements += net.stem.written
        elements += sum(conv.written for block in net.blocks for conv in block.convs[:-1])
    return elements * itemsize + pooled * _INDEX[implementation]


class _Counter:
    """Counts the passes of a batch."""

    def __init__(self, batch: int, itemsize: int, implementation: str) -> None:
        self.batch, self.itemsize, self.implementation = batch, itemsize, implementation

    def _pass(
        self, path: str, what: str, backward: bool, read: int, written: int, weight: int = 0
    ) -> Pass:
        """From elements of one image; a weight is read, or with a negative sign written."""
        return Pass(
            path,
            what,
            backward,
            (self.batch * read + max(weight, 0)) * self.itemsize,
            (self.batch * written + max(-weight, 0)) * self.itemsize,
        )

    def network(self, net: Network) -> Iterator[Pass]:
        yield from self._stem(net)
        for block in net.blocks:
            if self.implementation == "primitives":
                yield from self._unit(block)
            else:
                yield from self._separate(block)

    def _stem(self, net: Network) -> Iterator[Pass]:
        conv, pool = net.stem, net.pool
        z, y = conv.written, pool.channels * pool.out**2
        index = _INDEX[self.implementation] * self.batch * y
        path = conv.path
        yield self._pass(path, "convolution", False, conv.read, z, conv.weight)
        if self.implementation != "primitives":
            yield from self._norm(path, z, add=0, relu=True)
            yield self._pass(path, "weight gradient", True, z + conv.read, 0, -conv.weight)
            forward = self._pass(pool.path, "max-pool", False, z, y)
            backward = self._pass(pool.path, "max-pool gradient", True, y, z)
        else:
            # The statistics are taken in the convolution's epilogue where the kernel is ours; dz is
            # a map of its own for PyTorch's weight gradient.
            yield self._pass(path, "dz", True, 2 * z, z)
            yield self._pass(path, "weight gradient", True, z + conv.read, 0, -conv.weight)
            forward = self._pass(pool.path, "batch norm, ReLU and max-pool", False, z, y)
            backward = self._pass(pool.path, "gradient of those, with sums", True, y + z, z)
        yield Pass(forward.path, forward.what, False, forward.read, forward.written + index)
        yield Pass(backward.path, backward.what, True, backward.read + index, backward.written)

    # Convolutions by themselves, with batch norm, addition and ReLU as operations

    def _separate(self, block: BlockShape) -> Iterator[Pass]:
        x = block.convs[0].channels * block.convs[0].size ** 2
        last = block.convs[-1]
        for conv in block.all_convs:
            yield self._pass(conv.path, "convolution", False, conv.read, conv.written, conv.weight)
            yield self._pass(
                conv.path, "data gradient", True, conv.written, x_of(conv), conv.weight
            )
            yield self._pass(
                conv.path, "weight gradient", True, conv.written + conv.read, 0, -conv.weight
            )
            if conv is block.downsample:
                yield from self._norm(conv.path, conv.written, add=0, relu=False)
            elif conv is not last:
                yield from self._norm(conv.path, conv.written, add=0, relu=True)
        yield from self._norm(last.path, last.written, add=1, relu=True)
        # The gradients of the two branches meet.
        yield self._pass(block.path, "sum of gradients", True, 2 * x, x)

    def _norm(self, path: str, z: int, add: int, relu: bool) -> Iterator[Pass]:
        """Batch norm in training, with an addition (0 or 1) and ReLU."""
        yield self._pass(path, "statistics", False, z, 0)
        if self.implementation == "batch norm":
            yield self._pass(path, "batch norm", False, (1 + add) * z, z)
            if add:  # the masked gradient is a result, which the second pass reads
                yield self._pass(path, "batch norm's sums", True, 3 * z, z)
                yield self._pass(path, "batch norm's gradient", True, 2 * z, z)
            else:
                reads = (2 + relu) * z
                yield self._pass(path, "batch norm's sums", True, reads, 0)
                yield self._pass(path, "batch norm's gradient", True, reads, z)
            return
        yield self._pass(path, "batch norm", False, z, z)
        if add:
            yield self._pass(path, "addition", False, 2 * z, z)
        if relu:
            yield self._pass(path, "ReLU", False, z, z)
            yield self._pass(path, "ReLU's gradient", True, 2 * z, z)
        yield self._pass(path, "batch norm's sums", True, 2 * z, 0)
        yield self._pass(path, "batch norm's gradient", True, 2 * z, z)

    # The primitives

    def _unit(self, block: BlockShape) -> Iterator[Pass]:
        y = block.convs[-1].written
        for conv in block.all_convs:
            yield self._pass(conv.path, "conv_forward", False, conv.read, conv.written, conv.weight)
            # g and z make dz. The input is read for the ReLU before, or a shortcut's gradient is
            # added; a projection's is the first to arrive, and adds nothing.
            beside = 0 if conv is block.downsample else x_of(conv)
            yield self._pass(
                conv.path,
                "conv_backward, input",
                True,
                2 * conv.written + beside,
                x_of(conv),
                conv.weight,
            )
            yield self._pass(
                conv.path,
                "conv_backward, weight",
                True,
                2 * conv.written + conv.read,
                0,
                -conv.weight,
            )
        yield self._pass(block.path, "block_end", False, 2 * y, y)
        # dy and z, and the block's result or the projection's, which has the sign of the sum.
        yield self._pass(block.path, "block_end_backward", True, 3 * y, y)


def x_of(conv: Conv) -> int:
    """Elements of the input of one image, all of them.

    Args:
        conv: The convolution.
    """
    return conv.channels * conv.size**2
