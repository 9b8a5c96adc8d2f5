"""Networks: torchvision's ResNets with fused blocks, and the CIFAR networks of the paper."""
