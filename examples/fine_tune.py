"""What `fused-resnet train` does, from Python: train, fine-tune on other classes, freeze."""

from pathlib import Path

import numpy as np

import fused_resnet as fr
from fused_resnet import training
from fused_resnet.models.weights import load_weights


def save_images(path: str, colours: int) -> str:
    """Noise in which one of the colour channels, the class, is brighter."""
    random = np.random.default_rng(0)
    labels = np.arange(48) % colours
    images = random.integers(0, 120, (48, 16, 16, 3))
    images[np.arange(48), :, :, labels] += 80
    images = images.astype("uint8")
    parts = {"train_images": images[:32], "train_labels": labels[:32]}
    np.savez(path, **parts, val_images=images[32:], val_labels=labels[32:])
    return path


def run(name: str, data: str, **settings: object) -> training.Result:
    """Train, or go on with a run that was interrupted."""
    resume = Path(name, "last").exists()
    common = {"model": "cifar_resnet20", "epochs": 2, "batch": 8, "lr": 0.05}
    result = training.train(
        training.Settings(data=data, out=name, resume=resume, **common, **settings)
    )
    for entry in result.history:
        print(f"{name}, epoch {entry['epoch']}: accuracy {entry['val_accuracy']:.2%}")
    return result


# In place of trained weights: any .pth or .safetensors file, or torchvision's name for them.
base = run("base", save_images("two.npz", 2))
# Another number of classes: the head is made anew, the rest starts from the weights.
result = run("run", save_images("three.npz", 3), weights=str(base.weights), ema=0.9)

model = fr.cifar_resnet(20, num_classes=3, weights=load_weights(result.weights))
fast = fr.freeze(model.eval())
print(f"best accuracy {result.best_accuracy:.2%}, frozen: {type(fast).__name__}")
