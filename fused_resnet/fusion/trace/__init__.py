"""The general swapper: any module's forward, traced by itself and rewritten with fused operations.

``tracing`` and ``purity`` find out what a forward does and what that depends on, ``patterns``,
``aliasing`` and ``matching`` find groups in it, ``whole_block`` sees where they are one residual
block, ``emitting`` and ``plan`` make the forward that runs them, and ``swapper`` decides where to
begin.
"""

from .plan import Plan, TracedForward
from .swapper import Left, parents_of, plan_of

__all__ = ["Left", "Plan", "TracedForward", "parents_of", "plan_of"]
