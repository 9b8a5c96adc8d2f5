"""The bytes of a training step on a GPU, by arithmetic: writes results/training-bytes.json.

python benchmarks/training_bytes.py

Nothing is run or measured: ``fused_resnet.roofline.training`` counts what each pass reads and
writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fused_resnet.roofline.training import IMPLEMENTATIONS, passes, saved_bytes

FILE = Path(__file__).resolve().parent / "results" / "training-bytes.json"
MODELS = ("resnet18", "resnet50")
BATCH, DTYPE, SIZE = 256, "bfloat16", 224

NOTE = (
    "Arithmetic, not a measurement: no GPU has run these kernels. Each pass reads its inputs and "
    "writes its results once; maps, weights and their gradients are counted. Implementations: "
    "unfused is PyTorch's operators; batch norm is PyTorch's convolutions with batch norm, "
    "addition and ReLU as one operation; primitives is a training unit, whose convolutions apply "
    "the batch norms on both sides."
)


def document() -> dict[str, Any]:
    """What the file says."""
    rows = []
    for model in MODELS:
        for implementation in IMPLEMENTATIONS:
            found = passes(model, BATCH, DTYPE, implementation, SIZE)
            saved = saved_bytes(model, DTYPE, implementation)
            backward = sum(p.bytes for p in found if p.backward)
            total = sum(p.bytes for p in found)
            rows.append(
                {
                    "model": model,
                    "implementation": implementation,
                    "passes": len(found),
                    "gigabytes_forward": round((total - backward) / 1e9, 1),
                    "gigabytes_backward": round(backward / 1e9, 1),
                    "gigabytes": round(total / 1e9, 1),
                    "saved_megabytes_per_image": round(saved / 1e6, 1),
                }
            )
    return {"note": NOTE, "batch": BATCH, "dtype": DTYPE, "size": SIZE, "rows": rows}


def main() -> None:
    FILE.write_text(json.dumps(document(), indent=1) + "\n")
    for row in document()["rows"]:
        print(
            f"{row['model']:9} {row['implementation']:11} {row['gigabytes']:6} GB a step, "
            f"{row['saved_megabytes_per_image']:5} MB saved for an image"
        )


if __name__ == "__main__":
    main()
