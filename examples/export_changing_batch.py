"""``torch.export`` of a frozen network for any batch size, run in another process.

python export_changing_batch.py [FOLDER]
"""

import subprocess
import sys
from pathlib import Path

import torch
import torchvision

import fused_resnet as fr

# What the other process runs: it needs torch and this package, and no code of the model.
SERVE = """
import sys, torch, fused_resnet
program = torch.export.load(sys.argv[1]).module()  # outside of inference_mode
with torch.inference_mode():
    for batch in (1, 3, 8):
        print(batch, tuple(program(torch.randn(batch, 3, 64, 64)).shape))
"""


def export(path: Path) -> None:
    model = torchvision.models.resnet18(num_classes=10).eval()
    frozen = fr.freeze(model)
    # An example with 2 images: export takes sizes 0 and 1 for constants.
    example = torch.randn(2, 3, 64, 64)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(frozen, (example,), dynamic_shapes={"x": {0: batch}})
        torch.testing.assert_close(program.module()(example), model(example), rtol=1e-3, atol=1e-4)
    torch.export.save(program, path)


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else ".") / "served.pt2"
    export(path)
    subprocess.run([sys.executable, "-c", SERVE, path], check=True)
