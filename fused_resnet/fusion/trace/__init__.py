"""Fusing modules of any class: their forward is traced, matched and rewritten.

``arguments``, ``tracing``, ``output_kinds`` and ``purity`` trace a forward and record what the
trace depends on; ``patterns``, ``aliasing`` and ``matching`` find groups in its graph;
``whole_block`` recognises residual blocks; ``codegen`` and ``generated_forward`` write and run the
fused forward. ``generate`` is the entry point: it decides which submodules are traced together.
"""

from .generate import Unfused, generate_forward, parents_of
from .generated_forward import GeneratedForward, TracedForward

__all__ = ["GeneratedForward", "TracedForward", "Unfused", "generate_forward", "parents_of"]
