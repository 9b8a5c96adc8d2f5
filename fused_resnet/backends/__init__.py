"""The implementations of the operations, which of them can run here, and which one is forced.

``reference`` defines each operation in plain PyTorch, ``aten`` calls the fused operators that
PyTorch ships (the backend ``library``), ``triton`` has the Triton kernels; the
backends ``cpu`` and ``cuda`` are compiled into ``fused_resnet._C``.
"""
