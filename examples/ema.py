"""An exponential moving average of the weights, by torch.optim.swa_utils."""

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_resnet as fr

torch.manual_seed(0)
images, labels = torch.randn(32, 3, 32, 32), torch.arange(32) % 10

model = fr.cifar_resnet(20)  # fused from the start; fr.fuse(model) takes any other
model = model.to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
# use_buffers: the running statistics are averaged with the weights.
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)

for _ in range(20):
    x = images.to(memory_format=torch.channels_last)
    loss = torch.nn.functional.cross_entropy(model(x), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    average.update_parameters(model)

with torch.no_grad():  # the average is fused too, and evaluates like any model
    logits = average.eval()(images.to(memory_format=torch.channels_last))
print(f"loss of the average: {torch.nn.functional.cross_entropy(logits, labels).item():.4f}")
