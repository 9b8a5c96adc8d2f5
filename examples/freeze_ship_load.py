"""From a trained checkpoint to one file, and from the file to a network that serves.

python freeze_ship_load.py [FOLDER]
"""

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


def ship(model: torch.nn.Module, folder: Path) -> Path:
    """Write the network's name, its weights, labels and preprocessing: one file, no code.

    From the checkpoint, the command does the same: fused-resnet freeze resnet18 --weights best.pth
    --labels names.txt --out served.safetensors
    """
    served = folder / "served.safetensors"
    transform = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    fr.save_frozen(model, served, labels=[f"class {i}" for i in range(10)], transform=transform)
    return served


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    model = train(folder)
    served = ship(model, folder)

    # On the machine that serves: the weights are packed for its processor while they are loaded.
    # float32 as in the file; dtype=torch.bfloat16 would run the same file in bfloat16.
    frozen = fr.load_frozen(served)
    picture = torch.randint(0, 256, (3, 300, 260), dtype=torch.uint8)
    images = frozen.preprocessing(picture)[None]
    with torch.inference_mode():
        logits, expected = frozen(images), model(images)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    print(f"{served}: {served.stat().st_size / 2**20:.1f} MiB; {frozen.labels[logits.argmax()]}")


if __name__ == "__main__":
    main()
