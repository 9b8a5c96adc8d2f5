"""Errors of every operation and network against float64, relative to PyTorch's own error.

>>> from fused_resnet.verify import verify_operations
>>> all(row.passed for row in verify_operations())
True
"""

from .networks import verify_networks
from .operations import verify_operations
from .rows import LIMIT, ROUNDING, Row

__all__ = ["LIMIT", "ROUNDING", "Row", "verify_networks", "verify_operations"]
