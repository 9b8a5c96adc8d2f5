"""Automatic mixed precision: autocast chooses the dtype, GradScaler keeps float16 in range."""

import torch
import torchvision

import fused_resnet as fr

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
images, labels = torch.randn(8, 3, 64, 64, device=device), torch.arange(8, device=device) % 4
images = images.to(memory_format=torch.channels_last)

for dtype in (torch.bfloat16, torch.float16):
    model = fr.fuse(torchvision.models.resnet18(num_classes=4)).to(device)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            logits = model(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    print(f"{dtype}: loss {loss.item():.4f}")
