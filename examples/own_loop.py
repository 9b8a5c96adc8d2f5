"""A training loop of one's own: fuse the network, and change nothing else."""

import torch
import torchvision

import fused_resnet as fr

torch.manual_seed(0)
images, labels = torch.randn(32, 3, 64, 64), torch.arange(32) % 4
images[torch.arange(32), labels % 3] += 2  # something to learn

model = torchvision.models.resnet18(num_classes=4).to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
fused = fr.fuse(model)  # the same Parameter objects, so the optimizer is the model's

for step in range(4):
    x = images[step % 2 :: 2].to(memory_format=torch.channels_last)
    loss = torch.nn.functional.cross_entropy(fused(x), labels[step % 2 :: 2])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.4f}")

torch.save(model.state_dict(), "own_loop.pth")  # torchvision's keys
