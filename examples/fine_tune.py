"""What `fused-resnet train` does, from Python: fine-tune, then freeze the best weights."""

import numpy as np

import fused_resnet as fr
from fused_resnet import training
from fused_resnet.models.weights import load_weights

random = np.random.default_rng(0)
labels = np.arange(48) % 3
images = random.integers(0, 120, (48, 16, 16, 3))
images[np.arange(48), :, :, labels] += 80
images = images.astype("uint8")
parts = {"train_images": images[:32], "train_labels": labels[:32]}
np.savez("images.npz", **parts, val_images=images[32:], val_labels=labels[32:])

settings = training.Settings(
    model="cifar_resnet20", data="images.npz", out="run", epochs=2, batch=8, lr=0.05, ema=0.9
)
result = training.train(settings)  # goes on after an interruption with resume=True
for entry in result.history:
    print(f"epoch {entry['epoch']}: validation accuracy {entry['val_accuracy']:.2%}")

model = fr.cifar_resnet(20, num_classes=3, weights=load_weights(result.weights))
fast = fr.freeze(model.eval())
print(f"best accuracy {result.best_accuracy:.2%}, frozen: {type(fast).__name__}")
