"""Whether float32 products on CUDA may round their operands to tf32, as PyTorch is set.

``torch.backends.cudnn.allow_tf32`` covers convolutions and recurrent networks together, and raises
once a program has set one of them through ``torch.backends.cudnn.conv.fp32_precision``. Each
operator's own setting is always readable, and the older flags write it as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def conv_allows_tf32() -> bool:
    """Whether convolutions may use tf32."""
    cudnn: Any = torch.backends.cudnn
    return bool(cudnn.conv.fp32_precision == "tf32")


def matmul_allows_tf32() -> bool:
    """Whether matrix products may use tf32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@contextlib.contextmanager
def tf32_set_to(allowed: bool) -> Iterator[None]:
    """Allow or forbid tf32 in all operators, and restore the setting of each.

    The older flags are written, since PyTorch's compiler reads them, and are restored as they were
    where they could be read.

    Args:
        allowed: Whether tf32 may be used inside the context.
    """
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    operators = (cudnn.conv, cudnn.rnn, matmul)
    precisions = [operator.fp32_precision for operator in operators]
    try:
        flags = (cudnn.allow_tf32, matmul.allow_tf32)
    except RuntimeError:  # a program has set one operator
        flags = None
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = allowed
        yield
    finally:
        if flags is not None:
            cudnn.allow_tf32, matmul.allow_tf32 = flags
        else:
            for operator, precision in zip(operators, precisions, strict=True):
                operator.fp32_precision = precision
