"""The operator of exported frozen models: a program with weights in PyTorch's layout.

A packed weight belongs to one instruction set, and an exported program may run on other machines.
So ``torch.export`` of a frozen model records ``torch.ops.fused_resnet_export.run_program``: a
program's steps, and its tensors with plain weights, which the file stores as constants. Where it
runs, each weight is packed at the first call and cached for its lifetime. The operator exists once
the package is imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import Library, register_fake
from torch.utils.weak import WeakTensorKeyDictionary

from ..backends.availability import resolve_backend
from ..ops.fakes import FAKES
from ..ops.packed import pack_conv_weight, packed_dtype
from ..ops.program_steps import Step, decode
from ..ops.registry import OPERATORS
from .run_steps import TENSORS, Steps, run_steps


def run_program(
    x: Tensor, tensors: Sequence[Tensor], steps: Sequence[int], outputs: Sequence[int]
) -> list[Tensor]:
    """The operator, which a frozen model calls while it is exported.

    Args:
        x: The program's input, ``(N, C, H, W)``.
        tensors: Tensors of all steps; convolutions' weights are ``(K, C / groups, kh, kw)``, in the
            dtype of ``x`` or a wider one.
        steps: The program's steps as integers, :data:`.program_steps.LENGTH` for each step.
        outputs: The values that are returned, in order.
    """
    return torch.ops.fused_resnet_export.run_program(x, list(tensors), list(steps), list(outputs))


class _StoredProgram(Steps):
    """The program of a file, with packed weights."""

    def __init__(self, steps: list[Step], outputs: list[int], tensors: list[Tensor]) -> None:
        super().__init__(steps, outputs)
        self.tensors = tensors

    def operands(self, index: int) -> list[Tensor]:
        step = self.steps[index]
        return self.tensors[step.tensor :][: TENSORS.get(step.operation, 0)]


def _run_program(
    x: Tensor, tensors: list[Tensor], numbers: list[int], outputs: list[int]
) -> list[Tensor]:
    steps, tensors = decode(numbers), list(tensors)
    for step in steps:
        if step.operation in ("conv", "conv_max_pool"):
            tensors[step.tensor] = packed(tensors[step.tensor], x.dtype, step.groups)
    backend = resolve_backend("residual_block", x)
    if backend == x.device.type == "cpu":
        results: list[Tensor] = OPERATORS["cpu"].run_program(x, tensors, numbers, outputs)
        return results
    return run_steps(_StoredProgram(steps, outputs, tensors), x, backend)


_library = Library("fused_resnet_export", "DEF")
_library.define("run_program(Tensor x, Tensor[] tensors, int[] steps, int[] outputs) -> Tensor[]")
_library.impl("run_program", _run_program, "CompositeExplicitAutograd")
register_fake("fused_resnet_export::run_program", FAKES["run_program"])


# Packed weights

#: By plain weight: (version at packing, dtype, groups) and the packed weight.
_PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_warned = False


def packed(weight: Tensor, dtype: torch.dtype, groups: int) -> Tensor:
    """The weight in the layout of this process's kernels, cached until the weight changes.

    Args:
        weight: Filters of the convolution, ``(K, C / groups, kh, kw)``, float32, float64, bfloat16
            or float16. One that was created under ``torch.inference_mode`` has no version counter,
            and is packed at every call, with one warning.
        dtype: The dtype of the feature maps.
        groups: Number of independent groups of channels.
    """
    if weight.is_inference():
        _warn_about_inference_mode()
        return _pack(weight, dtype, groups)
    state = (weight._version, dtype, groups)
    cached = _PACKED.get(weight)
    if cached is None or cached[0] != state:
        cached = (state, _pack(weight, dtype, groups))
        _PACKED[weight] = cached
    return cached[1]


def _pack(weight: Tensor, dtype: torch.dtype, groups: int) -> Tensor:
    return pack_conv_weight(weight.to(packed_dtype(dtype, weight.device)), groups)


def _warn_about_inference_mode() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "fused_resnet: an exported model was loaded under torch.inference_mode, so its weights "
            "are packed at every call; load it outside, and call it under inference_mode",
            stacklevel=3,
        )
