r"""The least time that a GPU can take for a network: bytes, flops and microseconds of each kernel.

.. math:: t = \sum_{\text{kernels}} \max(\text{bytes} / \text{bandwidth},\;
    \text{flops} / \text{peak})

:mod:`.cards` lists the GPUs, :mod:`.layers` a network's shapes, and :mod:`.kernels` counts.
"""

from .cards import CARDS, Card, card_of
from .kernels import FUSIONS, ITEMSIZE, Kernel, kernels, total

__all__ = ["CARDS", "FUSIONS", "ITEMSIZE", "Card", "Kernel", "card_of", "kernels", "total"]
