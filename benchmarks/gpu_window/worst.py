"""Which layers a sweep is for: those whose kernels lose most time against what they could take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

#: Where no rows of a first window say so: the layers in which ResNet-50 spends most of its bytes.
DEFAULT = (
    "conv 1x1 64 to 256, 56x56 + bn + add + relu",
    "conv 3x3 64 to 64, 56x56 + bn + relu",
    "conv 1x1 256 to 64, 56x56 + bn + relu",
    "conv 3x3 128 to 128, 28x28 + bn + relu",
    "conv 3x3 256 to 256, 14x14 + bn + relu",
)

#: Providers that are this package's kernels, by the first word of their names.
OURS = ("cuda", "triton")


def worst_layers(rows: Sequence[Row], count: int = 5) -> list[str]:
    """The layers with the most microseconds lost in a network.

    What a layer loses is the time of our fastest kernel less the larger of the roofline's bound and
    nothing; or, on a card that the roofline does not know, less the fastest of the others.

    Args:
        rows: Of a first window.
        count: How many.

    Returns:
        Their names in the roofline, the worst first; :data:`DEFAULT` without such rows.
    """
    lost: dict[str, float] = {}
    found: dict[str, list[Row]] = {}
    for row in rows:
        timed = row.get("kind") == "time" and row.get("status") == "ok"
        if timed and row.get("step") == "layers" and row.get("fusion") == "conv":
            found.setdefault(row["what"], []).append(row)
    for what, group in found.items():
        ours = [r["median"] for r in group if r["provider"].split(", ")[0] in OURS]
        others = [r["median"] for r in group if r["provider"] in ("eager", "cudnn")]
        could = group[0].get("bound") or min(others, default=None)
        if ours and could is not None:
            lost[what] = (min(ours) - could) * group[0].get("count", 1)
    ranked = sorted(lost, key=lambda what: -lost[what])
    return ranked[:count] or list(DEFAULT)[:count]
