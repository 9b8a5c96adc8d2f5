"""Activation checkpointing: a stage's maps are computed again in backward instead of saved.

`fr.fuse(model, recompute=True)` is the finer variant: it computes a bottleneck's last convolution
again, and keeps the rest.
"""

import torch
import torchvision
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr


class Checkpointed(torch.nn.Module):
    """Runs a module under activation checkpointing."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it, and save its input alone."""
        return checkpoint(self.module, x, use_reentrant=False)


torch.manual_seed(0)
images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
losses = []
for stages in ((), ("layer1", "layer2")):
    torch.manual_seed(0)
    model = fr.fuse(torchvision.models.resnet18(num_classes=4))
    for name in stages:
        setattr(model, name, Checkpointed(getattr(model, name)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(2):  # running statistics are updated once a step, as without checkpointing
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses.append(loss.item())
print("the same loss with checkpointing:", losses[0] == losses[1], losses)
