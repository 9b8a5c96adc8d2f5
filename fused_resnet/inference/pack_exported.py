"""Exported programs whose weights are packed already, for one kind of processor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.program_steps import decode
from .export import packed


def pack_exported(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Pack the weights of an exported frozen model, in place, so that it runs without Python.

    ``torch.export`` of a frozen model stores plain weights, which every machine can read, and packs
    them at the first call; the operator that does so is Python's. After this function the program
    calls the operators' library alone. So AOTInductor compiles it for C++
    (``torch._inductor.aoti_compile_and_package``), where ``libfused_resnet.so`` has to be loaded.

    Args:
        program: The result of ``torch.export.export`` of a model that :func:`.freeze` returned, or
            that contains one; on the CPU.

    Returns:
        ``program``. It runs on processors whose kernels pack weights in the same way: those of the
        instruction set that ``fused-resnet info`` shows here.
    """
    graph = program.graph
    names = program.graph_signature.inputs_to_lifted_tensor_constants
    stored = torch.ops.fused_resnet_export.run_program.default
    done: dict[str, int] = {}  # groups by the constant's name
    for node in graph.find_nodes(op="call_function", target=stored):
        x, tensors, numbers, _ = node.args
        for step in decode(numbers):
            if step.operation not in ("conv", "conv_max_pool"):
                continue
            weight = tensors[step.tensor]
            name = names[weight.name]
            if done.setdefault(name, step.groups) != step.groups:
                raise ValueError(f"pack_exported: {name}: two convolutions have it in other groups")
            if "packed" not in weight.meta:
                plain: Tensor = program.constants[name]
                program.constants[name] = packed(plain, x.meta["val"].dtype, step.groups)
                _describe(weight, program.constants[name])
        node.target = torch.ops.fused_resnet.run_program.default
    graph.lint()
    program.graph_module.recompile()
    return program


def _describe(placeholder: Any, tensor: Tensor) -> None:
    """Give a placeholder the shape and dtype of the tensor that it stands for now."""
    mode = placeholder.meta["val"].fake_mode
    placeholder.meta |= {"val": mode.from_tensor(tensor, static_shapes=True), "packed": True}
    placeholder.meta.pop("tensor_meta", None)
