"""DistributedDataParallel around a fused network.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import torch
import torch.distributed as dist
import torchvision
from torch.nn.parallel import DistributedDataParallel

import fused_resnet as fr

dist.init_process_group("gloo")  # nccl on GPUs
rank = dist.get_rank()

torch.manual_seed(0)  # the same parameters in every process; DDP would broadcast them too
model = fr.fuse(torchvision.models.resnet18(num_classes=4))
parallel = DistributedDataParallel(model.to(memory_format=torch.channels_last))
optimizer = torch.optim.SGD(parallel.parameters(), lr=0.02, momentum=0.9)

generator = torch.Generator().manual_seed(rank)  # images of this process
for _ in range(2):
    x = torch.randn(4, 3, 64, 64, generator=generator).to(memory_format=torch.channels_last)
    labels = torch.randint(4, (4,), generator=generator)
    loss = torch.nn.functional.cross_entropy(parallel(x), labels)
    optimizer.zero_grad()
    loss.backward()  # gradients have the parameters' strides, so no bucket is copied
    optimizer.step()

total = torch.stack([p.detach().double().sum() for p in model.parameters()]).sum()
sums = [torch.zeros_like(total) for _ in range(dist.get_world_size())]
dist.all_gather(sums, total)
if rank == 0:
    print("the same parameters in every process:", all(torch.equal(s, sums[0]) for s in sums))
dist.destroy_process_group()
