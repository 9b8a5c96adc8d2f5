"""From a trained checkpoint to one file, and from the file to a network that serves.

python freeze_ship_load.py [FOLDER]
"""

import subprocess
import sys
from pathlib import Path

import torch
import torchvision

import fused_resnet as fr


def train(folder: Path) -> torch.nn.Module:
    """Stands for your training: a network with ten classes, saved as a state_dict."""
    model = torchvision.models.resnet18(num_classes=10).eval()
    torch.save(model.state_dict(), folder / "best.pth")
    return model


def freeze(folder: Path) -> Path:
    """Write the network's name, its weights and the options of ``freeze``: one file, no code."""
    served = folder / "served.safetensors"
    command = [sys.executable, "-m", "fused_resnet", "freeze", "resnet18"]
    subprocess.run([*command, "--weights", folder / "best.pth", "--out", served], check=True)
    return served


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    model = train(folder)
    served = freeze(folder)

    # On the machine that serves: the weights are packed for its processor while they are loaded.
    # float32 as in the file; dtype=torch.bfloat16 would run the same file in bfloat16.
    frozen = fr.load_frozen(served)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        logits, expected = frozen(images), model(images)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    print(f"{served}: {served.stat().st_size / 2**20:.1f} MiB, logits {tuple(logits.shape)}")


if __name__ == "__main__":
    main()
