"""torch.compile of a fused network: one graph, forward and backward."""

import torch

import fused_resnet as fr

torch.manual_seed(0)
images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
images = images.to(memory_format=torch.channels_last)

model = fr.cifar_resnet(20)  # fused from the start; fr.fuse(model) takes any other
model = model.to(memory_format=torch.channels_last)
compiled = torch.compile(model, fullgraph=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
for step in range(2):
    loss = torch.nn.functional.cross_entropy(compiled(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.4f}")
