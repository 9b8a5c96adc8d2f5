"""GPUs as their data sheets describe them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One GPU.

    Attributes:
        name: The short name.
        names: The full names that a driver reports.
        bandwidth: Memory bandwidth in bytes per second.
        peaks: Peak flops per second by precision: of dense matrix products on tensor cores, for
            float32 on CUDA cores.
        source: Source of the numbers.
    """

    name: str
    names: tuple[str, ...]
    bandwidth: float
    peaks: dict[str, float]
    source: str


def _peaks(half: float, tf32: float, float32: float) -> dict[str, float]:
    teraflops = {"bfloat16": half, "float16": half, "tf32": tf32, "float32": float32}
    return {precision: value * 1e12 for precision, value in teraflops.items()}


# From the H100 on, data sheets give the tensor cores' peaks with 2:4 sparsity; these are half of
# them, rounded.
CARDS = {
    card.name: card
    for card in (
        Card(
            "A100",
            ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM-80GB"),
            2.039e12,
            _peaks(312, 156, 19.5),
            "NVIDIA A100 data sheet, 80GB SXM: 312 and 156 TFLOP/s dense, 2,039 GB/s",
        ),
        Card(
            "H100",
            ("NVIDIA H100 80GB HBM3",),
            3.35e12,
            _peaks(990, 495, 67),
            "NVIDIA H100 data sheet, SXM: 1,979 and 989 TFLOP/s with sparsity, 3.35 TB/s",
        ),
        Card(
            "H200",
            ("NVIDIA H200",),
            4.8e12,
            _peaks(990, 495, 67),
            "NVIDIA H200 data sheet, SXM: 1,979 and 989 TFLOP/s with sparsity, 4.8 TB/s",
        ),
        Card(
            "B200",
            ("NVIDIA B200",),
            8e12,
            _peaks(2250, 1100, 80),
            "NVIDIA Blackwell architecture brief, HGX B200: 4,500 and 2,200 TFLOP/s with sparsity, "
            "8 TB/s",
        ),
    )
}


def card_of(device_name: str) -> Card | None:
    """The card of a driver's name; None if it is not in the table.

    Names must match in full: an H100 PCIe or NVL has another memory than the SXM card.

    Args:
        device_name: ``torch.cuda.get_device_name()``.
    """
    return next((card for card in CARDS.values() if device_name in card.names), None)
